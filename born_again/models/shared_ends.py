"""Students whose first convolution and classifier are their teacher's, frozen (arXiv 1805.04770, table 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["check_shared_ends", "share_ends"]

_ENDS = {"first_conv": "first convolution", "classifier": "classifier"}


def check_shared_ends(student: nn.Module, teacher: nn.Module) -> None:
    """Checks that a student can have its teacher's first convolution and classifier.

    Args:
        student: timm network, or image classifier around one, on any device.
        teacher: Likewise; neither is changed.

    Raises:
        ValueError: If one of the two layers has another shape, or is not known.
    """
    _pairs(student, teacher)


@torch.no_grad()
def share_ends(student: nn.Module, teacher: nn.Module) -> None:
    """Copies the teacher's first convolution and classifier into the student, and freezes them there.

    They get no gradients, so no optimizer changes them. The layers between, BatchNorm included, train as before.

    Args:
        student: timm network, or image classifier around one, changed in place.
        teacher: Likewise, of any architecture whose two layers have the student's shapes.

    Raises:
        ValueError: If one of the two layers has another shape, or is not known.
    """
    for own, theirs in _pairs(student, teacher):
        own.load_state_dict(theirs.state_dict())
        own.requires_grad_(False)


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    pairs = []
    for end, what in _ENDS.items():
        own, theirs = _layer(student, end, what), _layer(teacher, end, what)
        shapes, expected = ({key: tuple(t.shape) for key, t in layer.state_dict().items()} for layer in (own, theirs))
        if shapes != expected:
            raise ValueError(
                f"share_teacher_ends: the {what} of {_architecture(student)} has {_shown(shapes)}, that of its "
                f"teacher {_architecture(teacher)} {_shown(expected)}, expected the same, since it is the teacher's; "
                "choose a student of that width (its arguments are --student_model_args), or leave share_teacher_ends "
                "out."
            )
        pairs.append((own, theirs))
    return pairs


def _layer(model: nn.Module, end: str, what: str) -> nn.Module:
    network = _network(model)
    name = network.pretrained_cfg.get(end)
    try:
        return network.get_submodule(name)
    except (AttributeError, TypeError) as error:  # some networks have two of them
        raise ValueError(
            f"share_teacher_ends: {_architecture(model)} has {name!r} as its {what}, expected one layer; leave "
            "share_teacher_ends out, or choose a network that has one."
        ) from error


def _network(model: nn.Module) -> Any:
    """The timm network of an image classifier around one."""
    return getattr(model, "timm_model", model)


def _architecture(model: nn.Module) -> str:
    return _network(model).pretrained_cfg["architecture"]


def _shown(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {' x '.join(map(str, shape))}" for key, shape in shapes.items())
