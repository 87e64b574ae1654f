"""The host's time of a training step: Python and the dispatch of operations, which no device does.

    python -m tests.benchmarks.host [--tasks mlp wide_resnet lstm] [--steps 200] [--repeats 5]

Networks so small that their arithmetic takes hardly any time, in float32 on one thread. What a trainer takes beyond
the bare loop of the same work is its overhead; on a GPU it is time in which the device may have nothing to do. Repeats
alternate; shown is the median over repeats of the median step, in microseconds. Operations are those that torch
dispatches, autograd's included; calls are calls of Python functions. Both are exact, of steps that log no metrics.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.logging import disable_progress_bar

from born_again.data.streams import TokenStreams
from tests.benchmarks.training import ImageTask, TextTask, train_in_silence

# Between two steps at which metrics are collected, and after whatever is done in the first steps alone.
FIRST_COUNTED, LAST_COUNTED = 17, 23


class Mlp(nn.Module):
    """One hidden layer over the pixels, with the loss of a network of transformers."""

    def __init__(self, pixels: int = 3 * 32 * 32, hidden: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.layers(pixel_values)
        return ImageClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


class MlpTask(ImageTask):
    def network(self) -> nn.Module:
        return Mlp()


TASKS: dict[str, Callable[[int], ImageTask | TextTask]] = {
    "mlp": lambda steps: MlpTask("mlp", 2, steps, bf16=False),
    "wide_resnet": lambda steps: ImageTask("test_wide_resnet_cifar", 2, steps, bf16=False),
    "lstm": lambda steps: TextTask("test-lstm", 2, 8, steps, vocabulary=64, bf16=False),
}


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Args:
        taught: whether there is a teacher.
        trainer: whether a trainer trains, or a bare loop.
        stock: transformers' trainer, and not ours.
        changes: arguments of the training.
    """

    taught: bool
    trainer: bool = True
    stock: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def loop(self) -> str:
        return "loop, taught" if self.taught else "loop, labels"


VARIANTS = {
    "loop, labels": Variant(False, trainer=False),
    "Trainer": Variant(False, stock=True),
    "ours, labels": Variant(False),
    "loop, taught": Variant(True, trainer=False),
    "ours, taught": Variant(True),
    "ours, taught, cached": Variant(True, changes=(("teacher_cache", "memory"),)),
    "ours, taught, accumulating 4": Variant(True, changes=(("gradient_accumulation_steps", 4),)),
}


def stock_trainer(network: nn.Module, args: Any, **others: Any) -> Trainer:
    """transformers' trainer for the arguments of ours."""
    known = {name: value for name, value in args.to_dict().items() if name in TrainingArguments.__dataclass_fields__}
    trainer = Trainer(network, TrainingArguments(**known), **others)
    if isinstance(others["train_dataset"], TokenStreams):
        trainer._get_train_sampler = SequentialSampler  # their batches are not drawn
    return trainer


def made(task: ImageTask | TextTask, variant: Variant, folder: str) -> Trainer:
    """The trainer of a variant, which logs nothing before its end."""
    make = {"make": stock_trainer} if variant.stock else {}
    return task.trainer(folder, variant.taught, logging_steps=10 * task.steps, **make, **dict(variant.changes))


def follow(task: ImageTask | TextTask, variant: Variant, after: Callable[[int], None]) -> None:
    """Trains, calling `after` with the number of each step that has ended."""
    if not variant.trainer:
        for step, _ in enumerate(task.loop(variant.taught)):
            after(step)
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(task, variant, folder)
        trainer.add_callback(_AfterSteps(after))
        train_in_silence(trainer)


class _AfterSteps(TrainerCallback):
    def __init__(self, after: Callable[[int], None]) -> None:
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        self.after(state.global_step)


def microseconds(task: ImageTask | TextTask, variant: Variant) -> float:
    """The median time of a step, of this thread alone: what other processes take is not in it."""
    ends: list[float] = []
    follow(task, variant, lambda step: ends.append(time.thread_time()))
    return 1e6 * statistics.median(end - start for start, end in pairwise(ends[FIRST_COUNTED:]))


class StepCounter(TorchDispatchMode):
    """Counts operations or calls of Python functions from the end of one step to the end of a later one.

    Args:
        calls: whether calls are counted, else operations.

    Attributes:
        counts: by name; all of the counted steps.
    """

    steps = LAST_COUNTED - FIRST_COUNTED

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.calls, self.counts = calls, Counter[str]()

    def after(self, step: int) -> None:
        if step == FIRST_COUNTED:
            sys.setprofile(self._see_call) if self.calls else self.__enter__()
        elif step == LAST_COUNTED:
            sys.setprofile(None) if self.calls else self.__exit__(None, None, None)

    def _see_call(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.counts[f"{frame.f_code.co_filename.split('site-packages/')[-1]}:{frame.f_code.co_qualname}"] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


def count(task: ImageTask | TextTask, variant: Variant, calls: bool) -> StepCounter:
    """What a training of more than LAST_COUNTED steps dispatches or calls."""
    counter = StepCounter(calls)
    follow(task, variant, counter.after)
    return counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--show", type=int, default=0, help="Names shown of the most frequent operations and calls.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.getLogger("born_again").setLevel(logging.ERROR)
    print(f"1 thread, float32, {options.repeats} repeats of {options.steps} steps")
    print("| task                            | variant                      | us a step | overhead | ops   | calls |")
    print("|---------------------------------|------------------------------|-----------|----------|-------|-------|")
    for name in options.tasks:
        task, short = TASKS[name](options.steps), TASKS[name](LAST_COUNTED + 1)
        found: dict[str, list[float]] = {label: [] for label in VARIANTS}
        for _ in range(options.repeats):
            for label, variant in VARIANTS.items():
                found[label].append(microseconds(task, variant))
        times = {label: statistics.median(values) for label, values in found.items()}
        for label, variant in VARIANTS.items():
            operations, calls = (count(short, variant, calls) for calls in (False, True))
            batches = dict(variant.changes).get("gradient_accumulation_steps", 1)
            overhead = times[label] - batches * times[variant.loop]
            per_step = [counter.counts.total() / counter.steps for counter in (operations, calls)]
            print(
                f"| {task!s:31} | {label:28} | {times[label]:9,.0f} | {overhead:8,.0f} "
                f"| {per_step[0]:5,.0f} | {per_step[1]:5,.0f} |",
                flush=True,
            )
            for counter in (operations, calls):
                for what, times_called in counter.counts.most_common(options.show):
                    print(f"    {times_called / counter.steps:8.2f} {what}")


if __name__ == "__main__":
    main()
