"""Trainings of images and of text that are over in a moment, with and without a teacher cache."""

from __future__ import annotations

import pytest
import torch
from helpers import arguments
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.data.streams import TokenStreams, collate_windows
from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM

CLASSES, WORDS, STREAMS, WINDOW = 3, 17, 4, 5
STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class FewViews(ImageDataset):
    """Four views of a sample instead of 162, so that they come again soon."""

    count = 4

    def views(self, samples):
        return super().views(samples) % self.count


class TwoViews(FewViews):
    count = 2


def images(rows: int = 50, seed: int = 3, mean=STATISTICS[0], kind=FewViews, augment: bool = True) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (rows, 9, 9, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return kind(ImageSplit(pixels, labels), mean, STATISTICS[1], augment=augment, flip=True, seed=seed)


class Convolutions(nn.Module):
    """A classifier with BatchNorm that counts the images it has answered.

    Args:
        seed: of its weights.
        habit: a fault that libraries have in the last bits, made large: "size" gives other logits in small batches,
            "some" there to about a third of the images, "layer" another output of a layer that the logits do not show,
            "place" other logits in the first rows of a batch.
    """

    def __init__(self, seed: int, habit: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.out = nn.Linear(8, CLASSES)
        self.habit = habit
        self.layer = nn.Identity()
        self.answered: list[int] = []

    def forward(self, pixel_values):
        self.answered.append(len(pixel_values))
        logits = self.out(self.body(pixel_values).mean((2, 3)))
        if self.habit == "size" and len(logits) < 5:
            logits = logits + 0.1
        if self.habit == "some" and len(logits) < 5:
            logits = logits + 0.1 * (logits.argmax(-1, keepdim=True) == 1)
        if self.habit == "layer":
            self.layer(logits + (0.1 if len(logits) < 5 else 0))
        if self.habit == "place":
            logits = logits + torch.linspace(0.1, 0, len(logits))[:, None].to(logits)
        return logits


def image_trainer(folder, teacher=None, dataset=None, callbacks=(), **changes) -> BornAgainTrainer:
    settings = {"per_device_train_batch_size": 10, "max_steps": -1, "num_train_epochs": 8, "logging_steps": 5}
    settings |= {"remove_unused_columns": False, "learning_rate": 0.1}
    return BornAgainTrainer(
        Convolutions(1),
        arguments(folder, **{**settings, **changes}),
        teacher=Convolutions(2) if teacher is None else teacher,
        train_dataset=images() if dataset is None else dataset,
        data_collator=collate_batch,
        callbacks=[EpochCallback(), *callbacks],
    )


def lstm(seed: int, units: int = 8) -> LstmLMForCausalLM:
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=WORDS, hidden_size=units))


def gpt2(seed: int, units: int = 8) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "n_positions": WINDOW, "n_embd": units, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def text(streams: int = STREAMS, seed: int = 3) -> TokenStreams:
    # 9 windows, the last of 3 steps, of which one stream lacks 2.
    tokens = torch.randint(0, WORDS, (STREAMS * (8 * WINDOW + 3) - 2,), generator=torch.Generator().manual_seed(seed))
    return TokenStreams(tokens, streams, WINDOW, before=0)


def text_trainer(folder, student, teacher, dataset=None, callbacks=(), **changes) -> BornAgainLMTrainer:
    settings = {"per_device_train_batch_size": STREAMS, "per_device_eval_batch_size": STREAMS, "logging_steps": 3}
    settings |= {"max_steps": -1, "num_train_epochs": 3, "remove_unused_columns": False, "max_grad_norm": 0.25}
    return BornAgainLMTrainer(
        student,
        arguments(folder, **{**settings, "objective": "ban+l", **changes}),
        teacher=teacher,
        train_dataset=text() if dataset is None else dataset,
        eval_dataset=text(seed=5),
        data_collator=collate_windows,
        callbacks=list(callbacks),
    )


def named(settings: dict[str, dict]) -> list:
    """Names of settings to test with; those that start processes or a compiler are slow."""
    slow = [name for name in settings if "workers" in name or "compiled" in name]
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in settings]


def weights(trainer) -> torch.Tensor:
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return torch.cat([value.detach().flatten().float() for value in state.values()])


def hits(trainer) -> list[float]:
    return [
        entry["teacher_cache_hit_rate"] for entry in trainer.state.log_history if "teacher_cache_hit_rate" in entry
    ]
