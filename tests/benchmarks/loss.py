"""The loss over a vocabulary of 10,000 words, forward and backward: time and memory against torch.nn.functional.

    python -m tests.benchmarks.loss [--tokens 700 2240] [--threads 1 2] [--repeats 7] [--clock wall|cpu]

Every row computes a mean over tokens and its gradient with respect to the student's logits. The first three are what
one would write with torch.nn.functional, over bf16 logits after widening them, as transformers does. "with metrics"
sums the distillation terms that the trainer logs. Time is the median over alternated repeats, first as milliseconds,
then as a multiple of F.cross_entropy alone; all rows keep freed memory, as this project's trainer does, since what the
C library gives back between two rows costs whoever comes next more than a loss. Memory is that beyond the logits of
student and teacher, the gradient that is returned included, as a multiple of the logits of one network; each figure
is from a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from born_again.lineage.machine import keep_freed_memory
from born_again.objectives import OBJECTIVES, at_least_tiny, objective_items, objective_items_and_metrics
from tests.benchmarks.alternated import CLOCKS, extra_memory, in_child, medians, print_row

WORDS = 10_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def logits(tokens: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of student and teacher, and labels; without temporary tensors, which would count as memory."""
    torch.manual_seed(0)
    student, teacher = (torch.empty(tokens, WORDS, dtype=DTYPES[dtype]).normal_(0, scale) for scale in (1, 2))
    return student.requires_grad_(), teacher, torch.randint(0, WORDS, (tokens,))


def rows(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Callable[[], None]]:
    def backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            loss().backward()

        return run

    def fused(objective: str, with_metrics: bool, permutation: str = "fresh") -> Tensor:
        items = objective_items_and_metrics if with_metrics else objective_items
        losses, weights, *_ = items(objective, student, teacher, labels, permutation=permutation)
        return (losses * weights).sum() / at_least_tiny(weights.sum())

    def hard() -> Tensor:
        return F.cross_entropy(student.float(), labels)

    def kl() -> Tensor:
        log_q, p = student.float().log_softmax(-1), teacher.float().softmax(-1)
        return hard() + F.kl_div(log_q, p, reduction="batchmean")

    table = {
        "F.cross_entropy": hard,
        "F.cross_entropy, + soft": lambda: hard() + F.cross_entropy(student.float(), teacher.float().softmax(-1)),
        "F.cross_entropy, + F.kl_div": kl,
        "born_again: label": lambda: fused("label", False),
    }
    for objective in OBJECTIVES:
        for with_metrics in (False, True):
            name = f"born_again: {objective}{', with metrics' if with_metrics else ''}"
            table[name] = lambda objective=objective, with_metrics=with_metrics: fused(objective, with_metrics)
    table["born_again: dkpp, fixed"] = lambda: fused("dkpp", False, "fixed")
    return {name: backward(loss) for name, loss in table.items()}


def child(name: str, tokens: int, dtype: str) -> None:
    rows(*logits(2, dtype))[name]()  # loads what is loaded once
    inputs = logits(tokens, dtype)
    print(extra_memory(rows(*inputs)[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[700, 2240])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--child", help="only the extra memory of this row, for the first of the tokens and dtypes")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.tokens[0], args.dtypes[0])
        return
    keep_freed_memory()
    print(
        f"torch {torch.__version__}, {WORDS:,} words, median of {args.repeats} alternated repeats, {args.clock} time"
    )
    for dtype in args.dtypes:
        for tokens in args.tokens:
            columns = {}
            for threads in args.threads:
                torch.set_num_threads(threads)
                columns[threads] = medians(rows(*logits(tokens, dtype)), args.repeats, args.clock)
            size = tokens * WORDS * DTYPES[dtype].itemsize / 2**20
            heads = [cell for threads in args.threads for cell in (f"ms, {threads} thr", "x")]
            print()
            print_row(f"{tokens:,} tokens, {dtype}", *heads, "memory x")
            for name in columns[args.threads[0]]:
                times = [
                    cell
                    for of in columns.values()
                    for cell in (f"{of[name] * 1e3:.1f}", f"{of[name] / of['F.cross_entropy']:.2f}")
                ]
                (extra,) = in_child(
                    "tests.benchmarks.loss", "--child", name, "--tokens", str(tokens), "--dtypes", dtype
                )
                print_row(name, *times, f"{extra / size:.2f}")


if __name__ == "__main__":
    main()
