"""How a batch says which samples and views it holds, to whoever keeps what was computed from them.

A training set that can be asked for keys has

- `emit_view_keys`, False until someone sets it: whether its batches have the column "view_keys";
- `view_count`: how many keys there are, from 0 on. One key always stands for the same inputs;
- `cache_fingerprint`: a text that is another one where any key stands for other inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
