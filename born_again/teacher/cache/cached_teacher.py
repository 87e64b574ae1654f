"""A `FrozenTeacher` with a cache of its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from born_again.teacher import FrozenTeacher
from born_again.teacher.cache.outputs import CachedOutputs
from born_again.teacher.inputs import NetworkInputs

# (B,) int64 of numpy: a tensor would be moved to the device, and reading it there would make the host wait.
VIEW_KEYS = "view_keys"


def has_view_keys(dataset: Any) -> bool:
    """Whether a dataset can put cache keys into its batches."""
    return all(hasattr(dataset, name) for name in ("emit_view_keys", "view_count", "cache_fingerprint"))


def without_view_keys(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch as networks are called with it."""
    return {name: value for name, value in inputs.items() if name != VIEW_KEYS} if VIEW_KEYS in inputs else inputs


@contextmanager
def emitting_view_keys(dataset: Any) -> Iterator[None]:
    """Inside, the dataset's batches have cache keys; those of DataLoaders made inside, where they have workers."""
    before = dataset.emit_view_keys
    dataset.emit_view_keys = True
    try:
        yield
    finally:
        dataset.emit_view_keys = before


class CachedTeacher:
    """A drop-in for its `FrozenTeacher` that reads outputs from a cache where they are there.

    A batch without cache keys goes through the teacher, and its outputs are not cached.

    Args:
        frozen: the teacher.
        outputs: the cache.
        batch_rows: rows of a full training batch of this process.

    Attributes:
        frozen: as given.
        modules: its networks.
        carries_state: whether each carries a state.
    """

    def __init__(self, frozen: FrozenTeacher, outputs: CachedOutputs, batch_rows: int) -> None:
        self.frozen = frozen
        self.outputs = outputs
        self.batch_rows = batch_rows
        self._hits, self._lookups = 0, 0

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
        return self.forward_with_states(inputs, [None] * len(self.modules))[0]

    def forward_with_states(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """As that of `FrozenTeacher`; `inputs` may have a column of cache keys."""
        raise NotImplementedError

    def pop_hit_counts(self) -> tuple[int, int]:
        """Cache hits and lookups since the last call, in rows."""
        counted, self._hits, self._lookups = (self._hits, self._lookups), 0, 0
        return counted

    def close(self) -> None:
        """Closes files; the next lookup opens them again."""
        self.outputs.close()

    def _count(self, found: np.ndarray) -> None:
        self._hits += int(found.sum())
        self._lookups += len(found)


def keys_of(inputs: Mapping[str, Any]) -> tuple[np.ndarray | None, Mapping[str, Any]]:
    """The cache keys of a batch (rows,) int64, None where it has none, and the batch without them."""
    keys = inputs.get(VIEW_KEYS)
    if keys is None:
        return None, inputs
    keys = keys.cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    return keys, without_view_keys(inputs)
