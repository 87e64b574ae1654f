"""The distillation loss, its gradient and what is worth watching, in one pass over blocks of rows.

Over a vocabulary of 10,000 words the logits of a window are tens of megabytes, and a loss written as a chain of tensor
operations reads and writes them a dozen times. Here a block of rows stays in a processor's cache until it is done, and
the only thing of the logits' size that is kept is their gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TERMS = (
    "ce_loss",
    "kd_loss",
    "teacher_agreement",
    "teacher_entropy",
    "importance_weight_norm",
    "dark_knowledge_norm",
    "items",
)
_CPU_BLOCK = 2**20  # logits: 4 MiB of float32
_DEVICE_BLOCK = 2**26  # fewer, larger launches, and still a bound on memory


def distilled_items(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    label_weight: float = 0.0,
    watch: bool = False,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Soft cross-entropy of every item (paper, equation 2), plus its cross-entropy with the label.

    Args:
        student_logits: (items, classes), any float dtype; the only one that a gradient reaches.
        teacher_logits: (items, classes), any float dtype.
        labels: (items,) int64, -100 where an item does not count; needed for `label_weight` and `watch`.
        temperature: divides both logits of the soft term, which is multiplied by its square.
        label_weight: of the cross-entropy with the labels.
        watch: also sum the terms of `born_again.objectives.distillation_terms`, at temperature 1.

    Returns:
        (items,) losses in nats, float32 or wider; and the terms by name, or None. The loss of an item that does not
        count is that of its soft term: a caller weighs it by 0.
    """
    losses, terms = _Distilled.apply(
        student_logits, teacher_logits.detach(), labels, temperature, label_weight, watch and labels is not None
    )
    return losses, dict(zip(TERMS, terms.unbind(), strict=True)) if len(terms) else None


class _Distilled(torch.autograd.Function):
    """Keeps for the backward pass the gradient of each item's loss, computed while its logits are at hand."""

    @staticmethod
    def forward(ctx, student, teacher, labels, temperature, label_weight, watch):
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        items, classes = student.shape
        block = max(1, (_CPU_BLOCK if student.device.type == "cpu" else _DEVICE_BLOCK) // max(classes, 1))
        losses = torch.empty(items, dtype=dtype, device=student.device)
        gradient = torch.empty(items, classes, dtype=dtype, device=student.device)
        terms = torch.zeros(len(TERMS) if watch else 0, dtype=dtype, device=student.device)
        for start in range(0, items, block):
            rows = slice(start, start + block)
            terms += _block(
                student[rows].to(dtype),
                teacher[rows].to(dtype),
                None if labels is None else labels[rows],
                temperature,
                label_weight,
                watch,
                losses[rows],
                gradient[rows],
            )
        ctx.dtype = student.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(terms)
        return losses, terms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses.unsqueeze(-1)).to(ctx.dtype), None, None, None, None, None


def _block(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    label_weight: float,
    watch: bool,
    losses: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Fills `losses` (rows,) and `gradient` (rows, classes); returns the summed terms, or nothing."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)  # (rows, classes)
    q, p = log_q.exp(), log_p.exp()
    torch.sub(q, p, out=gradient)
    soft = _cross(p, log_q)  # (rows,)
    terms = _terms(student, teacher, labels, log_q, log_p, p, soft, gradient) if watch else losses.new_zeros(0)
    if temperature == 1:
        losses.copy_(soft)
    else:
        soft_log_q, soft_p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
        losses.copy_(_cross(soft_p, soft_log_q)).mul_(temperature**2)
        # d(T^2 x soft)/dz = T^2 x (q - p) / T
        torch.sub(soft_log_q.exp_(), soft_p, out=gradient).mul_(temperature)
    if label_weight:
        target = _target(labels)  # (rows, 1)
        losses.sub_(log_q.gather(-1, target).squeeze(-1), alpha=label_weight)
        gradient.add_(q, alpha=label_weight)
        gradient.scatter_add_(-1, target, torch.full_like(target, -label_weight, dtype=gradient.dtype))
    return terms


def _terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    log_q: Tensor,
    log_p: Tensor,
    p: Tensor,
    soft: Tensor,
    difference: Tensor,
) -> Tensor:
    """(terms,), summed over the rows whose label counts; `difference` is q - p."""
    target = _target(labels)  # (rows, 1)
    on_target = difference.gather(-1, target).squeeze(-1)  # (rows,)
    entropy = _cross(p, log_p)
    values = torch.stack(
        [
            -log_q.gather(-1, target).squeeze(-1),
            soft - entropy,
            (student.argmax(-1) == teacher.argmax(-1)).to(p.dtype),
            entropy,
            on_target.abs(),
            (torch.linalg.vector_norm(difference, dim=-1).square() - on_target.square()).clamp_min(0).sqrt(),
            torch.ones_like(entropy),
        ]
    )  # (terms, rows)
    return values.where(labels >= 0, 0).sum(-1)


def _target(labels: Tensor) -> Tensor:
    """A class for every row, any for those that do not count: (rows, 1)."""
    return labels.clamp_min(0).unsqueeze(-1)


def _cross(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum_i p_i log q_i of every row, where 0 x log 0 is 0: a class that the teacher rules out adds nothing."""
    impossible = p == 0
    # Looking whether there is any costs a CUDA device a wait, and a CPU less than masking for nothing.
    if p.device.type != "cpu" or bool(impossible.any()):
        log_q = log_q.masked_fill(impossible, 0)
    return -(p * log_q).sum(-1)
