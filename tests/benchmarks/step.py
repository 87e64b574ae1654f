"""Training throughput of our trainers against bare PyTorch loops that do the same work, in one run.

    python -m tests.benchmarks.step [--tasks wide_resnet densenet lstm] [--repeats 5]

bf16 autocast, channels_last for images, SGD; images by BAN, text by BAN+L with the state carried and gradients
clipped. `inference` is the teacher in its inference form. Repeats alternate; the first of each is a warm-up that is
not counted. `mid` is the median; ratios are of pairs
of one repeat.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from transformers.utils.logging import disable_progress_bar

from tests.benchmarks.training import ImageTask, TextTask

TASKS = {
    "wide_resnet": ImageTask("wide_resnet16_1_cifar", 128, 40),
    "densenet": ImageTask("densenet40_12", 64, 25),
    "lstm": TextTask("lstm-small", 20, 35, 60),
}


def ways_of(task: ImageTask | TextTask) -> dict[str, Callable[[], float]]:
    """What is compared, the loop of the same work first."""
    return {
        "loop, labels only": lambda: task.with_bare_loop(taught=False),
        "trainer, labels only": lambda: task.with_trainer(taught=False),
        "loop": task.with_bare_loop,
        "trainer": task.with_trainer,
        "trainer, inference": lambda: task.with_trainer(teacher_precision="inference"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bar()
    print(f"{torch.get_num_threads()} threads, bf16, {options.repeats} repeats")
    print("| task                           | way                  | items/s, mid |    min |    max | to the loop |")
    print("|--------------------------------|----------------------|--------------|--------|--------|-------------|")
    for name in options.tasks:
        task = TASKS[name]
        ways = ways_of(task)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(options.repeats + 1):
            for way, measure in ways.items():
                rate = task.items / measure()
                if repeat:
                    rates[way].append(rate)
        for way, found in rates.items():
            loop = rates["loop, labels only" if "labels" in way else "loop"]
            ratio = statistics.median(ours / bare for ours, bare in zip(found, loop, strict=True))
            print(
                f"| {task!s:30} | {way:20} | {statistics.median(found):12,.0f} | {min(found):6,.0f} "
                f"| {max(found):6,.0f} | {ratio:11.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
