"""What a lineage was begun with beside arguments and stored rows, so that a change of it does not go unseen."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from born_again.data.fingerprint import transformed_sha256
from born_again.lineage.machine import installed_versions
from born_again.lineage.manifest import LineageError

logger = logging.getLogger(__name__)

# Libraries that decide how a network prints itself, which weights it has, and the pixels of a transform.
_PACKAGES = ("born-again", "torch", "torchvision", "transformers", "timm", "datasets", "pillow", "peft")
_WHAT = {
    "starting_weights": "the pretrained weights that model_init loads",
    "modules": "the modules of the network (dropout and other arguments that its configuration does not keep)",
    "transforms": "what the transforms of the datasets make of a row",
}


def begun_with(
    network: nn.Module, starting_weights: Iterable[bytes], splits: Mapping[str, Any] | None, objective: Any
) -> dict[str, Any]:
    """A record for lineage.json, JSON-able.

    Args:
        network: as model_init made it.
        starting_weights: hashes of the weights that are the same at each call of it.
        splits: datasets by split; None where their transforms are not to be compared.
        objective: a function in place of one that has a name, or None.
    """
    own = getattr(network, "_orig_mod", network)
    printed = re.sub(r" at 0x[0-9a-f]+", "", f"{own!r} {_numbers_of(own)}")
    transforms = {name: transformed_sha256(dataset) for name, dataset in (splits or {}).items()}
    weights = b"".join(sorted(starting_weights))
    found = {
        "starting_weights": hashlib.sha256(weights).hexdigest() if weights else None,
        "modules": hashlib.sha256(printed.encode()).hexdigest(),
        "transforms": {name: digest for name, digest in transforms.items() if digest is not None},
        "objective": code_sha256(objective),
    }
    return {name: value for name, value in found.items() if value} | {"versions": installed_versions(_PACKAGES)}


def _numbers_of(network: nn.Module) -> list[tuple[str, str, float]]:
    """Settings that modules keep as plain numbers and do not print, such as drop_rate of timm."""
    return [
        (place, name, float(value))
        for place, module in network.named_modules()
        for name, value in sorted(vars(module).items())
        if (isinstance(value, float) or ("drop" in name and isinstance(value, int))) and not name.startswith("_")
    ]


def check_begun_with(here: Mapping[str, Any], there: Mapping[str, Any] | None, folder: Path) -> None:
    """Compares the records of a call and of the lineage that it goes on with.

    Args:
        here: see `begun_with`.
        there: likewise; None of a lineage that has none, which goes on.
        folder: of the lineage.

    Raises:
        LineageError: something changed. With other versions of the libraries, which may be the reason, it is a
            warning, as another body of the objective's function is.
    """
    if there is None:
        return
    changed = [what for name, what in _WHAT.items() if name in here and name in there and here[name] != there[name]]
    if changed:
        same = here["versions"] == there.get("versions")
        message = (
            f"output_dir: not the same as where the lineage in {folder} was begun: {'; '.join(changed)}. "
            + ("G" if same else "Other versions of the libraries may be the reason; if they are not, g")
            + "ive the same to continue it, or another output_dir."
        )
        if same:
            raise LineageError(message)
        logger.warning("%s", message)
    if here.get("objective") != there.get("objective") and {"objective"} <= here.keys() & there.keys():
        logger.warning(
            "objective: the function has another body than where the lineage in %s was begun, so its generations may "
            "be taught by different losses; give another output_dir if that is not meant.",
            folder,
        )


def code_sha256(function: Any) -> str | None:
    """A hash of what a Python function does, for the same version of Python; None where there is no code to read."""
    while isinstance(function, functools.partial):
        function = function.func
    if function is None:
        return None
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__"):
        function = type(function).__call__  # of an instance that is called
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    parts = list(_parts_of(code))
    for cell in getattr(function, "__closure__", None) or ():
        if isinstance(cell.cell_contents, int | float | str | bool | None):
            parts.append(repr(cell.cell_contents))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _parts_of(code: types.CodeType) -> Iterable[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _parts_of(value)
        else:
            yield repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
