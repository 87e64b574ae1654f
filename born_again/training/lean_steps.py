"""Trainer's step without what hardly any training asks for: the host's time, which no device shortens."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import accelerate.optimizer
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import _global_optimizer_pre_hooks
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import is_sagemaker_mp_enabled

_WITH_GRADIENTS = ("on_pre_optimizer_step", "on_optimizer_step")
_REGISTRATIONS = (register_module_module_registration_hook, register_module_parameter_registration_hook)
# That of transformers only sees to kernels, where these are used.
_TRAIN = (nn.Module.train, nn.parallel.DistributedDataParallel.train, PreTrainedModel.train)
_is_training = operator.attrgetter("training")
_WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class LeanStepsMixin(Trainer):
    """The part of BaseTrainer that spares a step what it does not need, with the same weights, log and events."""

    _norm: _GradientNorm | None = None  # of the last step
    _steps: _PlainSteps | None = None
    _optimizer_keeps_gradients: bool | None = None  # as they are; None until the first step has told

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._skip_events_without_listeners()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's."""
        self._optimizer_keeps_gradients = self._steps = None
        # What is found once is found again when a network anywhere gets another part.
        hooks = [register(self._forget_steps) for register in _REGISTRATIONS]
        try:
            with _searching_packages_once():
                return super().train(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            self._norm = self._steps = None

    def _forget_steps(self, *_: Any) -> None:
        self._steps = None

    def _skip_events_without_listeners(self) -> None:
        """Most callbacks listen to one of the five events of a step."""
        call = self.callback_handler.call_event
        self._heard: dict[str, tuple[list[TrainerCallback], bool]] = {}

        def call_listeners(event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return call(event, args, state, control, **kwargs) if self._is_heard(event) else control

        self.callback_handler.call_event = call_listeners

    def _is_heard(self, event: str) -> bool:
        """Whether a callback listens to an event; found out again where there are other callbacks than before."""
        callbacks, is_heard = self._heard.get(event, (None, True))
        if callbacks != self.callback_handler.callbacks:
            is_heard = any(_listens(callback, event) for callback in self.callback_handler.callbacks)
            self._heard[event] = [*self.callback_handler.callbacks], is_heard
        return is_heard

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Any:
        """Trainer's, which for a norm that clips nothing multiplies every gradient by one; None until it is logged."""
        if grad_norm is not None or self.accelerator.scaler is not None:
            return super()._get_grad_norm(model, grad_norm)
        on_several_meshes = getattr(self, "_has_mixed_mesh_grads", lambda model: False)  # a newer Trainer's
        if self.accelerator.distributed_type not in _WHOLE_GRADIENTS or on_several_meshes(model):
            return super()._get_grad_norm(model, grad_norm)
        gradients = [weight.grad for weight in self._plain_steps_of(model).weights if weight.grad is not None]
        self._norm = _GradientNorm(gradients)
        if not (self._optimizer_keeps_gradients and self._nobody_else_sees_gradients()):
            self._norm.compute()
        return self._norm

    def _nobody_else_sees_gradients(self) -> bool:
        """Whether only torch's own optimizer comes between the backward pass and the log.

        Others may write into gradients without a trace, by `.data`, numpy or a kernel of their own.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if getattr(torch.optim, type(optimizer).__name__, None) is not type(optimizer):
            return False
        hooks = {**optimizer._optimizer_step_pre_hooks, **_global_optimizer_pre_hooks}.values()
        if not all(getattr(hook, "keeps_gradients", False) for hook in hooks):
            return False
        return not any(map(self._is_heard, _WITH_GRADIENTS))

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Trainer's, for which a norm is computed if it is logged."""
        super()._maybe_log_save_evaluate(tr_loss, self._norm_to_log(grad_norm), *args, **kwargs)

    def _norm_to_log(self, grad_norm: Any) -> Any:
        """What `_get_grad_norm` returned, as Trainer logs it."""
        if not isinstance(grad_norm, _GradientNorm):
            return grad_norm
        if self._optimizer_keeps_gradients is None:
            self._optimizer_keeps_gradients = grad_norm.is_unchanged
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            if grad_norm.value is None and grad_norm.is_unchanged:
                grad_norm.compute()
            grad_norm.release()  # an evaluation needs the memory
        return grad_norm.value

    def _plain_steps_of(self, model: nn.Module) -> _PlainSteps:
        if self._steps is None or self._steps.model is not model:
            self._steps = _PlainSteps(model, self)
        return self._steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's, which asks at every step for what hardly any training has."""
        if self._norm is not None:
            self._norm.release()
        steps = self._plain_steps_of(model)
        if not steps.are_plain:
            return super().training_step(model, inputs, num_items_in_batch)
        if steps.overrides_train or not all(map(_is_training, steps.modules)):
            model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            is_scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
        if not is_scaled:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class _PlainSteps:
    """What stays the same over the steps of a training.

    Args:
        model: that Trainer trains, with its wrappers.
        trainer: prepared for training.

    Attributes:
        weights: all parameters.
        modules: all modules.
        overrides_train: whether one has a train() of its own, which may keep its BatchNorm in eval mode.
        are_plain: whether Trainer's step does no more than forward, backward and a division by accumulated steps.
    """

    def __init__(self, model: nn.Module, trainer: Trainer) -> None:
        self.model, self.weights, self.modules = model, list(model.parameters()), list(model.modules())
        self.overrides_train = any(
            type(module).train not in _TRAIN or "train" in vars(module) or getattr(module, "use_kernels", False)
            for module in self.modules
        )
        args, accelerator, optimizer = trainer.args, trainer.accelerator, trainer.optimizer
        self.are_plain = (
            hasattr(Trainer, "loss_is_scaled_for_ga")  # an older one asks other questions
            and args.n_gpu <= 1
            and args.torch_empty_cache_steps is None
            and "lomo" not in str(args.optim).lower()
            and accelerator.distributed_type in _WHOLE_GRADIENTS
            and getattr(accelerator, "parallelism_config", None) is None
            and not hasattr(getattr(optimizer, "optimizer", optimizer), "train")  # schedule-free ones
            and not is_sagemaker_mp_enabled()
        )


class _GradientNorm:
    """The norm of the gradients of a step, computed after the optimizer's step, and only if it is logged.

    Attributes:
        value: (), once it was computed.
    """

    value: Tensor | None = None

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self._gradients = gradients
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [gradient._version for gradient in self._gradients]

    @property
    def is_unchanged(self) -> bool:
        """Whether no gradient was written to since."""
        return self._versions == self._current_versions()

    def compute(self) -> None:
        self.value = torch.nn.utils.get_total_norm(self._gradients)

    def release(self) -> None:
        """Lets go of the gradients."""
        self._gradients = self._versions = []


@contextmanager
def _searching_packages_once() -> Iterator[None]:
    """Inside, accelerate's optimizers do not search all of sys.path for a package twice a step."""
    name = "is_lomo_available"
    search = getattr(accelerate.optimizer, name, None)
    if search is None:  # a later accelerate's
        yield
        return
    setattr(accelerate.optimizer, name, functools.cache(search))
    try:
        yield
    finally:
        setattr(accelerate.optimizer, name, search)


def _listens(callback: TrainerCallback, event: str) -> bool:
    """Whether a callback does anything at an event: whether it has a method of its own there."""
    method = getattr(callback, event)
    return getattr(method, "__func__", None) is not getattr(TrainerCallback, event, None)
