"""A fingerprint of any dataset that Trainer takes: the same for the same rows, in any process and on any machine.

The fingerprint that a dataset of the `datasets` library has itself does not serve: it has the time in it at which a
cache file was written, and is drawn at random after a map with a function that cannot be hashed.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

# Of a dataset of the `datasets` library all rows are hashed up to so many bytes; of a larger one as many, evenly
# spaced, but no fewer rows than MIN_ROWS. Of another dataset, whose rows are made when they are asked for, MAX_ITEMS.
MAX_BYTES = 1 << 30
MIN_ROWS = 10_000
MAX_ITEMS = 1_000
_BATCH = 500
_PROBE = 100
_TRANSFORMED = 4  # rows, of which what a transform makes is hashed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, what is drawn from torch, numpy and Python begins at a seed; afterwards their states are back."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def dataset_sha256(name: str, dataset: Any) -> str:
    """Hashes the rows of a dataset, up to a bound.

    Of a dataset of the `datasets` library its rows as they are stored, before set_transform: up to `MAX_BYTES`, and of
    a larger one that much of evenly spaced rows. Files that images are in are hashed by their content. Of any other
    dataset `MAX_ITEMS` evenly spaced rows as it returns them, at a fixed seed. The number of rows is hashed too.

    Args:
        name: of the argument, for messages.
        dataset: with a length and rows by index.

    Returns:
        A SHA-256, hexadecimal.

    Raises:
        ValueError: a stream, or rows that hold what cannot be hashed, or that are drawn at random in another way.
    """
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise _refusal(name, f"{type(dataset).__name__}, a stream, whose rows cannot be looked at beforehand")
    digest = hashlib.sha256(f"rows {len(dataset)}\n".encode())
    if hasattr(dataset, "cache_fingerprint"):  # born_again.data's own
        digest.update(str(dataset.cache_fingerprint).encode())
        return digest.hexdigest()
    library = sys.modules.get("datasets")  # imported by whoever made one of its datasets
    if library is not None and isinstance(dataset, library.Dataset):
        _hash_table(digest, dataset)
        return digest.hexdigest()
    indices = _evenly_spaced(len(dataset), MAX_ITEMS)
    with seeded(0):
        for index in indices:
            hash_value(digest, dataset[index], name)
    again = hashlib.sha256()
    first = hashlib.sha256()
    for into in (first, again):
        with seeded(0):
            for index in indices[:2]:
                hash_value(into, dataset[index], name)
    if first.digest() != again.digest():
        raise _refusal(
            name, f"{type(dataset).__name__}, whose rows differ from one reading to the next at the same seed"
        )
    return digest.hexdigest()


def transformed_sha256(dataset: Any) -> str | None:
    """Hashes what a transform makes of a few rows when they are read, at a fixed seed.

    Of floats moments with three digits, since a last bit may be another one on another machine.

    Args:
        dataset: of the `datasets` library with set_transform or with_transform, or of born_again with a transform.

    Returns:
        A SHA-256, hexadecimal; None without a transform, or where what it makes is not the same again or cannot be
        hashed.
    """
    library = sys.modules.get("datasets")
    is_set = library is not None and isinstance(dataset, library.Dataset) and dataset.format["type"] == "custom"
    if not is_set and not callable(getattr(dataset, "transform", None)):
        return None
    dataset = copy.copy(dataset)
    if hasattr(dataset, "set_seed"):
        dataset.set_seed(0)
    found = set()
    for _ in range(2):
        digest = hashlib.sha256()
        with seeded(0):
            try:
                for index in _evenly_spaced(len(dataset), _TRANSFORMED):
                    hash_value(digest, _with_moments(dataset[index]), "dataset")
            except ValueError:
                return None
        found.add(digest.hexdigest())
    return found.pop() if len(found) == 1 else None


def _with_moments(value: Any) -> Any:
    """A row, with a few numbers in place of each array of floats."""
    if isinstance(value, Mapping):
        return {name: _with_moments(own) for name, own in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or not value.size:
        return value
    flat = value.astype(np.float64).ravel()
    place = np.linspace(-1.0, 1.0, len(flat))
    scale = float(np.sqrt(np.mean(flat**2)))
    shares = [float(np.mean(flat)) / (scale or 1.0), float(np.mean(flat * place)) / (scale or 1.0)]
    return {"shape": list(value.shape), "scale": f"{scale:.3g}", "shares": [round(share, 3) + 0.0 for share in shares]}


def _refusal(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name}: got {what}, so that it cannot be told whether a lineage goes on with the data that it was begun "
        "with; give data_fingerprint='...', a text of your own that is another one for other data."
    )


def _evenly_spaced(rows: int, most: int) -> list[int]:
    count = min(rows, most)
    return [index * rows // count for index in range(count)]


# ---- Datasets of the library ----


def _hash_table(digest: Any, dataset: Any) -> None:
    stored = dataset.with_format("arrow")
    digest.update(str(sorted(zip(stored.column_names, map(str, stored.features.values()), strict=True))).encode())
    rows = len(stored)
    if not rows:
        return
    probe = stored.select(_evenly_spaced(rows, _PROBE))[:]
    most = max(MIN_ROWS, MAX_BYTES * probe.num_rows // max(_size(probe), 1))
    if most < rows:
        stored = stored.select(_evenly_spaced(rows, most))
    for start in range(0, len(stored), _BATCH):
        table = stored[start : start + _BATCH]
        for column in sorted(table.column_names):
            values = table.column(column)
            files = _files_of(values)
            if files is None:
                _hash_column(digest, values)
            else:
                for path in files:
                    _hash_file(digest, path)


def _size(table: Any) -> int:
    files = [path for name in table.column_names for path in _files_of(table.column(name)) or ()]
    return table.nbytes + sum(os.path.getsize(path) for path in files if os.path.isfile(path))


def _files_of(values: Any) -> list[str] | None:
    """The paths in a column of images or sounds that are stored in files of their own; None of any other column."""
    import pyarrow as pa

    kind = values.type
    if not (pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}):
        return None
    read = values.combine_chunks()
    if read.field("bytes").null_count < len(read):
        return None
    return [path or "" for path in read.field("path").to_pylist()]


def _hash_column(digest: Any, values: Any) -> None:
    import pyarrow as pa

    # As a table of its own, copied: slices of larger buffers, and chunks, would be written as they happen to lie.
    rows = values.take(pa.array(range(len(values))))
    combined = rows.combine_chunks() if isinstance(rows, pa.ChunkedArray) else rows
    batch = pa.record_batch([combined], names=["values"])
    digest.update(batch.serialize())


def _hash_file(digest: Any, path: str) -> None:
    try:
        digest.update(Path(path).read_bytes())
    except OSError:
        digest.update(os.path.basename(path).encode())  # of an archive on the Hub, or a machine that is elsewhere


# ---- Rows of any other dataset ----


def hash_value(digest: Any, value: Any, name: str) -> None:
    """Adds what a row holds to a digest.

    Args:
        digest: of hashlib.
        value: a row, or what is in it: tensors, arrays, images, numbers, texts, and mappings and sequences of them.
        name: of the argument that it is from, for the message.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        value = value.numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = np.ascontiguousarray(value)
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            hash_value(digest, value[key], name)
    elif isinstance(value, str | bytes | int | float | bool | None):
        digest.update(repr(value).encode())
    elif isinstance(value, Sequence):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            hash_value(digest, item, name)
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # of Pillow
        digest.update(f"{getattr(value, 'mode', '')}{value.size}".encode() + value.tobytes())
    else:
        raise _refusal(name, f"rows with a {type(value).__name__}")
