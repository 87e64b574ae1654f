"""What a lineage costs beside the steps of its trainings: a teacher and three students by examples/run_cifar.py.

    python -m tests.benchmarks.lineage [--dataset FOLDER] [--images 5120] [--epochs 10] [--students 3] [--repeats 1]
    python -m tests.benchmarks.lineage --trees CHECKOUT ANOTHER [--repeats 3] ...

With --trees the lineages of several checkouts are trained in alternation, each in a process of its own. Steady state
is the median time of a step times the number of steps. Step time is what passes from the beginning of an epoch to the
end of its last step, batches fetched between the steps included. Everything else is what the lineage adds: reading the
data, building networks, loading teachers and looking how well they know the training set, checkpoints, saving,
hashing, measuring each generation and the ensembles, cards. The start of a generation is from the call for its network
to its first epoch. Between epochs is from the end of an epoch's last step to the beginning of the next epoch, or the
end of the training. Memory is the resident set of the process at the end of each training, and the most it ever was.
Without --dataset the images are random.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import transformers
from transformers import TrainerCallback

import born_again
from born_again.data import images as reading
from born_again.data.images import ImageData, ImageSplit
from born_again.lineage.machine import peak_memory_mib
from born_again.lineage.runner import LineageRunner

EXAMPLE = Path(born_again.__file__).parents[1] / "examples" / "run_cifar.py"


@dataclass
class Generation:
    """Seconds of one generation.

    Attributes:
        start: from the call for its network to the first epoch.
        steps: of every step.
        between: epochs.
        resident: MiB at the end of its training.
    """

    called: float
    start: float = 0.0
    steps: list[float] = field(default_factory=list)
    between: float = 0.0
    resident: int = 0
    mark: float = 0.0


@dataclass
class Clock:
    """What has been seen of a lineage so far."""

    generations: list[Generation] = field(default_factory=list)


CLOCK = Clock()


class Timing(TrainerCallback):
    """Watches every trainer that is made."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        now, current = time.perf_counter(), CLOCK.generations[-1]
        if current.start:
            current.between += now - current.mark
        current.start = current.start or now - current.called
        current.mark = now

    def on_step_end(self, args, state, control, **kwargs):
        now, current = time.perf_counter(), CLOCK.generations[-1]
        current.steps.append(now - current.mark)
        current.mark = now

    def on_train_end(self, args, state, control, **kwargs):
        current = CLOCK.generations[-1]
        current.between += time.perf_counter() - current.mark
        current.resident = resident_mib()


def resident_mib() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20


def random_images(count: int, test: int) -> ImageData:
    """Random images of ten classes, with nothing to learn."""
    generator = torch.Generator().manual_seed(0)

    def split(rows: int) -> ImageSplit:
        pixels = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=generator)
        return ImageSplit(pixels, torch.randint(0, 10, (rows,), generator=generator))

    train = split(count)
    names = tuple(str(label) for label in range(10))
    statistics_ = reading.channel_statistics(train.pixels)
    facts = {"source": "random", "rows": {"train": count, "test": test}}
    return ImageData(train, split(test), names, *statistics_, facts, flip=True)


def example() -> ModuleType:
    """examples/run_cifar.py as a module."""
    spec = importlib.util.spec_from_file_location("run_cifar", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def one_lineage(options: argparse.Namespace, epochs: int, students: int) -> tuple[float, list[Generation]]:
    """Trains one and returns its wall seconds and generations."""
    script = example()
    if options.dataset is None:
        script.load_images = lambda *args, **kwargs: random_images(options.images, options.images // 5)
    CLOCK.generations = []
    build = LineageRunner.__init__

    def watched(self, *args, build_student, **kwargs):
        def timed(generation):
            CLOCK.generations.append(Generation(time.perf_counter()))
            return build_student(generation)

        build(self, *args, build_student=timed, **kwargs)

    LineageRunner.__init__ = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--generations", students, "--dataset", options.dataset or "cifar10", "--model", options.model]
            words += ["--num_train_epochs", epochs, "--output_dir", f"{folder}/out", "--disable_tqdm", True]
            words += ["--max_train_samples", options.images, "--max_eval_samples", options.images // 5]
            begun = time.perf_counter()
            status = script.start([*map(str, words), *options.rest])
            wall = time.perf_counter() - begun
            if status:
                raise RuntimeError(f"the lineage ended with status {status}")
    finally:
        LineageRunner.__init__ = build
    return wall, CLOCK.generations


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Trains one lineage, prints its generations, and returns the seconds of the whole."""
    transformers.trainer.DEFAULT_CALLBACKS.append(Timing)
    one_lineage(argparse.Namespace(**{**vars(options), "images": 512}), 1, 1)  # the first steps of a process are slow
    wall, generations = one_lineage(options, options.epochs, options.students)
    steps = sum(sum(generation.steps) for generation in generations)
    steady = sum(statistics.median(generation.steps) * len(generation.steps) for generation in generations)
    print(f"{options.model}, {options.images} images, {options.epochs} epochs")
    print("| generation | start, s | steps, s | between epochs, s | resident at its end, MiB |")
    print("|------------|----------|----------|-------------------|--------------------------|")
    for index, own in enumerate(generations):
        print(f"| {index:10} | {own.start:8.2f} | {sum(own.steps):8.1f} | {own.between:17.2f} | {own.resident:24} |")
    print(f"{wall:.1f} s in all, {steps:.1f} s in steps: ratio {wall / steps:.3f}; peak {peak_memory_mib()} MiB")
    between, start = (sum(getattr(own, name) for own in generations) for name in ("between", "start"))
    return {"wall": wall, "steps": steps, "steady": steady, "between": between, "start": start}


def measure_in_child(tree: Path) -> dict[str, float]:
    """`measure` with the package and the example of a checkout."""
    paths = [str(tree.resolve()), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as run_cifar.py takes it; random images when not given")
    parser.add_argument("--model", default="wide_resnet16_1_cifar")
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--students", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--trees", type=Path, nargs="+", default=[EXAMPLE.parents[1]], help="checkouts to compare")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options, options.rest = parser.parse_known_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    found = {tree: [] for tree in options.trees}
    for _ in range(options.repeats):
        for tree in options.trees:
            found[tree].append(measure_in_child(tree))
    names = ("wall, s", "steps, s", "steady state, s", "between epochs, s", "starts, s")
    print("| " + " | ".join(["checkout", *names, "wall to steps", "steady state to wall"]) + " |")
    print("|---" * 8 + "|")
    for tree, runs in found.items():
        own = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        ratios = [statistics.median(run["wall"] / run["steps"] for run in runs)]
        ratios.append(statistics.median(run["steady"] / run["wall"] for run in runs))
        cells = [f"{own[name]:.2f}" for name in ("wall", "steps", "steady", "between", "start")]
        print("| " + " | ".join([tree.name, *cells, *(f"{ratio:.3f}" for ratio in ratios)]) + " |")


if __name__ == "__main__":
    main()
