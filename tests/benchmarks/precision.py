"""Whether precision, layout and the teacher's form change what is learned: digits, teacher and one student.

    python -m tests.benchmarks.precision [--seeds 1 2 3] [--epochs 20] [--model wide_resnet16_1_cifar]

Each variant is a lineage of examples/run_cifar.py with its digits recipe and other flags. Test accuracy and negative
log-likelihood (nats) of the generations as lineage.json has them, by seed, their mean, and their spread (the sample
standard deviation over the seeds); seconds are those of training.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from born_again.lineage.machine import hardware
from examples.run_cifar import start

VARIANTS = {
    "fp32": "--bf16 False --channels_last False --teacher_precision autocast",
    "bf16, channels_last, teacher autocast": "--bf16 True --channels_last True --teacher_precision autocast",
    "bf16, channels_last, teacher inference": "--bf16 True --channels_last True --teacher_precision inference",
}
QUANTITIES = {"accuracy": "test accuracy, %", "nll": "test nll", "seconds": "seconds"}


def lineage(flags: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of teacher and student."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"--generations 1 --dataset digits --model {options.model} --seed {seed} --disable_tqdm True {flags}"
        epochs = [] if options.epochs is None else ["--num_train_epochs", str(options.epochs)]
        with contextlib.redirect_stdout(io.StringIO()):
            start([*words.split(), *epochs, "--output_dir", folder])
        return json.loads((Path(folder) / "lineage.json").read_text())["generations"]


def quantity(record: dict[str, Any], name: str) -> float:
    if name == "seconds":
        return record["seconds"]
    return record["metrics"]["test"][name] * (100 if name == "accuracy" else 1)


def table(records: dict[str, list[list[dict[str, Any]]]], seeds: list[int]) -> list[str]:
    """One row for each variant, generation and quantity."""
    heads = ["variant", "generation", "quantity", *(f"seed {seed}" for seed in seeds), "mean", "spread"]
    rows = [heads]
    for variant, lineages in records.items():
        for index, role in enumerate(("teacher", "student")):
            for name, title in QUANTITIES.items():
                values = [quantity(generations[index], name) for generations in lineages]
                digits = {"accuracy": 2, "nll": 4, "seconds": 1}[name]
                spread = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "-"
                numbers = [f"{value:.{digits}f}" for value in (*values, statistics.mean(values))]
                rows.append([variant, role, title, *numbers, spread])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=float, help="those of the recipe, 20, when not given")
    parser.add_argument("--model", default="wide_resnet16_1_cifar")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    records: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in VARIANTS}
    for seed in options.seeds:  # variants alternate, so that a busy hour is everyone's
        for variant, flags in VARIANTS.items():
            records[variant].append(lineage(flags, seed, options))
    print(f"digits, {options.model}, {options.epochs or 'the recipe'} epochs, {hardware()}, torch {torch.__version__}")
    print("\n".join(table(records, options.seeds)))


if __name__ == "__main__":
    main()
