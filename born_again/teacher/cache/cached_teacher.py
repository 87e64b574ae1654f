"""A `FrozenTeacher` that remembers its answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from born_again.teacher import FrozenTeacher
from born_again.teacher.cache.outputs import KeptAnswers
from born_again.teacher.inputs import NetworkInputs

# (B,) int64 of numpy: a tensor would be moved to the device, and whoever reads it there makes the host wait.
VIEW_KEYS = "view_keys"


def has_view_keys(dataset: Any) -> bool:
    """Whether a dataset can put keys into its batches."""
    return all(hasattr(dataset, name) for name in ("emit_view_keys", "view_count", "cache_fingerprint"))


def without_view_keys(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch as networks are called with it."""
    return {name: value for name, value in inputs.items() if name != VIEW_KEYS} if VIEW_KEYS in inputs else inputs


@contextmanager
def emitting_view_keys(dataset: Any) -> Iterator[None]:
    """Inside, the dataset's batches have keys; those of DataLoaders made inside, where they have workers."""
    before = dataset.emit_view_keys
    dataset.emit_view_keys = True
    try:
        yield
    finally:
        dataset.emit_view_keys = before


class CachedTeacher:
    """Answers as the teacher that it stands for, from what is kept where it can.

    A batch without keys is answered by the teacher, and nothing of it is kept.

    Args:
        frozen: the teacher.
        answers: where its answers are kept.
        batch_rows: rows of a full training batch of this process.

    Attributes:
        frozen: as given.
        modules: its networks.
        carries_state: whether each carries a state.
    """

    def __init__(self, frozen: FrozenTeacher, answers: KeptAnswers, batch_rows: int) -> None:
        self.frozen = frozen
        self.answers = answers
        self.batch_rows = batch_rows
        self._hits, self._asked = 0, 0

    @property
    def modules(self) -> list[nn.Module]:
        return self.frozen.modules

    @property
    def inputs(self) -> list[NetworkInputs]:
        return self.frozen.inputs

    @property
    def precision(self) -> str:
        return self.frozen.precision

    @property
    def carries_state(self) -> list[bool]:
        return self.frozen.carries_state

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """As that of `FrozenTeacher`."""
        return self.read_on(inputs, [None] * len(self.modules))[0]

    def read_on(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """As that of `FrozenTeacher`; `inputs` may have a column of keys."""
        raise NotImplementedError

    def take_hits(self) -> tuple[int, int]:
        """How many answers came from what is kept since the last call, and how many were asked for."""
        counted, self._hits, self._asked = (self._hits, self._asked), 0, 0
        return counted

    def close(self) -> None:
        """Closes files; the next question opens them again."""
        self.answers.close()

    def _count(self, found: np.ndarray) -> None:
        self._hits += int(found.sum())
        self._asked += len(found)


def keys_of(inputs: Mapping[str, Any]) -> tuple[np.ndarray | None, Mapping[str, Any]]:
    """The keys of a batch (rows,) int64, None where it has none, and the batch without them."""
    keys = inputs.get(VIEW_KEYS)
    if keys is None:
        return None, inputs
    keys = keys.cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    return keys, without_view_keys(inputs)
