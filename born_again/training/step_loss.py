"""Chooses between the full and the chunked implementation of the loss, and runs the chunked one.

The full implementation computes all logits of student and teacher. The chunked one computes them from hidden states,
some rows at a time (`born_again.objectives.chunked`). It needs a student and a teacher whose logits are the output of
their output layer and of nothing after it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from born_again.objectives.chunked import Head, chunked_confidence_weight, chunked_objective
from born_again.teacher import FrozenTeacher, logits_of
from born_again.teacher.cache.cached_teacher import CachedTeacher, without_view_keys
from born_again.teacher.cache.windows import CachedWindows
from born_again.teacher.output_layer import ends_in_output_layer, output_layer, without_output_layer
from born_again.training.network_loss import first_row

logger = logging.getLogger(__name__)

# Logits of a micro-batch (items x vocabulary) from which "auto" is the chunked implementation. On a CPU in float32
# it takes 1.05 times as long as the full one (tests/benchmarks/chunked.py), and more in bf16. At this size the full
# one's three tensors of logits (student, teacher, gradient) begin to be three quarters of a gibibyte in float32.
CHUNKED_FROM = 2**26


class ChunkedLossMixin:
    """The part of BornAgainTrainer that computes the chunked loss."""

    _chunked: bool | None = None  # None before the first batch of a training
    _teacher_ends: bool | None = None  # whether the teacher's output layer alone makes its logits
    _unwrapped: tuple[nn.Module, nn.Module] | None = None  # the student as Trainer has it, and without wrappers

    def _choose_loss_implementation(self, batch: Mapping[str, Any]) -> None:
        """Decides for a whole training, by its first batch, and logs the choice.

        Raises:
            ValueError: `loss_implementation` is "chunked", which these networks do not allow.
        """
        chosen = getattr(self.args, "loss_implementation", "auto")
        if chosen == "full":
            why_not = "loss_implementation is 'full'"
        else:
            why_not = self._why_not_chunked(batch, by_size=chosen == "auto")
        if chosen == "chunked" and why_not is not None:
            raise ValueError(
                f"loss_implementation: got 'chunked', but {why_not}; expected 'auto', which uses the full "
                "implementation in such a case."
            )
        self._chunked = why_not is None
        if self.is_world_process_zero() and output_layer(self._bare_student()) is not None:
            logger.info(
                "Loss implementation: %s.",
                "chunked, logits of some rows at a time" if self._chunked else f"full, since {why_not}",
            )

    def _why_not_chunked(self, batch: Mapping[str, Any], by_size: bool) -> str | None:
        """Why the chunked implementation cannot be used, or None."""
        if self._objective is not None and self.teacher is not None:
            return "the objective is a function of all logits"
        if self.is_sharded:
            return "FSDP or DeepSpeed keep the output layer in pieces"
        if (why_not := self._why_no_hidden()) is not None:
            return why_not
        teacher, student = self.teacher, self._bare_student()
        layer = output_layer(student)
        if layer is None:
            return "the student has no output layer that is a plain nn.Linear"
        inputs, labels = self._split_labels(self._prepare_inputs(without_view_keys(batch)))
        logits = labels.numel() * layer.out_features
        if by_size and logits < CHUNKED_FROM:
            return f"a batch has {logits:,} logits, fewer than {CHUNKED_FROM:,}"
        few = {name: first_row(value, len(labels)) for name, value in inputs.items()}
        with self.accelerator.autocast():
            if not ends_in_output_layer(student, self._inputs_of_student(few)):
                return "the student's logits are not the output of its output layer alone"
        if teacher is None:
            return None
        if not self._teacher_ends_in_output_layer(inputs, labels):
            return "the teacher's logits are not the output of its output layer alone"
        if self._columns is not None and output_layer(teacher.modules[0]).out_features < self._columns:
            return "the student has more tokens than the teacher"
        return None

    def _why_no_hidden(self) -> str | None:
        """Why the teacher's hidden states cannot stand in for its logits, as far as that is known before any batch."""
        if self._compiler is not None:
            return "a compiled network cannot skip its output layer"
        teacher = self.teacher
        if teacher is None:
            return None
        if teacher.precision == "float32" and self.accelerator.mixed_precision != "no":
            return (
                "teacher_precision is 'float32', and the chunked implementation uses one precision for both networks"
            )
        if len(teacher.modules) > 1:
            return "the mean probabilities of several teachers are not the output of one output layer"
        if isinstance(teacher, CachedTeacher) and not isinstance(teacher, CachedWindows):
            return "the teacher cache holds logits"
        return None

    def _chunked_sums(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """sum(weight x loss) and sum(weight) of a micro-batch; `teacher_hidden` where the teacher forward is done."""
        # The teacher first, so that its activations are freed before the student's forward.
        teacher = None if self.teacher is None else self._teacher_head(inputs, labels, teacher_hidden)
        # The wrapper for distributed training is called; it tracks the output layer's weight by itself.
        with without_output_layer(self._bare_student()) as layer:
            outputs = self._student_forward(model, inputs)
            hidden = logits_of(outputs)
        rows, targets = self._items(hidden, labels)
        self._labels.see(targets, layer.out_features)
        student = Head(rows, layer.weight, layer.bias)
        with self.accelerator.autocast():
            total, weight, metrics = chunked_objective(
                "label" if teacher is None else self.args.objective,
                student,
                teacher,
                targets,
                **self._loss_settings(),
                generator=self._permutations,
                with_metrics=teacher is not None and self._collects_metrics,
            )
        if metrics is not None:
            self._add_metrics(metrics)
        auxiliary = self._auxiliary_loss(outputs)
        return total if auxiliary is None else total + weight * auxiliary, weight

    def _chunked_teacher_weight(self, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's hidden states for a micro-batch, and the sum of the weights that CWTM gives its items."""
        with _returning_hidden(self.teacher):
            hidden = self._teacher_forward(inputs)
        with self.accelerator.autocast():
            head = self._teacher_head(inputs, labels, hidden)
            return hidden, chunked_confidence_weight(head, self._shift(labels).reshape(-1))

    def _teacher_head(self, inputs: Mapping[str, Any], labels: Tensor, hidden: Tensor | None) -> Head:
        with _returning_hidden(self.teacher) as layer:
            hidden = self._teacher_forward(inputs) if hidden is None else hidden
        bias = None if layer.bias is None else layer.bias[: self._columns]
        return Head(self._items(hidden, labels)[0], layer.weight[: self._columns], bias)

    def _teacher_rows(self, inputs: Mapping[str, Any], labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The teacher's logits (items, classes) and targets (items,) of a batch, some items at a time where all of
        its logits would be more than the chunked loss ever holds."""
        layer = output_layer(self.teacher.modules[0])
        are_few = layer is None or labels.numel() * layer.out_features < CHUNKED_FROM
        if are_few or self._why_no_hidden() or not self._teacher_ends_in_output_layer(inputs, labels):
            yield self._teacher_items(self._teacher_forward(inputs), labels)
            return
        with _returning_hidden(self.teacher) as layer:
            hidden = self._teacher_forward(inputs)
        rows = max(1, CHUNKED_FROM // (16 * layer.out_features))
        for hidden_rows, targets in zip(*(part.split(rows) for part in self._items(hidden, labels)), strict=True):
            with torch.no_grad(), self.accelerator.autocast(), self._frozen_teacher().precision_context():
                yield self._over_student_classes(layer(hidden_rows)), targets

    def _teacher_ends_in_output_layer(self, inputs: Mapping[str, Any], labels: Tensor) -> bool:
        if self._teacher_ends is None:  # checked once, since a teacher does not change
            few = {name: first_row(value, len(labels)) for name, value in without_view_keys(inputs).items()}
            frozen = self._frozen_teacher()
            frozen.prepare(few)
            with self.accelerator.autocast():
                self._teacher_ends = ends_in_output_layer(frozen.modules[0], few, frozen)
        return self._teacher_ends

    def _frozen_teacher(self) -> FrozenTeacher:
        return self.teacher.frozen if isinstance(self.teacher, CachedTeacher) else self.teacher

    def _bare_student(self) -> nn.Module:
        if self._unwrapped is None or self._unwrapped[0] is not self.model:  # unwrapping walks through all modules
            self._unwrapped = self.model, self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return self._unwrapped[1]


def _returning_hidden(teacher: FrozenTeacher | CachedWindows) -> AbstractContextManager[nn.Linear]:
    """Inside, a teacher returns the input of its output layer instead of logits; yields that layer."""
    if isinstance(teacher, CachedWindows):
        return teacher.returning_hidden()
    return without_output_layer(teacher.modules[0])
