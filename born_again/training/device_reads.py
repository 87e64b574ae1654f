"""What is logged, read from the device at once: the host waits for it a single time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

if TYPE_CHECKING:
    from born_again.training.checks import DivergenceGuard, LabelRange


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors in main memory, for one wait in all."""
    copies = [tensor.detach().to("cpu", non_blocking=True, copy=True) for tensor in tensors]
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
    return copies


class DeviceReadsMixin(Trainer):
    """For a trainer with guards and summed metrics on the device."""

    _labels: LabelRange
    _guard: DivergenceGuard
    _metric_sums: dict[str, Tensor] | None

    def _read_together(self, tr_loss: Tensor, grad_norm: Any = None, *rest: Any) -> tuple[Any, ...]:
        """The arguments of `_maybe_log_save_evaluate`, in main memory at a step that is logged, as are all it reads.

        Several processes first sum or gather them on the device, and stay as they are.
        """
        is_logged = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if not is_logged or self.args.world_size > 1:
            return tr_loss, grad_norm, *rest
        values = {"tr_loss": tr_loss, "grad_norm": grad_norm}
        values |= {"labels": self._labels.unread, "first_bad": self._guard.unread}
        sums = {} if self._metric_sums is None else self._metric_sums
        on_device = {name: value for name, value in {**values, **sums}.items() if isinstance(value, Tensor)}
        values |= dict(zip(on_device, to_host(list(on_device.values())), strict=True))
        self._labels.unread, self._guard.unread = values["labels"], values["first_bad"]
        if self._metric_sums is not None:
            self._metric_sums = {name: values[name] for name in sums}
        tr_loss -= tr_loss  # as Trainer does with what it is handed
        return values["tr_loss"], values["grad_norm"], *rest
