"""What publishing costs a training: a lineage that is sent to a slow Hub against the same one that stays at home.

    python -m tests.benchmarks.publish [--seconds 60] [--delay 5] [--students 3] [--repeats 3]

The lineage is of images from --seconds of steps each; how many steps these are is measured first. The Hub is the one
of the tests, on this machine, and lets every request wait for --delay seconds. Repeats alternate; a short lineage that
is not counted goes first. Training ends when the publisher is told to finish; what is still to be sent then is the
last upload: the newest generation, the ensemble, the cards of the others, the collection.

A generation is sent while the next one trains, which takes some ten requests. Where --seconds is shorter than that,
generations queue up, and the last upload is that of several.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from born_again import BornAgainTrainer, BornAgainTrainingArguments, LineageRunner, LineageSpec
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.hub.files import HubSettings
from born_again.hub.launch import generation_arguments
from born_again.hub.publishing import BackgroundPublisher
from born_again.models.image_classifier import load_image_classifier, save_image_classifier
from tests.benchmarks.training import classifier, images

MEASURED_STEPS = 20


@contextlib.contextmanager
def slow_hub(folder: Path, delay: float) -> Iterator[tuple[object, str]]:
    """A Hub that this process talks to, and a token of it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from hub_fixtures import redirected
    from hub_server import HubServer

    with HubServer(folder) as hub, redirected(hub):
        hub.delay = delay
        yield hub, hub.token


class TimedPublisher(BackgroundPublisher):
    """Knows when the training was over, and how long before and after it was waited for."""

    started = finishing = finished = 0.0

    def start(self, manifest) -> None:
        begun = time.perf_counter()
        super().start(manifest)
        self.started = time.perf_counter() - begun

    def finish(self, *args, **kwargs) -> dict[str, str]:
        self.finishing = time.perf_counter()
        left = super().finish(*args, **kwargs)
        self.finished = time.perf_counter()
        return left


@dataclass
class Times:
    """Seconds of one lineage.

    Attributes:
        training: from the first generation's beginning to the end of the last one.
        before: of finding out whether the Hub can be published to.
        after: of the last upload.
    """

    training: float
    before: float = 0.0
    after: float = 0.0


def run(options: argparse.Namespace, steps: int, students: int, dataset: ImageDataset, hub=None, token=None) -> Times:
    """Trains one lineage, and publishes it where there is a Hub."""
    with tempfile.TemporaryDirectory() as folder:
        args = BornAgainTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            optim="sgd",
            learning_rate=0.01,
            max_grad_norm=0.0,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=1,
        )

        def build_trainer(student, teacher, generation) -> BornAgainTrainer:
            trainer = BornAgainTrainer(
                student,
                generation_arguments(args, generation),
                teacher=teacher,
                train_dataset=dataset,
                data_collator=collate_batch,
            )
            trainer._warn_if_teacher_underfits = lambda: None
            trainer.log = lambda *args, **kwargs: None  # printing is no work of a training
            return trainer

        publisher = None if hub is None else TimedPublisher(HubSettings("born-again"), token)
        runner = LineageRunner(
            LineageSpec("benchmark", options.model, "random", generations=students),
            Path(folder) / "out",
            build_student=lambda generation: classifier(options.model),
            build_trainer=build_trainer,
            load_teacher=load_image_classifier,
            save_student=save_image_classifier,
            evaluate=lambda model: {"test": {"accuracy": 0.5, "error": 0.5, "nll": 1.0, "ece": 0.1}},
            publisher=publisher,
        )
        begun = time.perf_counter()
        runner.run()
        if publisher is None:
            return Times(time.perf_counter() - begun)
        if runner.unpublished:
            raise RuntimeError(f"not published: {runner.unpublished}")
        # What is found out before the training is no part of it: it is told apart in the table.
        training = publisher.finishing - begun - publisher.started
        return Times(training, publisher.started, publisher.finished - publisher.finishing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of a generation's steps, about")
    parser.add_argument("--delay", type=float, default=5, help="seconds that each request to the Hub waits")
    parser.add_argument("--students", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="wide_resnet16_1_cifar")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    disable_progress_bar()
    dataset = images(options.batch * 8)
    run(options, 2, 1, dataset)  # the first steps of a process are slower
    # Of a student, whose teacher costs too; the rest of a generation is not in proportion to its steps.
    rest = run(options, 1, 1, dataset).training
    step = (run(options, MEASURED_STEPS, 1, dataset).training - rest) / (2 * MEASURED_STEPS - 2)
    steps = max(1, round(options.seconds / step))
    times: dict[str, list[Times]] = {"without": [], "with": []}
    for repeat in range(options.repeats):
        # In another order each time, so that a machine that gets slower or faster counts for both.
        for variant in sorted(times, reverse=bool(repeat % 2)):
            if variant == "without":
                times[variant].append(run(options, steps, options.students, dataset))
                continue
            with tempfile.TemporaryDirectory() as home, slow_hub(Path(home), options.delay) as (hub, token):
                times[variant].append(run(options, steps, options.students, dataset, hub, token))
                requests = len(hub.requests)
    ratios = [ours.training / bare.training for ours, bare in zip(times["with"], times["without"], strict=True)]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    print(f"{options.model}, batch {options.batch}, 1 + {options.students} generations of {steps} steps, {threads};")
    print(f"each of {requests} requests to the Hub takes {options.delay:g} s")
    print("| publishing | training, median s | min    | max    | before, s | last upload, s |")
    print("|------------|--------------------|--------|--------|-----------|----------------|")
    for variant, found in times.items():
        training = [one.training for one in found]
        waited = f"{'':9} | {'':14}"
        if variant == "with":
            before, after = statistics.median(o.before for o in found), statistics.median(o.after for o in found)
            waited = f"{before:9.1f} | {after:14.1f}"
        middle = statistics.median(training)
        print(f"| {variant:10} | {middle:18.1f} | {min(training):6.1f} | {max(training):6.1f} | {waited} |")
    print(f"ratio of the training: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
