"""The peers of text: a small GPT-2 taught by another of its size, each by the peer's own loop.

Everyone reads the same windows of words, tokenised beforehand, and distils every word but a window's first. By default
means: rows collated by the peer's or torch's collator, and the peer's own precision: float32, bfloat16 and gradient
checkpointing for TRL. At equal precision everyone gets ready batches and bfloat16 autocast, no checkpointing, no
clipping, and the teacher alone teaches at temperature 1, as far as the options of the peer allow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, default_data_collator

from born_again import BornAgainLMTrainer, BornAgainTrainingArguments
from born_again.data.text import word_tokenizer
from born_again.lineage.machine import has_fast_bf16, keep_freed_memory
from tests.benchmarks.peers_images import (
    DocumentedTrainer,
    soft_cross_entropy,
    train_with_a_box,
    train_with_textbrewer,
    trainer_settings,
)
from tests.benchmarks.peers_run import Attach, Logits, Run, Watch

WINDOW = 64
WORDS = 10_000
LEARNING_RATE = 0.1
CHECK_BATCH = 4


def networks(run: Run) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, the same in every child; without dropout, so that everyone does the same work."""
    none = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    size = {"n_positions": WINDOW, "n_embd": 128, "n_layer": 4, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    pair = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        # A larger spread than 0.02: two networks that both know nothing would leave nearly no gradient to compare.
        config = GPT2Config(vocab_size=WORDS, initializer_range=0.1, use_cache=False, **size, **none, **ends)
        pair.append(GPT2LMHeadModel(config).to(run.device))
    return tuple(pair)


def logits(network: nn.Module, words: Tensor) -> Tensor:
    """(items, words): of every position but the last, which has no next word to be compared at."""
    return network(input_ids=words).logits[:, :-1].flatten(0, 1)


class Windows(Dataset):
    """Rows of WINDOW words."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.windows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


class ReadyWindows(Windows):
    """The same, a batch at a time."""

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self[torch.as_tensor(indices)]


def pass_through(batch: Any) -> Any:
    return batch


def windows(run: Run) -> Tensor:
    return torch.from_numpy(np.load(run.folder / "windows.npy")[: run.items])


def loader(run: Run) -> DataLoader:
    """Batches as dictionaries."""
    if run.equal:
        return DataLoader(ReadyWindows(windows(run)), run.batch, shuffle=True, drop_last=True, collate_fn=pass_through)
    return DataLoader(Windows(windows(run)), run.batch, shuffle=True, drop_last=True)


class Pairs:
    """The batches of a loader as (words, words), for peers that expect inputs and targets."""

    def __init__(self, batches: DataLoader) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return ((batch["input_ids"], batch["labels"]) for batch in self.batches)


def sgd(network: nn.Module, watch: Watch) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    watch.attach(optimizer)
    return optimizer


def bare_loop(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    run.forbid_accumulation("a loop has what one writes")
    student.train()
    teacher.eval().requires_grad_(False)
    optimizer = sgd(student, watch)
    for words, _ in Pairs(loader(run)):
        words = words.to(run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            with torch.no_grad():
                teacher_logits = logits(teacher, words)
            student_logits = logits(student, words)
        loss = soft_cross_entropy(student_logits, teacher_logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def torchdistill(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """DistillationBox; its KDLoss takes softmax over dimension 1, so that logits must come as (items, words)."""
    student, teacher = Logits(run, student, logits), Logits(run, teacher, logits)
    train_with_a_box(run, student, teacher, watch, Windows(windows(run)), Targets(loader(run)))


class Targets(Pairs):
    """Labels as KDLoss takes them: the next word of each item."""

    def __iter__(self):
        return ((words, labels[:, 1:].flatten()) for words, labels in super().__iter__())


def kd_lib(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    raise NotImplementedError("no language models: its text half is BERT2LSTM, which classifies and wants torchtext")


def textbrewer(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    student, teacher = Logits(run, student, logits), Logits(run, teacher, logits)
    train_with_textbrewer(run, student, teacher, sgd(student, watch), Pairs(loader(run)))


def trl_gkd(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """GKDTrainer with lmbda 0, which trains on the given text; at its default half of the text would be generated.

    TRL's DistillationTrainer trains on generated text alone, so it has no place in this table.
    """
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = word_tokenizer(["<eos>", *(f"word{index}" for index in range(1, WORDS))])
    tokenizer.chat_template = "{{ messages }}"
    settings = trainer_settings(run)
    # bf16 and gradient checkpointing are its defaults.
    values = {"beta": 0.0, "bf16": run.bf16, "gradient_checkpointing": False} if run.plain else {}
    rows = {"input_ids": windows(run).tolist()}
    rows["attention_mask"] = [[1] * WINDOW] * run.items
    rows["labels"] = rows["input_ids"]
    trainer = GKDTrainer(
        student,
        teacher,
        GKDConfig(**{**settings, "learning_rate": LEARNING_RATE}, lmbda=0.0, **values),
        data_collator=pass_through if run.equal else default_data_collator,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[Attach(watch)],
    )
    if run.equal:
        trainer.train_dataset = ReadyWindows(windows(run))
    trainer.train()


class DocumentedLMTrainer(DocumentedTrainer):
    """The pattern, on the words that a model's own loss counts."""

    @staticmethod
    def rows(logits: Tensor) -> Tensor:
        return logits[:, :-1].flatten(0, 1)


def documented(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    rows = ReadyWindows(windows(run)) if run.equal else Windows(windows(run))
    settings = {**trainer_settings(run), "learning_rate": LEARNING_RATE}
    trainer = DocumentedLMTrainer(
        student,
        TrainingArguments(**settings, bf16=run.bf16, fp16=not run.plain and torch.cuda.is_available()),
        teacher=teacher,
        temperature=1.0 if run.plain else 5.0,
        weight=1.0 if run.plain else 0.5,
        train_dataset=rows,
        data_collator=pass_through if run.equal else default_data_collator,
        callbacks=[Attach(watch)],
    )
    trainer.teacher_in_autocast = run.bf16
    trainer.train()


def born_again(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """BornAgainLMTrainer as examples/run_ptb.py sets it up, taught by the teacher alone."""
    keep_freed_memory()
    settings = {**trainer_settings(run), "learning_rate": LEARNING_RATE}
    BornAgainLMTrainer(
        student,
        BornAgainTrainingArguments(**settings, bf16=has_fast_bf16() and not run.checked, logging_steps=200),
        teacher=teacher,
        train_dataset=ReadyWindows(windows(run)),
        data_collator=pass_through,
        callbacks=[Attach(watch)],
    ).train()


VARIANTS = {
    "bare loop": bare_loop,
    "torchdistill": torchdistill,
    "KD_Lib": kd_lib,
    "TextBrewer": textbrewer,
    "TRL GKD": trl_gkd,
    "HF docs pattern": documented,
    "born_again": born_again,
}
