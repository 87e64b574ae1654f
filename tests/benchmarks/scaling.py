"""Time for one item against the width of the network, the batch, the vocabulary and the size of the data set.

    python -m tests.benchmarks.scaling [--repeats 5] [--axes width batch vocabulary dataset]

Images: wide_resnet16 under a teacher of its own kind, BAN, bf16 and channels_last. Text: lstm-small under its like,
BAN+L, 20 x 35 words. Every row is a whole training step by our trainer, start-up left out; `dataset` times a shuffled
epoch of batches of 128 instead, and the start of an epoch, whose work grows with the data set. Repeats alternate over
the rows, the first of each is a warm-up that is not counted. The last column is the time for one item over that of the
row above, beside what it would be if time went with the work: weights used for one item (width, vocabulary), or 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from born_again.data.image_dataset import collate_batch
from tests.benchmarks.training import ImageTask, TextTask, images

Row = tuple[str, float, Callable[[], float]]  # what it is, its work for one item, seconds for one item


def per_item(task: ImageTask | TextTask) -> Callable[[], float]:
    return lambda: task.with_trainer() / task.items


def width() -> list[Row]:
    rows = []
    for factor, steps in ((1, 12), (2, 8), (4, 5), (8, 3)):
        task = ImageTask("wide_resnet16_1_cifar", 128, steps, {"width": factor})
        parameters = sum(parameter.numel() for parameter in task.network().parameters())
        rows.append((f"width {factor}, {parameters / 1e6:.2f} M parameters", parameters, per_item(task)))
    return rows


def batch() -> list[Row]:
    sizes = (1, 8, 32, 128, 512)
    return [
        (f"batch {size}", 1, per_item(ImageTask("wide_resnet16_1_cifar", size, max(3, min(40, 1536 // size)))))
        for size in sizes
    ]


def vocabulary() -> list[Row]:
    layers = 4 * 200 * (200 + 200 + 2) * 2  # weights of the two LSTM layers, used once for each word as the softmax's
    return [
        (f"{size:,} words", layers + 201 * size, per_item(TextTask("lstm-small", 20, 35, steps, size)))
        for size, steps in ((1_000, 30), (3_000, 20), (10_000, 12), (30_000, 6), (100_000, 3))
    ]


def dataset() -> list[Row]:
    def epoch(count: int) -> Callable[[], float]:
        data = images(count)

        def measure() -> float:
            start = time.perf_counter()
            for _ in DataLoader(data, batch_size=128, shuffle=True, collate_fn=collate_batch):
                pass
            return (time.perf_counter() - start) / count

        return measure

    return [(f"{count:,} images", 1, epoch(count)) for count in (1_000, 10_000, 50_000, 200_000)]


AXES = {"width": width, "batch": batch, "vocabulary": vocabulary, "dataset": dataset}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bar()
    print(f"{torch.get_num_threads()} threads, bf16, {options.repeats} repeats")
    print("| row                            | us an item, median |      min |      max | to the row above (work) |")
    print("|--------------------------------|--------------------|----------|----------|-------------------------|")
    for axis in options.axes:
        rows = AXES[axis]()
        times: list[list[float]] = [[] for _ in rows]
        for repeat in range(options.repeats + 1):
            for (_, _, measure), found in zip(rows, times, strict=True):
                seconds = measure()
                if repeat:
                    found.append(1e6 * seconds)
        before = None
        for (what, work, _), found in zip(rows, times, strict=True):
            middle = statistics.median(found)
            growth = "" if before is None else f"{middle / before[0]:.2f} ({work / before[1]:.2f})"
            print(
                f"| {what:30} | {middle:18,.1f} | {min(found):8,.1f} | {max(found):8,.1f} | {growth:>23} |", flush=True
            )
            before = middle, work


if __name__ == "__main__":
    main()
