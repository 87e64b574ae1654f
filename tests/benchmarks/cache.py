"""What an epoch costs whose teacher outputs are all cached, against labels alone and a live teacher, in one run.

    python -m tests.benchmarks.cache [--what images text growth] [--steps 20] [--repeats 5] [--cache disk] [--ptb DIR]

Every training has two epochs over the same views, the second of which is timed: so the cached one has filled its cache
in the first, and the others have warmed up. Images: wide_resnet16_1_cifar, batch 128, augmented, bf16 autocast,
channels_last, BAN. Text: lstm-small, 20 streams of windows of 35, 10,000 random words or, with --ptb, the training
text of Penn Treebank, bf16 autocast, BAN+L. Repeats alternate; the first of each is not counted. Wall time and the
processor time of the process are given, the latter for machines that others use too.

The growth is simulated: which share of the views of an epoch were seen in an earlier one, by the number of epochs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from born_again import BornAgainLMTrainer, BornAgainTrainer, BornAgainTrainingArguments
from born_again.data.augment import count_views, draw_views
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.data.streams import TokenStreams, collate_windows
from born_again.data.text import load_text, vocabulary_of
from born_again.models.language_models import create_language_model
from born_again.teacher.cache.cached_teacher import CachedTeacher
from tests.benchmarks.training import STATISTICS, classifier

VARIANTS = ("labels alone", "teacher, cached", "teacher, live")
GOALS = {"images": 1.05, "text": 1.25}


class SameViews(ImageDataset):
    """Every epoch shows the views of the first."""

    def set_epoch(self, epoch: int) -> None:
        pass


class SecondEpoch(TrainerCallback):
    """Wall and processor seconds from the first step of the second epoch to the last one's end."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 * self.steps:
            self.seconds = [end - start for start, end in zip(self.start, self.now(), strict=True)]

    @staticmethod
    def now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def arguments(folder: str, variant: str, cache: str, batch: int, **changes) -> BornAgainTrainingArguments:
    return BornAgainTrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        optim="sgd",
        bf16=True,
        teacher_cache=cache if variant == "teacher, cached" else "off",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **changes,
    )


def timed(trainer: BornAgainTrainer, watch: SecondEpoch) -> list[float]:
    trainer.log = lambda *args, **kwargs: None  # printing is no work of a step
    trainer._warn_if_teacher_underfits = lambda: None
    trainer.train()
    if isinstance(trainer.teacher, CachedTeacher):
        hits, lookups = trainer.teacher.pop_hit_counts()
        assert hits >= lookups / 2, "the second epoch was not read from the cache"
    return watch.seconds


def images(steps: int, cache: str) -> tuple[int, Callable[[str], list[float]]]:
    batch = 128
    pixels = torch.randint(0, 256, (batch * steps, 32, 32, 3), dtype=torch.uint8)
    split = ImageSplit(pixels, torch.randint(0, 10, (len(pixels),)))
    dataset = SameViews(split, *STATISTICS, augment=True, flip=True, seed=0)

    def epoch(variant: str) -> list[float]:
        watch = SecondEpoch(steps)
        with tempfile.TemporaryDirectory() as folder:
            momentum = {"optim_args": "momentum=0.9,nesterov=True", "learning_rate": 0.01, "max_grad_norm": 0.0}
            trainer = BornAgainTrainer(
                classifier("wide_resnet16_1_cifar"),
                arguments(folder, variant, cache, batch, channels_last=True, **momentum),
                teacher=None if variant == "labels alone" else classifier("wide_resnet16_1_cifar"),
                train_dataset=dataset,
                data_collator=collate_batch,
                callbacks=[watch],
            )
            return timed(trainer, watch)

    return batch * steps, epoch


def text(steps: int, cache: str, ptb: str | None) -> tuple[int, Callable[[str], list[float]]]:
    streams, window = 20, 35
    count = streams * window * steps
    if ptb is None:
        words, tokens = [f"word{index}" for index in range(10_000)], torch.randint(10_000, (count,))
    else:
        data = load_text(ptb)
        words, tokens = vocabulary_of(data.tokenizer), data.train[:count]
    dataset = TokenStreams(tokens, streams, window, before=0)

    def epoch(variant: str) -> list[float]:
        watch = SecondEpoch(dataset.windows)
        with tempfile.TemporaryDirectory() as folder:
            own = {"objective": "ban+l", "learning_rate": 1.0, "max_grad_norm": 0.25}
            trainer = BornAgainLMTrainer(
                create_language_model("lstm-small", words),
                arguments(folder, variant, cache, streams, **own),
                teacher=None if variant == "labels alone" else create_language_model("lstm-small", words),
                train_dataset=dataset,
                data_collator=collate_windows,
                callbacks=[watch],
            )
            return timed(trainer, watch)

    return len(tokens), epoch


def compare(what: str, items: int, epoch: Callable[[str], list[float]], repeats: int) -> None:
    seconds: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    for repeat in range(repeats + 1):
        for variant, measured in seconds.items():
            once = epoch(variant)
            if repeat:
                measured.append(once)
    print(f"{what}: {items:,} an epoch, {torch.get_num_threads()} threads, bf16; goal {GOALS[what]} x labels alone")
    print("| variant         | seconds, median | min   | max   | x labels alone, wall | x labels alone, processor |")
    print("|-----------------|-----------------|-------|-------|----------------------|---------------------------|")
    for variant, measured in seconds.items():
        wall = [pair[0] for pair in measured]
        pairs = list(zip(measured, seconds[VARIANTS[0]], strict=True))
        ratios = [statistics.median(ours[clock] / labels[clock] for ours, labels in pairs) for clock in (0, 1)]
        print(
            f"| {variant:15} | {statistics.median(wall):15.2f} | {min(wall):5.2f} | {max(wall):5.2f} "
            f"| {ratios[0]:20.3f} | {ratios[1]:25.3f} |"
        )


def growth(samples: int = 2000) -> None:
    """Of the paper's augmentation: how much of an epoch, and of all so far, an unlimited cache has seen before."""
    views = count_views(flip=True)
    seen = torch.zeros(samples, views, dtype=torch.bool)
    rows, before = torch.arange(samples), 0.0
    print("| epochs | hits in the last one | hits over all |")
    print("|--------|----------------------|---------------|")
    for epoch in range(300):
        drawn = draw_views(0, epoch, rows, flip=True)
        found = seen[rows, drawn].double().mean().item()
        seen[rows, drawn] = True
        before += found
        if epoch + 1 in (10, 50, 100, 200, 300):
            print(f"| {epoch + 1:6} | {found:20.1%} | {before / (epoch + 1):13.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["images", "text", "growth"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", default="memory", choices=("memory", "disk"))
    parser.add_argument("--ptb", help="folder with ptb.train.txt and so on")
    options = parser.parse_args()
    disable_progress_bar()
    if "images" in options.what:
        compare("images", *images(options.steps, options.cache), options.repeats)
    if "text" in options.what:
        compare("text", *text(options.steps, options.cache, options.ptb), options.repeats)
    if "growth" in options.what:
        growth()


if __name__ == "__main__":
    main()
