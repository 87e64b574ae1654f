"""Training throughput of our trainers against bare PyTorch loops that do the same work, in one run.

    python -m tests.benchmarks.step [--tasks wide_resnet densenet lstm] [--repeats 5]

bf16 autocast, channels_last for images, SGD; images by BAN, text by BAN+L with the state carried and gradients
clipped. `inference` is the folded teacher. The loops have a process of their own, in which malloc is as
it comes; `memory kept` is the loop in the process of the trainers, which on a CPU keeps freed memory for the next step
(born_again.lineage.machine), and tells how much of the difference that is. Repeats alternate; the first of each is a
warm-up that is not counted. The median is shown; ratios are of pairs of one repeat.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

import torch
from transformers.utils.logging import disable_progress_bar

from born_again.lineage.machine import keep_freed_memory
from tests.benchmarks.training import ImageTask, TextTask

TASKS = {
    "wide_resnet": ImageTask("wide_resnet16_1_cifar", 128, 24),
    "densenet": ImageTask("densenet40_12", 64, 12),
    "lstm": TextTask("lstm-small", 20, 35, 40),
}
# What is trained in which process, and whether with a teacher; the loop of the same work comes first.
VARIANTS = {
    "loop, labels only": ("loops", False),
    "trainer, labels only": ("trainers", False),
    "loop": ("loops", True),
    "loop, memory kept": ("trainers", True),
    "trainer": ("trainers", True),
    "trainer, inference": ("trainers", True),
}


def seconds(task: ImageTask | TextTask, variant: str) -> float:
    """Seconds of the steps of one training."""
    disable_progress_bar()
    taught = VARIANTS[variant][1]
    if variant.startswith("loop"):
        return task.with_bare_loop(taught)
    precision = {"teacher_precision": "inference"} if "inference" in variant else {}
    return task.with_trainer(taught, **precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, bf16, {options.repeats} repeats")
    print(
        "| task                             | variant              | items/s, median |    min |    max | to the loop |"
    )
    print(
        "|----------------------------------|----------------------|-----------------|--------|--------|-------------|"
    )
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), prepare))
            for name, prepare in (("trainers", keep_freed_memory), ("loops", None))
        }
        for name in options.tasks:
            task = TASKS[name]
            rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            for repeat in range(options.repeats + 1):
                for variant, (process, _) in reversed(VARIANTS.items()):
                    rate = task.items / pools[process].submit(seconds, task, variant).result()
                    if repeat:
                        rates[variant].append(rate)
            for variant, found in rates.items():
                loop = rates["loop, labels only" if "labels" in variant else "loop"]
                ratio = statistics.median(ours / bare for ours, bare in zip(found, loop, strict=True))
                print(
                    f"| {task!s:32} | {variant:20} | {statistics.median(found):15,.0f} | {min(found):6,.0f} "
                    f"| {max(found):6,.0f} | {ratio:11.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
