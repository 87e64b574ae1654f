"""The chunked implementation of the loss: from hidden states, without ever holding all logits.

2,048 tokens over a vocabulary of 128,256 are a gigabyte of logits, three times: student, teacher and gradient. Here
the logits of some rows at a time are computed from the hidden states and the output layer, and reduced at once to the
loss and its gradient with respect to the student's hidden states and output layer. That takes as many matrix products
as the full implementation. Chunking the output layer is the idea of Hsu et al. 2024 (Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from born_again.objectives import IGNORED, item_loss
from born_again.objectives.fused import (
    METRICS,
    ItemLoss,
    fill_items,
    max_probabilities,
    named,
    scale_saved_gradient,
    working_dtype,
)

# Bytes of each network's logits held at a time, or one part in _SHARE of all where that is more: every chunk is one
# more pass over the output layer and its gradient, and a product of few rows is slow.
_CHUNK = 2**26
_SHARE = 9


@dataclass(frozen=True)
class Head:
    """Hidden states and the output layer whose logits they give: hidden @ weight.T + bias.

    Args:
        hidden: (items, width), any float dtype.
        weight: (vocabulary, width).
        bias: (vocabulary,), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def detach(self) -> Head:
        """The same, without gradient."""
        return Head(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())

    def to(self, dtype: torch.dtype) -> Head:
        """The same in another dtype."""
        return Head(self.hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logits(self, rows: slice, workspace: Tensor) -> Tensor:
        """Logits of some items, written to `workspace` (rows or more, vocabulary)."""
        hidden = self.hidden[rows]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=workspace[: len(hidden)])
        return torch.addmm(self.bias, hidden, self.weight.T, out=workspace[: len(hidden)])


def chunked_objective(
    objective: str,
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    *,
    temperature: float = 1.0,
    label_weight: float = 1.0,
    permutation: str = "fresh",
    label_smoothing: float = 0.0,
    label_share: float = 0.0,
    generator: torch.Generator | None = None,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
    """The sums over items of what `born_again.objectives.objective_items` gives item by item.

    Differentiable once. Under autocast the matrix products are in its dtype; the loss is computed in float32 or wider,
    and the gradient of the output layer is summed in that. Nothing synchronises with a device.

    Args:
        objective: see `objective_items`.
        student: gradients reach its hidden states, weight and bias.
        teacher: as many items, the same vocabulary, any width; None for "label". No gradient reaches it.
        labels: (items,) int64.
        temperature: see `objective_items`.
        label_weight: see `objective_items`.
        permutation: see `objective_items`.
        label_smoothing: see `objective_items`.
        label_share: see `objective_items`.
        generator: see `objective_items`; on a CPU a "fresh" permutation of a row is the one drawn there.
        with_metrics: also sum `born_again.objectives.distillation_metrics`; needs a teacher and labels.

    Returns:
        sum(weight x loss), a scalar in nats; sum(weight); and the metrics by name, or None.

    Raises:
        ValueError: hidden states, layers, items or vocabularies that do not fit.
    """
    check_head("student", student)
    if teacher is not None:
        check_head("teacher", teacher)
        sizes, expected = ((len(head.hidden), len(head.weight)) for head in (teacher, student))
        if sizes != expected:
            raise ValueError(
                f"teacher: has {sizes[0]} items and a vocabulary of {sizes[1]}, the student {expected[0]} and "
                f"{expected[1]}; expected the same of both."
            )
        teacher = teacher.detach()
    leaves = [part for part in (student.hidden, student.weight, student.bias) if part is not None]
    total, weight, metrics = _Chunked.apply(
        student.hidden,
        student.weight,
        student.bias,
        teacher,
        labels,
        item_loss(objective, temperature, label_weight, permutation, label_smoothing, label_share),
        generator,
        with_metrics,
        torch.is_grad_enabled() and any(part.requires_grad for part in leaves),
    )
    return total, weight, named(metrics) if with_metrics else None


@torch.no_grad()
def chunked_confidence_weight(teacher: Head, labels: Tensor) -> Tensor:
    """The sum of the weights of CWTM, the teacher's largest probabilities over the items that count: a scalar."""
    check_head("teacher", teacher)
    teacher = teacher.detach().to(_product_dtype(teacher.hidden))
    total = labels.new_zeros((), dtype=working_dtype(teacher.hidden))
    count = chunk_rows(teacher)
    workspace = _workspace(teacher, count)
    with torch.autocast(teacher.hidden.device.type, enabled=False):
        for rows in _chunks(teacher, count):
            largest = max_probabilities(teacher.logits(rows, workspace))
            total += largest.where(labels[rows] != IGNORED, 0).sum()
    return total


def check_head(name: str, head: Head) -> None:
    """Refuses hidden states that the output layer cannot take.

    Raises:
        ValueError: named after `name`.
    """
    if head.hidden.dim() != 2 or head.weight.dim() != 2 or head.hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"{name}: got hidden states of shape {tuple(head.hidden.shape)} and an output layer of shape "
            f"{tuple(head.weight.shape)}; expected (items, width) and (vocabulary, width)."
        )


class _Chunked(torch.autograd.Function):
    """Saves the gradients of the total with respect to hidden states, weight and bias."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, labels, loss, generator, with_metrics, differentiable):
        student = Head(hidden, weight, bias).to(_product_dtype(hidden))
        teacher = None if teacher is None else teacher.to(_product_dtype(teacher.hidden))
        needed = [differentiable and needs for needs in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            total, weights, metrics, gradients = _chunked_forward(
                loss, student, teacher, labels, needed, generator, with_metrics
            )
        parts = (hidden, weight, bias)
        ctx.save_for_backward(
            *(None if sums is None else sums.to(part.dtype) for sums, part in zip(gradients, parts, strict=True))
        )
        ctx.mark_non_differentiable(weights, metrics)
        return total, weights, metrics

    @staticmethod
    def backward(ctx, grad_total, *_):
        scaled = [None if part is None else scale_saved_gradient(part, grad_total) for part in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None


def _chunked_forward(
    loss: ItemLoss,
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    needed: list[bool],
    generator: torch.Generator | None,
    with_metrics: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Total, weight, metrics, and the gradients of the total with respect to hidden states, weight and bias."""
    wide = working_dtype(student.hidden)
    total, weight = (torch.zeros((), dtype=wide, device=student.hidden.device) for _ in range(2))
    metrics = torch.zeros(len(METRICS) if with_metrics else 0, dtype=wide, device=student.hidden.device)
    shapes = student.hidden, student.weight, student.bias
    to_hidden, to_weight, to_bias = gradients = [
        torch.zeros(part.shape, dtype=wide, device=part.device) if part is not None and needs else None
        for part, needs in zip(shapes, needed, strict=True)
    ]
    count = min(chunk_rows(head) for head in (student, teacher) if head is not None)
    workspace, teacher_workspace = _workspace(student, count), None if teacher is None else _workspace(teacher, count)
    for rows in _chunks(student, count):
        logits = student.logits(rows, workspace)
        losses, weights, chunk_metrics = fill_items(
            loss,
            logits,
            None if teacher is None or teacher_workspace is None else teacher.logits(rows, teacher_workspace),
            None if labels is None else labels[rows],
            gradient=logits if any(needed) else None,  # in place of the logits
            scale_gradient_by_weight=True,
            generator=generator,
            with_metrics=with_metrics,
        )
        total += torch.dot(losses, weights)
        weight += weights.sum()
        metrics += chunk_metrics
        if to_hidden is not None:
            to_hidden[rows] = logits @ student.weight
        if to_weight is not None:
            if logits.dtype == wide:
                to_weight.addmm_(logits.T, student.hidden[rows])
            else:
                to_weight += logits.T @ student.hidden[rows]
        if to_bias is not None:
            to_bias += logits.sum(0, dtype=wide)
    return total, weight, metrics, gradients


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a matrix product of hidden states here: float64, autocast's dtype, or their own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def chunk_rows(head: Head) -> int:
    """How many rows of logits are computed at a time."""
    rows = len(head.hidden)
    return max(1, min(rows, max(_CHUNK // (len(head.weight) * head.hidden.itemsize), -(-rows // _SHARE))))


def _chunks(head: Head, count: int) -> Iterator[slice]:
    return (slice(start, start + count) for start in range(0, len(head.hidden), count))


def _workspace(head: Head, count: int) -> Tensor:
    return head.hidden.new_empty(count, len(head.weight))
