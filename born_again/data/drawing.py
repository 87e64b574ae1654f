"""Data collators and datasets that draw random numbers, such as masks, made functions of seed, epoch and rows.

A DataLoader is a batch or more ahead of the step, so what is drawn from the global generators for a batch that is read
and not yet trained on is lost with a training that is killed, and workers draw from generators of their own.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from born_again.data.fingerprint import hash_value, seeded

logger = logging.getLogger(__name__)


def seed_draws(dataset: Any, collate: Callable[..., Any], rows: Any) -> tuple[Any, Callable[..., Any]]:
    """Wraps what of a training's data draws random numbers.

    Found out by reading: a collator that draws for few batches only may not be. A dataset with set_epoch is left as it
    is. What draws from a generator of its own cannot be seeded from outside: a warning names it.

    Args:
        dataset: as Trainer takes it.
        collate: the data collator.
        rows: as the collator is given them.

    Returns:
        The dataset, or `SeededRows` of it; the collator, or a `SeededCollator` of it.
    """
    is_map = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not hasattr(dataset, "set_epoch")
    if is_map and len(dataset) and _can_be_seeded("train_dataset", dataset, lambda: dataset[0]):
        dataset = SeededRows(dataset)
    if _can_be_seeded("data_collator", collate, lambda: collate(copy.deepcopy(rows)), rows):
        collate = SeededCollator(collate)
    return dataset, collate


def _can_be_seeded(name: str, what: Any, read: Callable[[], Any], rows: Any = None) -> bool:
    before = _states()
    read()
    draws, can_be_hashed, repeats = _states() != before, True, True
    digests = hashlib.sha256(), hashlib.sha256()
    try:
        hash_value(hashlib.sha256(), rows, name)
        for digest in digests:
            with seeded(0):
                hash_value(digest, read(), name)
        repeats = digests[0].digest() == digests[1].digest()
    except ValueError:
        can_be_hashed = False
    if draws and can_be_hashed and repeats:
        return True
    if draws or not repeats:
        reason = "for rows that cannot be told apart" if repeats else "from a generator of its own"
        logger.warning(
            "%s: %s draws random numbers %s, so a training that is resumed in the middle of an epoch draws others "
            "than one without a break; have it draw from the generators of torch, numpy or random (no seed of its "
            "own), for rows of tensors, arrays, numbers and texts, and they are seeded by seed, epoch and rows.",
            name,
            getattr(what, "__name__", type(what).__name__),
            reason,
        )
    return False


def _states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), rest, torch.get_rng_state().numpy().tobytes()


class _Drawing:
    def __init__(self) -> None:
        self.seed = 0
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see the next epoch too

    def set_seed(self, seed: int) -> None:
        """Begins a training of its own."""
        self.seed = seed
        self._epoch.zero_()

    def set_epoch(self, epoch: int) -> None:
        """Draws anew."""
        self._epoch.fill_(epoch)

    def _digest(self) -> Any:
        return hashlib.sha256(f"{self.seed} {int(self._epoch)} ".encode())


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:4], "big")


class SeededCollator(_Drawing):
    """A data collator whose draws are a function of seed, epoch and the rows of the batch.

    The global generators are left as they were.

    Args:
        collate: draws from the global generators of Python, numpy or torch.

    Attributes:
        for_evaluation: the collator itself, which evaluations call.
    """

    def __init__(self, collate: Callable[..., Any]) -> None:
        super().__init__()
        self.for_evaluation = collate

    def __call__(self, rows: Any) -> Any:
        """The batch of some rows."""
        digest = self._digest()
        hash_value(digest, rows, "train_dataset")
        with seeded(_number(digest)):
            return self.for_evaluation(rows)


class SeededRows(_Drawing, Dataset):
    """A map-style dataset whose draws for a row are a function of seed, epoch and the row's index.

    The global generators are left as they were. Rows are read one by one; other attributes are the dataset's.

    Args:
        dataset: draws from the global generators of Python, numpy or torch when a row is read.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        digest = self._digest()
        digest.update(str(int(index)).encode())
        with seeded(_number(digest)):
            return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # the DataLoader would read whole batches past this class
            raise AttributeError(name)
        return getattr(self.dataset, name)


class CollatorEpochs(TrainerCallback):
    """Sets the epoch of a data collator when an epoch begins, as `EpochCallback` does that of a dataset.

    Args:
        collate: with set_epoch.
    """

    def __init__(self, collate: SeededCollator) -> None:
        self.collate = collate

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In every process, before the first batch of the epoch."""
        self.collate.set_epoch(int(state.epoch or 0))
