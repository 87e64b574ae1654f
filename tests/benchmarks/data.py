"""A training batch of born_again.data against `datasets` with set_transform and torchvision v2, on one core.

    python -m tests.benchmarks.data [--cifar10 FOLDER] [--batch 128] [--batches 20] [--repeats 5]

Both give the same: a shuffled batch of 32x32 images, padded by reflection, cropped and mirrored at random, normalised,
float32, collated, on the device, drawn from a DataLoader by a RandomSampler. Reading the dataset and decoding it into
memory is not counted for ours; theirs decodes in each epoch, as `datasets` does. Repeats alternate; the first of each
is a warm-up that is not counted. At last a training step of BornAgainTrainer under a teacher, bf16 and channels_last
where the machine has them, on as many threads as torch takes, and the share of it that our batch is.

Without --cifar10 (a folder, or the Hub's id where there is a network) the images are random ones, stored as PNG as
those of CIFAR-10 are; 5,120 of either.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator

import datasets
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers.utils.logging import disable_progress_bar

from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit, load_images
from tests.benchmarks.training import STATISTICS, ImageTask

ROWS = 5_120
MODEL = "wide_resnet16_1_cifar"


def random_images() -> tuple[ImageSplit, datasets.Dataset]:
    split = ImageSplit(torch.randint(0, 256, (ROWS, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 10, (ROWS,)))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": list(split.pixels.numpy()), "label": split.labels.tolist()}
    return split, datasets.Dataset.from_dict(rows, features=features)


def cifar10(folder: str) -> tuple[ImageSplit, datasets.Dataset]:
    data = load_images(folder, max_eval_samples=1)
    rows = datasets.load_dataset(folder, split="train")
    image = next(name for name, kind in rows.features.items() if isinstance(kind, datasets.Image))
    label = next(name for name in rows.column_names if name in ("label", "labels", "fine_label"))
    rows = rows.select_columns([image, label]).rename_columns({image: "img", label: "label"}).select(range(ROWS))
    return ImageSplit(data.train.pixels[:ROWS], data.train.labels[:ROWS]), rows


def our_loader(split: ImageSplit, batch: int) -> DataLoader:
    dataset = ImageDataset(split, *STATISTICS, augment=True, flip=True, seed=0)
    return DataLoader(dataset, batch, shuffle=True, drop_last=True, collate_fn=collate_batch)


def their_loader(rows: datasets.Dataset, batch: int) -> DataLoader:
    augment = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(32, padding=4, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*STATISTICS),
        ]
    )

    def transform(examples: dict) -> dict:
        pixels = [augment(image.convert("RGB")) for image in examples["img"]]
        return {"pixel_values": pixels, "labels": examples["label"]}

    rows = rows.with_transform(transform)
    return DataLoader(rows, batch, shuffle=True, drop_last=True, collate_fn=their_collate)


def their_collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {
        "pixel_values": pixels.contiguous(memory_format=torch.channels_last),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def seconds_per_batch(batches: Iterator[dict[str, torch.Tensor]], count: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(count):
        batch = {name: part.to(device, non_blocking=True) for name, part in next(batches).items()}
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert batch["pixel_values"].dtype == torch.float32
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", metavar="FOLDER")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bar()
    split, rows = cifar10(options.cifar10) if options.cifar10 else random_images()
    threads, device = torch.get_num_threads(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    on_device = split.to(device)
    variants = {
        "born_again.data": endless(our_loader(on_device, options.batch)),
        "datasets + torchvision v2": endless(their_loader(rows, options.batch)),
    }
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(options.repeats + 1):
        for variant, batches in variants.items():
            seconds = seconds_per_batch(batches, options.batches, device)
            if repeat:
                times[variant].append(seconds)
    torch.set_num_threads(threads)
    steps = max(2, min(20, len(split) // options.batch))
    task = ImageTask(MODEL, options.batch, steps)
    step = [task.with_trainer() / steps for _ in range(options.repeats + 1)][1:]

    source = "CIFAR-10" if options.cifar10 else "random images"
    print(f"{source}, batch {options.batch}, 1 of {os.cpu_count()} cores, device {device}")
    print("| variant                   | ms a batch, median | min     | max     | images/s, median |")
    print("|---------------------------|--------------------|---------|---------|------------------|")
    for variant, values in times.items():
        middle = statistics.median(values)
        print(
            f"| {variant:25} | {1e3 * middle:18.3f} | {1e3 * min(values):7.3f} | {1e3 * max(values):7.3f} "
            f"| {options.batch / middle:16,.0f} |"
        )
    mine, theirs = times.values()
    ratios = [a / b for a, b in zip(theirs, mine, strict=True)]
    print(f"times as fast: median {statistics.median(ratios):.1f}, {min(ratios):.1f} to {max(ratios):.1f}")
    middle = statistics.median(step)
    print(
        f"{MODEL}, bf16, channels_last, {threads} threads: {1e3 * middle:.1f} ms a step with a teacher "
        f"({1e3 * min(step):.1f} to {1e3 * max(step):.1f}); its batch is {statistics.median(mine) / middle:.2%} of it"
    )


if __name__ == "__main__":
    main()
