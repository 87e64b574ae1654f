"""torch's fused optimizers: one kernel for many parameters."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)

# By the names of TrainingArguments.optim.
_OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}


def has_fused_form(optim: str) -> bool:
    """Whether an optimizer, by its name in TrainingArguments.optim, is one that `fused_optimizer` can make fused."""
    optimizer = _OPTIMIZERS.get(getattr(optim, "value", optim))
    return optimizer is not None and "fused" in inspect.signature(optimizer).parameters


def should_fuse(args: TrainingArguments) -> bool:
    """Whether a new lineage fuses its optimizer: on CUDA, where it has such a form, and not in fp16.

    In fp16 a fused optimizer skips a step whose gradients overflow within its kernel, which accelerate does not
    notice: the learning rate schedule would go on.
    """
    return args.device.type == "cuda" and args.mixed_precision != "fp16" and has_fused_form(args.optim)


class FusedOptimizerMixin(Trainer):
    """Trainer with the argument `fused_optimizer`."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, *rest: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Trainer's, fused where the arguments say so."""
        optimizer, arguments = Trainer.get_optimizer_cls_and_kwargs(args, *rest, **kwargs)
        return optimizer, {**arguments, "fused": True} if getattr(args, "fused_optimizer", False) else arguments

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's; a fused one is given gradients with the strides of their parameters, which it insists on."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and getattr(self.args, "fused_optimizer", False):
            _align_gradients(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; the optimizer of a checkpoint goes on in the form that it has there."""
        super()._load_optimizer_and_scheduler(checkpoint)
        wanted = getattr(self.args, "fused_optimizer", None)
        if checkpoint is None or wanted is None or self.optimizer is None:
            return
        found = any(group.get("fused") for group in self.optimizer.param_groups)
        if found != wanted and self.is_world_process_zero():
            logger.warning(
                "fused_optimizer: got %s, but %s was written with %s, in which the training goes on; give the same, "
                "or begin a new training.",
                wanted,
                checkpoint,
                found,
            )


def _align_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Before every step, gives gradients their parameter's strides where these differ in axes of length 1.

    Such strides have no meaning, and a kernel may choose others than the parameter has, as that of a 1 x 1 convolution
    may. A fused optimizer then raises (https://github.com/pytorch/pytorch/issues/106951).
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ambiguous = [parameter for parameter in parameters if parameter.dim() > 1 and 1 in parameter.shape]

    def align(*_: Any) -> None:
        for parameter in ambiguous:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())

    align.keeps_gradients = True  # their values
    if ambiguous:
        optimizer.register_step_pre_hook(align)
