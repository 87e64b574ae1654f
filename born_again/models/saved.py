"""Checks of a saved model's folder, which may come from someone else, before a library builds and loads the model."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

INDEX_NAME = "model.safetensors.index.json"
# Networks are built, and labels named, in loops over these: a wrong number would take hours.
_MOST = {"layer": 1000, "depth": 1000, "block": 1000, "expert": 10_000, "label": 1_000_000, "classes": 1_000_000}
# Up to this many elements a network that is too large does no harm, and its loader has the better error.
_HARMLESS = 1_000_000
_MAX_DEPTH = 32
_MAX_BYTES = 64 << 20


@contextlib.contextmanager
def loading(source: str) -> Iterator[None]:
    """A context manager that turns any error of a library about an invalid model folder into a ValueError.

    Args:
        source: folder or Hub repository to load in the block.

    Raises:
        ValueError: for any exception but an OSError; quotes it.
    """
    try:
        yield
    except OSError:
        raise
    # For an invalid config.json libraries can raise any exception.
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("path_or_repo"):
            raise
        raise ValueError(
            f"path_or_repo: {source!r} cannot be loaded, expected a config.json that describes a model and weights "
            f"that fit it; copy or download it again, or save it anew ({type(error).__name__}: {str(error)[:1000]})"
        ) from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a folder.

    Raises:
        ValueError: it is no JSON object.
        OSError: it cannot be read.
    """
    path = folder / "config.json"
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(
            f"path_or_repo: {path} has {path.stat().st_size:,} bytes, expected a config.json; restore it."
        )
    try:
        settings = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path_or_repo: {path} is not JSON ({error}); copy or download it again.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"path_or_repo: {path} holds a {type(settings).__name__}, expected an object; copy or download it again."
        )
    return settings


def check_settings(settings: Mapping[str, Any], source: str) -> None:
    """Refuses settings that would take hours or run code of another repository.

    Args:
        settings: the content of config.json.
        source: folder or repository, for error messages.

    Raises:
        ValueError: names the field.
    """
    pending: list[tuple[str, Any, int]] = [(name, value, 1) for name, value in settings.items()]
    while pending:
        name, value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"path_or_repo: config.json of {source!r} has {_short(name)} deeper than {_MAX_DEPTH}.")
        if isinstance(value, dict):
            pending.extend((f"{name}.{key}", item, depth + 1) for key, item in value.items())
        elif isinstance(value, list):
            pending.extend((f"{name}[{place}]", item, depth + 1) for place, item in enumerate(value))
        last = name.rpartition(".")[2]
        if isinstance(value, int):
            most = min((limit for word, limit in _MOST.items() if word in last), default=None)
            if most is not None and value > most:
                raise ValueError(
                    f"path_or_repo: config.json of {source!r} has {_short(name)} = {_short(value)}, expected at most "
                    f"{most}; correct it."
                )
        elif isinstance(value, str) and "/" in value and "_implementation" in last:
            raise ValueError(
                f"path_or_repo: config.json of {source!r} has {_short(name)} = {_short(value)}, which would run code "
                "from another repository, expected none; take it out."
            )


def check_index(folder: Path) -> None:
    """Checks that an index of sharded weights names existing safetensors files of its own folder.

    Raises:
        ValueError: the index is invalid, or names other files.
        FileNotFoundError: a file is missing.
    """
    path = folder / INDEX_NAME
    if not path.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        names = json.loads(path.read_bytes().decode("utf-8"))["weight_map"].values()
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"path_or_repo: {path} is no index of weights ({error}); copy or download it again."
        ) from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(
                f"path_or_repo: {path} names {_short(name)}, expected safetensors files beside it; nothing else is "
                "ever loaded."
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"path_or_repo: {path} names {name}, which is missing; copy or download it.")


def check_size(build: Callable[[], nn.Module], folder: Path) -> None:
    """Refuses a config.json of a network far larger than the weights beside it, before memory is allocated.

    Args:
        build: makes the network that config.json describes; called on the meta device.
        folder: with its weights.

    Raises:
        ValueError: more than twice as many parameters as are stored (tied ones may be stored once).
    """
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        index = json.loads((folder / INDEX_NAME).read_bytes().decode("utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    stored = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            stored += sum(_product(weights.get_slice(name).get_shape()) for name in weights.keys())
    try:
        with torch.device("meta"):
            network = build()
    except (
        RuntimeError,
        NotImplementedError,
    ):  # some networks compute while they are built
        return
    described = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if described > 2 * stored + _HARMLESS:
        raise ValueError(
            f"path_or_repo: config.json of {str(folder)!r} describes {described:,} weights, expected no more than the "
            f"{stored:,} that are stored beside it; copy or download it again."
        )


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
