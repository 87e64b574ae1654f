"""Notices a training that has gone wrong, without waiting for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_REMEDY = "Lower learning_rate, clip with max_grad_norm, or train without fp16."


class DivergenceGuard:
    """Remembers, on the device, the first step whose loss was not finite; says so when it is asked.

    Asking reads a number from the device. Ask where the host waits for it anyway, and before weights are saved.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Takes note of the loss of a step.

        Args:
            loss: scalar, on any device.
            step: counted from 1.
        """
        steps = torch.full((), step, device=loss.device)
        bad = steps.where(~loss.isfinite(), torch.iinfo(steps.dtype).max)
        self._first_bad = bad if self._first_bad is None else self._first_bad.minimum(bad)

    def check_loss(self, steps: int) -> None:
        """Looks at the losses seen since the last check.

        Args:
            steps: of the whole training, for the message.

        Raises:
            FloatingPointError: a loss was NaN or infinite; names its step.
        """
        if self._first_bad is None:
            return
        bad, self._first_bad = self._first_bad.item(), None
        if bad <= steps:
            raise FloatingPointError(
                f"loss: not finite at step {bad} of {steps}; training stops, and checkpoints saved before are kept. "
                + _REMEDY
            )

    def check_weights(self, model: nn.Module, step: int, steps: int) -> None:
        """Looks at the trained weights, which an infinite gradient of a finite loss can have ruined.

        Frozen ones may hold an infinity on purpose, such as a mask.

        Raises:
            FloatingPointError: a weight is NaN or infinite; names `step` of `steps`.
        """
        found: dict[torch.device, list[Tensor]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.is_meta:
                found.setdefault(parameter.device, []).append(parameter.isfinite().all())
        if not all(torch.stack(finite).all() for finite in found.values()):
            raise FloatingPointError(
                f"weights: not finite after step {step} of {steps}; training stops, and checkpoints saved before are "
                "kept. " + _REMEDY
            )
