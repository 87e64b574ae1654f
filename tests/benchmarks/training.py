"""What the benchmarks train: image classifiers and language models, by our trainers and by bare PyTorch loops.

A bare loop is what one would write by hand for the same work: the same student, teacher, batches and precision, the
losses of torch.nn.functional, torch's SGD. The trainers also log, check for NaN, and sum the distillation metrics.
Both measure seconds from the first step's beginning to the last one's end: start-up is not a step, nor are the
`warm_up` steps of a task, in which a GPU chooses kernels and a compiler compiles. Data is on the device, as in the
examples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback

from born_again import BornAgainLMTrainer, BornAgainTrainer, BornAgainTrainingArguments, create_image_classifier
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.data.streams import TokenStreams, collate_windows
from born_again.models.language_models import create_language_model
from born_again.teacher import carries_state

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
# What the benchmarks call networks that have no name of their own.
SIZES = {"densenet40_12": ("test_densenet_cifar", {"depth": 40, "growth_rate": 12})}


def classifier(name: str, classes: int = 10, **model_args: Any) -> nn.Module:
    """An untrained image classifier."""
    name, sizes = SIZES.get(name, (name, {}))
    return create_image_classifier(name, [str(label) for label in range(classes)], *STATISTICS, **sizes, **model_args)


def images(count: int) -> ImageDataset:
    """Random images, augmented."""
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    split = ImageSplit(pixels.to(device()), torch.randint(0, 10, (count,)).to(device()))
    return ImageDataset(split, *STATISTICS, augment=True, flip=True, seed=0)


def words(count: int) -> list[str]:
    """A vocabulary."""
    return [f"word{index}" for index in range(count)]


def streams(vocabulary: int, rows: int, window: int, steps: int) -> TokenStreams:
    """Random words, as many windows as steps."""
    tokens = torch.randint(vocabulary, (rows * window * steps,)).to(device())
    return TokenStreams(tokens, rows, window, before=0)


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch(TrainerCallback):
    """Seconds from the beginning of the first step after those of a warm-up to the last one's end."""

    seconds = start = 0.0

    def __init__(self, warm_up: int = 0) -> None:
        self.warm_up = warm_up

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up:
            synchronize()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            synchronize()
            self.seconds = time.perf_counter() - self.start


def arguments(folder: str, steps: int, batch: int, **changes: Any) -> BornAgainTrainingArguments:
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": True,
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return BornAgainTrainingArguments(folder, **{**settings, **changes})


def as_called(networks: list[nn.Module], compile_args: dict[str, Any] | None) -> list[Any]:
    """Networks as a loop calls them: compiled where it says how."""
    return networks if compile_args is None else [torch.compile(network, **compile_args) for network in networks]


def kept(output: torch.Tensor, compile_args: dict[str, Any] | None) -> torch.Tensor:
    """What is read after the next call: a copy, where that call may be a CUDA graph that overwrites it."""
    return output if compile_args is None else output.clone()


def is_fused() -> bool:
    """Whether a loop's optimizer is fused, as the examples' is on CUDA."""
    return device().type == "cuda"


def seconds_of(loop: Iterator[None], warm_up: int) -> float:
    """Seconds of the steps of a loop after a warm-up; it yields when it is ready and after each step."""
    for _ in range(warm_up + 1):
        next(loop)
    synchronize()
    start = time.perf_counter()
    for _ in loop:
        pass
    synchronize()
    return time.perf_counter() - start


def train_in_silence(trainer: Trainer) -> None:
    trainer.log = lambda *args, **kwargs: None  # printing is no work of a step
    trainer._warn_if_teacher_underfits = lambda: None
    trainer.train()


def run(trainer: Trainer, watch: Stopwatch) -> float:
    """Trains in silence; returns seconds of steps."""
    trainer.add_callback(watch)
    train_in_silence(trainer)
    return watch.seconds


@dataclass(frozen=True)
class ImageTask:
    """BAN on images.

    Args:
        model: see `classifier`.
        batch: images.
        steps: of a measurement.
        model_args: of the architecture.
        warm_up: steps before them.
        bf16: autocast and channels_last, as the examples train; else float32.
    """

    model: str
    batch: int
    steps: int
    model_args: dict[str, Any] = field(default_factory=dict)
    warm_up: int = 0
    bf16: bool = True
    unit = "images"

    @property
    def items(self) -> int:
        return self.batch * self.steps

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}"

    def network(self) -> nn.Module:
        return classifier(self.model, **self.model_args)

    def trainer(
        self, folder: str, taught: bool, make: Callable[..., Trainer] = BornAgainTrainer, **changes: Any
    ) -> Trainer:
        settings = {"optim_args": "momentum=0.9,nesterov=True", "channels_last": self.bf16, "bf16": self.bf16}
        args = arguments(folder, self.warm_up + self.steps, self.batch, **{**settings, **changes})
        teacher = {"teacher": self.network()} if taught else {}
        data = images(self.batch * args.max_steps * args.gradient_accumulation_steps)
        return make(self.network(), args, train_dataset=data, data_collator=collate_batch, **teacher)

    def with_trainer(self, taught: bool = True, **changes: Any) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return run(self.trainer(folder, taught, **changes), Stopwatch(self.warm_up))

    def loop(self, taught: bool = True, compile_args: dict[str, Any] | None = None) -> Iterator[None]:
        data, where = images(self.batch * (self.warm_up + self.steps)), device()
        layout = torch.channels_last if self.bf16 else torch.contiguous_format
        student = self.network().to(where, memory_format=layout).train()
        teacher = self.network().to(where, memory_format=layout).eval().requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=is_fused())
        student, teacher = as_called([student, teacher], compile_args)
        order = torch.randperm(len(data)).tolist()
        yield
        for first in range(0, len(data), self.batch):
            batch = data.__getitems__(order[first : first + self.batch])
            pixels, labels = batch["pixel_values"].to(where), batch["labels"].to(where)
            with torch.autocast(where.type, torch.bfloat16, enabled=self.bf16):
                if taught:
                    with torch.no_grad():
                        target = kept(teacher(pixel_values=pixels).logits, compile_args)
                logits = student(pixel_values=pixels).logits
            loss = F.cross_entropy(logits.float(), target.float().softmax(-1) if taught else labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    def with_bare_loop(self, taught: bool = True, compile_args: dict[str, Any] | None = None) -> float:
        return seconds_of(self.loop(taught, compile_args), self.warm_up)


@dataclass(frozen=True)
class TextTask:
    """BAN+L on contiguous streams of words, the state carried.

    Args:
        model: see `create_language_model`.
        rows: streams.
        window: steps unrolled.
        steps: windows of a measurement.
        vocabulary: words.
        warm_up: windows before them.
        bf16: autocast, as the examples train; else float32.
    """

    model: str
    rows: int
    window: int
    steps: int
    vocabulary: int = 10_000
    warm_up: int = 0
    bf16: bool = True
    unit = "words"

    @property
    def items(self) -> int:
        return self.rows * self.window * self.steps

    def __str__(self) -> str:
        return f"{self.model}, {self.rows} x {self.window}"

    def network(self) -> nn.Module:
        return create_language_model(self.model, words(self.vocabulary))

    def trainer(
        self, folder: str, taught: bool, make: Callable[..., Trainer] = BornAgainLMTrainer, **changes: Any
    ) -> Trainer:
        settings = {"objective": "ban+l", "learning_rate": 1.0, "max_grad_norm": 0.25, "bf16": self.bf16}
        args = arguments(folder, self.warm_up + self.steps, self.rows, **{**settings, **changes})
        teacher = {"teacher": self.network()} if taught else {}
        windows = args.max_steps * args.gradient_accumulation_steps
        data = streams(self.vocabulary, self.rows, self.window, windows)
        return make(self.network(), args, train_dataset=data, data_collator=collate_windows, **teacher)

    def with_trainer(self, taught: bool = True, **changes: Any) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return run(self.trainer(folder, taught, **changes), Stopwatch(self.warm_up))

    def loop(self, taught: bool = True, compile_args: dict[str, Any] | None = None) -> Iterator[None]:
        data, where = streams(self.vocabulary, self.rows, self.window, self.warm_up + self.steps), device()
        student = self.network().to(where).train()
        teacher = self.network().to(where).eval().requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0, fused=is_fused())
        parameters, carries = list(student.parameters()), carries_state(student)
        student, teacher = as_called([student, teacher], compile_args)
        ours = theirs = None
        yield
        for window in range(data.windows):
            batch = data.__getitems__(range(window * data.streams, (window + 1) * data.streams))
            ids, labels = batch["input_ids"].to(where), batch["labels"].to(where).flatten()
            with torch.autocast(where.type, torch.bfloat16, enabled=self.bf16):
                output = student(ids, **({"state": ours} if carries else {}))
                if taught:
                    with torch.no_grad():
                        answer = teacher(ids, **({"state": theirs} if carries else {}))
            if carries:
                ours = tuple(kept(part.detach(), compile_args) for part in output.state)
                theirs = tuple(kept(part, compile_args) for part in answer.state) if taught else None
            logits = output.logits.flatten(0, 1).float()
            loss = F.cross_entropy(logits, labels, ignore_index=-100)
            if taught:
                loss = loss + F.cross_entropy(logits, answer.logits.flatten(0, 1).float().softmax(-1))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.25)
            optimizer.step()
            optimizer.zero_grad()
            yield

    def with_bare_loop(self, taught: bool = True, compile_args: dict[str, Any] | None = None) -> float:
        return seconds_of(self.loop(taught, compile_args), self.warm_up)
