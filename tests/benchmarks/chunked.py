"""The loss of a step over a large vocabulary from hidden states: all logits at once against some rows at a time.

    python -m tests.benchmarks.chunked [--tokens 2048] [--hidden 512] [--words 128256] [--objective ban] [--repeats 5]

Both take hidden states and output layers of student and teacher, and give a mean over tokens, the logged metrics, and
the gradients of the student's hidden states and output layer. "full" is what the trainer does otherwise: two matrix
products and `objective_items_and_metrics`; "torch" is two matrix products, F.cross_entropy with the teacher's
probabilities, and no metrics. Memory is that beyond hidden states and output layers, gradients included, each from a
process of its own; the gradient of the output layer, which every variant needs, is given apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from born_again.lineage.machine import keep_freed_memory
from born_again.objectives import OBJECTIVES, objective_items_and_metrics
from born_again.objectives.chunked import Head, chunked_objective
from tests.benchmarks.alternated import CLOCKS, extra_memory, in_child, medians, print_row

IMPLEMENTATIONS = ("torch", "full", "chunked")
SIZES = ("tokens", "hidden", "words")


def head(tokens: int, hidden: int, words: int, trained: bool, dtype: torch.dtype) -> Head:
    """Without temporary tensors, which would count as memory."""
    states = torch.empty(tokens, hidden, dtype=dtype).normal_()
    weight = torch.empty(words, hidden, dtype=dtype).normal_(0, 0.05)
    return Head(states.requires_grad_(trained), weight.requires_grad_(trained))


def works(
    tokens: int,
    hidden: int,
    words: int,
    objective: str,
    dtype: torch.dtype = torch.float32,
    others: Mapping[str, Callable[[Head, Head], Tensor]] | None = None,
) -> dict[str, Callable[[], None]]:
    """Forward and backward of each implementation, and of `others` of the same loss, given student and teacher."""
    torch.manual_seed(0)
    student, teacher = (head(tokens, hidden, words, trained, dtype) for trained in (True, False))
    labels = torch.randint(0, words, (tokens,))

    def full() -> Tensor:
        losses, weights, _ = objective_items_and_metrics(
            objective,
            F.linear(student.hidden, student.weight),
            F.linear(teacher.hidden, teacher.weight),
            labels,
        )
        return (losses * weights).sum() / weights.sum()

    def chunked() -> Tensor:
        total, weight, _ = chunked_objective(objective, student, teacher, labels, with_metrics=True)
        return total / weight

    def backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.hidden.grad = student.weight.grad = None
            loss().backward()

        return run

    table = dict(zip(IMPLEMENTATIONS, (partial(with_torch, student, teacher), full, chunked), strict=True))
    table |= {name: partial(loss, student, teacher) for name, loss in (others or {}).items()}
    return {name: backward(loss) for name, loss in table.items()}


def with_torch(student: Head, teacher: Head) -> Tensor:
    p = F.linear(teacher.hidden, teacher.weight).float().softmax(-1)
    return F.cross_entropy(F.linear(student.hidden, student.weight).float(), p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in zip(SIZES, (2048, 512, 128_256), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--objective", choices=OBJECTIVES, default="ban")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--child", choices=IMPLEMENTATIONS, help="only the extra memory of this implementation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        works(2, 8, 8, args.objective)[args.child]()  # loads what is loaded once
        print(extra_memory(works(args.tokens, args.hidden, args.words, args.objective)[args.child]))
        return
    keep_freed_memory()  # as the examples do
    implementations = [
        implementation for implementation in IMPLEMENTATIONS if implementation != "torch" or args.objective == "ban"
    ]
    run = works(args.tokens, args.hidden, args.words, args.objective)
    seconds = medians(
        {implementation: run[implementation] for implementation in implementations}, args.repeats, args.clock
    )
    sizes = [word for name in SIZES for word in (f"--{name}", str(getattr(args, name)))]
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.tokens:,} tokens, hidden {args.hidden}, "
        f"{args.words:,} words, float32, {args.objective}, median of {args.repeats} alternated repeats, "
        f"{args.clock} time; gradient of the output layer {args.words * args.hidden * 4 / 2**20:.0f} MiB"
    )
    print_row("", "seconds", "x full", "extra MiB", "x full")
    extra = {
        implementation: in_child(
            "tests.benchmarks.chunked", "--child", implementation, "--objective", args.objective, *sizes
        )[0]
        for implementation in implementations
    }
    for implementation in implementations:
        print_row(
            implementation,
            f"{seconds[implementation]:.2f}",
            f"{seconds[implementation] / seconds['full']:.2f}",
            f"{extra[implementation]:.0f}",
            f"{extra[implementation] / extra['full']:.3f}",
        )


if __name__ == "__main__":
    main()
