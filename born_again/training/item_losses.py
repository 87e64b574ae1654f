"""From logits to per-item losses and weights: the paper's objectives, or a function of the user's."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from born_again.objectives import (
    IGNORED,
    at_least_tiny,
    item_loss,
    objective_items_and_metrics,
    widened,
)
from born_again.objectives.fused import fused_loss_sums

Objective = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# Of the training arguments; a function reads none of them.
_SETTINGS = ("objective", "temperature", "label_weight", "permutation", "teacher_annealing")


def custom_name(objective: Objective) -> str:
    """The name of a function in a record: "custom: module.qualname", with the arguments of a functools.partial."""
    bound = ""
    if isinstance(objective, functools.partial):
        values = [*map(repr, objective.args), *(f"{key}={value!r}" for key, value in objective.keywords.items())]
        objective, bound = objective.func, f"({', '.join(values)})"
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"custom: {named.__module__}.{named.__qualname__}{bound}"


class ItemLossesMixin:
    """The part of BornAgainTrainer that computes the losses of a student's items."""

    _objective: Objective | None = None
    _is_checked = False  # whether the values that the function returned were checked in this training
    # Of the micro-batches of a step so far, where the function alone tells what its items weigh.
    _weight_so_far: Tensor | None = None
    _loss_so_far: Tensor | float = 0.0

    def _take_objective(self, objective: Objective | None) -> None:
        """Checks a function of the user's, as far as that is possible before the first batch.

        Raises:
            TypeError: it cannot be called with three tensors.
            ValueError: training arguments that it would not read.
        """
        if objective is None:
            return
        if not callable(objective):
            raise TypeError(
                f"objective: got {objective!r:.80}, expected a function of (student_logits, teacher_logits, labels); "
                "a built-in one is named in the arguments, as BornAgainTrainingArguments(objective='ban+l')."
            )
        try:
            inspect.signature(objective).bind(None, None, None)
        except TypeError as error:
            raise TypeError(
                f"objective: {custom_name(objective)} cannot be called with (student_logits, teacher_logits, labels) "
                f"({error}); expected a function of these three; bind others with functools.partial."
            ) from error
        except ValueError:
            pass  # of a compiled function no signature is known
        for name in _SETTINGS:
            field = getattr(type(self.args), "__dataclass_fields__", {}).get(name)
            if field is not None and getattr(self.args, name) != field.default:
                raise ValueError(
                    f"{name}: got {getattr(self.args, name)!r} beside a function as objective, which does not read "
                    f"it; expected {field.default!r}: leave it out, or bind it to the function with functools.partial."
                )
        self._objective = objective

    @property
    def objective_name(self) -> str:
        """What a student is taught by, for records: that of the arguments, or "custom: module.qualname"."""
        if self._objective is None:
            return getattr(self.args, "objective", "label")
        return custom_name(self._objective)

    @property
    def _has_label_term(self) -> bool | None:
        """Whether a student's loss has a term with the labels; None where a function alone knows."""
        if self._objective is not None:
            return None
        return self.args.has_label_term

    def _loss_settings(self) -> dict[str, Any]:
        """What `item_loss` and the chunked loss take beside the objective, at this step."""
        args, state = self.args, self.state
        # Of the step alone, so that a resumed training has the share that an uninterrupted one would have.
        share = state.global_step / max(1, state.max_steps) if getattr(args, "teacher_annealing", False) else 0.0
        return {
            "temperature": getattr(args, "temperature", 1.0),
            "label_weight": getattr(args, "label_weight", 1.0),
            "permutation": getattr(args, "permutation", "fresh"),
            "label_smoothing": args.label_smoothing_factor,
            "label_share": share,
        }

    def _objective_sums(
        self, student_rows: Tensor, teacher_rows: Tensor, targets: Tensor, all_count: bool
    ) -> tuple[Tensor, Tensor | float]:
        """sum(weight x loss) and sum(weight) of a micro-batch."""
        if student_rows.shape != teacher_rows.shape:
            raise ValueError(
                f"teacher: gives logits of shape {tuple(teacher_rows.shape)} where the student's are "
                f"{tuple(student_rows.shape)}; expected as many items and classes from both: build the student for "
                f"the teacher's {teacher_rows.shape[-1]} classes."
            )
        if self._objective is not None:
            losses, weights = self._custom_items(self._objective, student_rows, teacher_rows, targets)
            return (losses * weights).sum(), weights.sum()
        total, weight, metrics = fused_loss_sums(
            item_loss(self.args.objective, **self._loss_settings()),
            student_rows,
            teacher_rows,
            targets,
            all_count=all_count,
            generator=self._permutations,
            with_metrics=self._collects_metrics,
        )
        if metrics is not None:
            self._add_metrics(metrics)
        return total, weight

    def _permutation_seed(self) -> int:
        if self.args.permutation == "fixed":
            return self.args.seed
        text = f"{self.args.seed} {self.state.global_step} {self.args.process_index}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")

    # ---- A function of the user's ----

    def _custom_items(
        self, objective: Objective, student_rows: Tensor, teacher_rows: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses and weights of the items that count, which alone the function is given."""
        if self._collects_metrics:
            with torch.no_grad():
                self._add_metrics(objective_items_and_metrics("label", student_rows, teacher_rows, targets)[2])
        counted = targets != IGNORED
        student = widened(student_rows[counted])
        if not len(student):
            losses = student.sum(-1)  # none, in the graph: other processes wait for a backward pass
            return losses, losses.detach()
        returned = objective(student, widened(teacher_rows[counted]).detach(), targets[counted])
        losses, weights = _checked(custom_name(objective), returned, student)
        if not self._is_checked and bool(student.isfinite().all()):  # waits for the device, and so is done once
            _check_values(custom_name(objective), losses, weights)
        self._is_checked = True
        weights = weights.detach()
        if self._weight_so_far is not None:
            self._weight_so_far = self._weight_so_far + weights.sum()
        return losses, weights

    def _weigh_afterwards(self, step_weight: Tensor | int | None) -> None:
        """Before a step of several micro-batches or processes, whose weight is not known before its last forward.

        Their losses are divided by the number of items, and the gradients scaled to the weight when all are there.
        """
        self._weight_so_far = (
            None if step_weight is None else torch.zeros((), dtype=torch.float64, device=self.args.device)
        )
        self._loss_so_far = 0.0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Trainer's; after the last micro-batch of a step with a function as objective its gradients are scaled."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._weight_so_far is None or num_items_in_batch is None:
            return loss
        before, self._loss_so_far = self._loss_so_far, self._loss_so_far + loss
        if not self.accelerator.sync_gradients:
            return loss
        weight = at_least_tiny(self._sum_over_processes(self._weight_so_far))
        # Finite also where no item weighs anything: the step then has gradients of 0.
        factor = (num_items_in_batch / weight).clamp(max=torch.finfo(loss.dtype).max).to(loss.dtype)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return self._loss_so_far * factor - before  # so that what is logged is the loss of the step


def _checked(name: str, returned: Any, student: Tensor) -> tuple[Tensor, Tensor]:
    """Checks what a function returned, without looking at values.

    Raises:
        TypeError: no two tensors, or of other dtypes.
        ValueError: of other shapes, or losses without a gradient.
    """
    items = len(student)
    expected = f"expected per-item losses and weights, two tensors of floats of shape ({items},)"
    if not (isinstance(returned, tuple | list) and len(returned) == 2):
        got = f"{len(returned)} values" if isinstance(returned, tuple | list) else type(returned).__name__
        raise TypeError(f"objective: {name} returned {got}, {expected}; return losses, torch.ones_like(losses).")
    for what, part in zip(("losses", "weights"), returned, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"objective: {name} returned {what} of type {type(part).__name__}, {expected}.")
        if part.shape != (items,):
            raise ValueError(
                f"objective: {name} returned {what} of shape {tuple(part.shape)}, {expected}: one for each row of "
                "logits. Sum over classes, not over items; torch.nn.functional takes reduction='none'."
            )
        if not part.is_floating_point():
            raise TypeError(f"objective: {name} returned {what} of dtype {part.dtype}, {expected}; call .float().")
        if part.device != student.device:
            raise ValueError(
                f"objective: {name} returned {what} on {part.device}, expected {student.device}, where the logits are."
            )
    losses, weights = returned
    if torch.is_grad_enabled() and student.requires_grad and not losses.requires_grad:
        raise ValueError(
            f"objective: {name} returned losses without a gradient, expected a differentiable function of "
            "student_logits; leave out detach(), torch.no_grad(), argmax and the like."
        )
    return losses, weights


def _check_values(name: str, losses: Tensor, weights: Tensor) -> None:
    """Refuses losses and weights that are not finite, and weights below 0; waits for the device."""
    for what, part in (("losses", losses), ("weights", weights)):
        wrong = ~part.isfinite() if what == "losses" else ~(part.isfinite() & (part >= 0))
        if wrong.any():
            expected = "finite ones" if what == "losses" else "finite ones of 0 or more"
            raise ValueError(
                f"objective: {name} returned {what} with {part[wrong][0].item()} in the first batch, of logits that "
                f"are finite; expected {expected}: use log_softmax instead of softmax().log(), and clamp divisors."
            )
