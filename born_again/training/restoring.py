"""Weights of a checkpoint put back into the network that wrote it, whatever names save_pretrained gave them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

_NAMED = 3  # in an error


def complete_weights(student: nn.Module, folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Restores what loading by name has left as it was.

    Args:
        student: to which the files of the folder were loaded by the names in them.
        folder: the checkpoint.
        missing: names of the student's that the files lack.
        unexpected: names in the files that the student lacks.

    Raises:
        ValueError: some weights are in one of the two alone, by the conversion of from_pretrained too.
    """
    missing = list(missing)
    lacking, others = lacking_weights(student, missing), sorted(unexpected)
    if not {*missing}.isdisjoint(getattr(student, "_keys_to_ignore_on_save", None) or ()):
        cast(Any, student).tie_weights()
    if not lacking and not others:
        return
    if isinstance(student, PreTrainedModel):
        result = student.load_state_dict(converted_weights(student, folder), strict=False)
        lacking, others = lacking_weights(student, result.missing_keys), sorted(result.unexpected_keys)
    refuse_difference(student, folder, lacking, others)


def refuse_difference(student: nn.Module, folder: Path, lacking: Sequence[str], others: Sequence[str]) -> None:
    """Refuses a checkpoint of another network.

    Args:
        student: what is restored.
        folder: the checkpoint.
        lacking: names that it lacks.
        others: names that it has and the student has not.

    Raises:
        ValueError: there are any.
    """
    found = [f"lack {_some(lacking)} of {type(student).__name__}"] if lacking else []
    found += [f"have {_some(others)} beside those of {type(student).__name__}"] if others else []
    if found:
        raise ValueError(
            f"{folder}: its weights {' and '.join(found)}; expected those of the network that is trained, as it was "
            "when it was saved. Resume with that network, or begin in another folder."
        )


def lacking_weights(student: nn.Module, missing: Iterable[str]) -> list[str]:
    """Of names that files lack those that had to be in them: of tied weights one is saved."""
    state, names = student.state_dict(), set(missing)
    present = {_place(value) for name, value in state.items() if name not in names}
    unsaved = set(getattr(student, "_keys_to_ignore_on_save", None) or ())
    needed = {name: value for name, value in state.items() if name in names - unsaved and value.numel()}
    return sorted(name for name, value in needed.items() if _place(value) not in present)


def converted_weights(student: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The weights that save_pretrained wrote, by the names that the student has now, as from_pretrained reads them.

    Args:
        student: of the class that wrote them.
        folder: with config.json and the weights.

    Raises:
        ValueError: the files lack some, or have others beside them.
    """
    kind = type(student).__bases__[-1] if isinstance(student, FSDPModule) else type(student)
    # One precision for all of them: the widest, from which each goes back to its own unchanged.
    widest = torch.float64 if any(value.dtype == torch.float64 for value in student.parameters()) else torch.float32
    with torch.random.fork_rng([]):
        network, found = cast(Any, kind).from_pretrained(
            folder, config=copy.deepcopy(student.config), dtype=widest, output_loading_info=True
        )
    refuse_difference(
        student, folder, lacking_weights(network, found["missing_keys"]), sorted(found["unexpected_keys"])
    )
    return network.state_dict()


def _place(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.device


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} others" if len(names) > _NAMED else "")
