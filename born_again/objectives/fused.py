"""The fused loss: per-item losses, gradients, weights and logged metrics in one pass over blocks of rows.

Over a vocabulary of 10,000 tokens the logits of a window are tens of megabytes, and a loss written as a chain of
tensor operations reads and writes them a dozen times. Here a block of rows stays in a processor's cache until it is
done. The only saved tensor of the logits' size is their gradient, which the backward pass scales in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from born_again.objectives.permutations import argmax_column, permute_all_but_column

IGNORED = -100
METRICS = (
    "ce_loss",
    "kd_loss",
    "teacher_agreement",
    "teacher_entropy",
    "importance_weight_norm",
    "dark_knowledge_norm",
    "items",
)
_CPU_BLOCK = 2**18  # logits for each thread: 1 MiB of float32, small enough for a cache, large enough for a call
_DEVICE_BLOCK = 2**26  # fewer, larger launches, and still a bound on memory
# Logits up to which the number of operations decides, and not what they read and write.
_SMALL = {"cpu": 2**14, "other": 2**20}


@dataclass(frozen=True)
class ItemLoss:
    """The per-item loss: cross-entropy with soft targets (paper, equation 2) and cross-entropy with the label.

    Args:
        soft_targets: whether the cross-entropy with the teacher's distribution is in it.
        label_weight: what the cross-entropy with the label is multiplied by.
        soft_weight: what the cross-entropy with the teacher's distribution is multiplied by.
        label_smoothing: share of the label's distribution that is spread evenly over all classes (Szegedy et al. 2016,
            arXiv 1512.00567, section 7).
        temperature: divides both logits of the soft term, which is multiplied by its square.
        confidence_weighted: whether an item's weight is the teacher's largest probability (equation 10) instead of 1.
        permutation: "fresh" or "fixed" where all of the teacher's entries but the argmax are permuted (equation 11),
            at temperature 1; None leaves them in place.
    """

    soft_targets: bool = False
    label_weight: float = 0.0
    soft_weight: float = 1.0
    label_smoothing: float = 0.0
    temperature: float = 1.0
    confidence_weighted: bool = False
    permutation: str | None = None

    @property
    def tempered(self) -> bool:
        """Whether the soft term needs distributions of its own."""
        return self.soft_targets and self.temperature != 1


def fused_item_losses(
    loss: ItemLoss,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    generator: torch.Generator | None = None,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
    """Per-item losses and weights.

    Differentiable once. Unless the graph is retained, the backward pass scales the saved gradient in place and returns
    it.

    Args:
        loss: what to compute.
        student_logits: (items, classes), any float dtype; the only one that a gradient reaches, in its dtype.
        teacher_logits: (items, classes), any float dtype; None where `loss` needs no teacher.
        labels: (items,) int64, `IGNORED` where an item does not count; None counts all, without a label term.
        generator: of the permutation.
        with_metrics: also sum `born_again.objectives.distillation_metrics`; needs a teacher and labels.

    Returns:
        (items,) losses in nats and (items,) weights, float32 or wider, 0 where an item does not count; and the metrics
        by name, or None.
    """
    losses, weights, metrics = _FusedItemLosses.apply(
        student_logits,
        None if teacher_logits is None else teacher_logits.detach(),
        labels,
        loss,
        generator,
        with_metrics,
        torch.is_grad_enabled() and student_logits.requires_grad,
    )
    return losses, weights, named(metrics) if with_metrics else None


def fused_loss_sums(
    loss: ItemLoss,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    all_count: bool = False,
    generator: torch.Generator | None = None,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor | float, dict[str, Tensor] | None]:
    """The sums over items of what `fused_item_losses` gives item by item, in few operations where the batch is small.

    Args:
        loss, student_logits, teacher_logits, labels, generator, with_metrics: see `fused_item_losses`.
        all_count: promises that no label is `IGNORED`.

    Returns:
        sum(weight x loss), a scalar in nats; sum(weight), a number where it is that of the items; and the metrics by
        name, or None.
    """
    if teacher_logits is not None and teacher_logits.requires_grad:
        teacher_logits = teacher_logits.detach()
    differentiable = torch.is_grad_enabled() and student_logits.requires_grad
    arguments = student_logits, teacher_logits, labels, loss, all_count, generator, with_metrics, differentiable
    total, weight, metrics = _FusedLossSums.apply(*arguments)
    all_weigh_one = (all_count or labels is None) and not loss.confidence_weighted
    return total, float(len(student_logits)) if all_weigh_one else weight, named(metrics) if with_metrics else None


def max_probabilities(logits: Tensor) -> Tensor:
    """The largest probability of every row of logits (items, classes): (items,), float32 or wider."""
    wide = working_dtype(logits)
    largest = torch.empty(len(logits), dtype=wide, device=logits.device)
    for rows in blocks(logits):
        largest[rows] = logits[rows].to(wide).softmax(-1).amax(-1)
    return largest


def named(metrics: Tensor) -> dict[str, Tensor]:
    """Metrics by name, of a tensor (metrics,)."""
    return dict(zip(METRICS, metrics.unbind(), strict=True))


def working_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 where the logits are."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def blocks(logits: Tensor) -> Iterator[slice]:
    """Consecutive rows of logits (items, classes), as many as a processor works on at a time."""
    items, classes = logits.shape
    block = _CPU_BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, block // max(classes, 1))
    return (slice(start, start + rows) for start in range(0, items, rows))


def scale_saved_gradient(gradient: Tensor, scale: Tensor) -> Tensor:
    """In a backward pass: a saved gradient times `scale`, float32 or wider: (), or (items, 1).

    In place, unless the graph is retained and may be used again.

    Raises:
        RuntimeError: under create_graph=True.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True in a backward pass through a loss of born_again, which is differentiable once; "
            "write the loss with torch.nn.functional where second derivatives are needed."
        )
    # torch has no public name for this; where the private one is gone, the gradient is copied.
    retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    scaled = torch.empty_like(gradient) if retained else gradient
    if gradient.dtype == scale.dtype:
        return torch.mul(gradient, scale, out=scaled)
    # As a mean over items has it: one scalar multiplies in float32 and rounds once, where a factor for each item takes
    # three passes. The check would synchronise a CUDA device.
    if scale.numel() and scale.device.type == "cpu" and bool((scale == scale.flatten()[0]).all()):
        scale = scale.flatten()[0]
    if not scale.dim():
        return torch.mul(gradient, scale, out=scaled)
    for rows in blocks(gradient):
        scaled[rows] = gradient[rows].to(scale.dtype).mul_(scale[rows])
    return scaled


class _FusedItemLosses(torch.autograd.Function):
    """Saves for the backward pass the gradient of the per-item losses, computed in the forward pass."""

    @staticmethod
    def forward(ctx, student, teacher, labels, loss, generator, with_metrics, differentiable):
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if differentiable else None
        losses, weights, metrics = fill_items(
            loss, student, teacher, labels, gradient=gradient, generator=generator, with_metrics=with_metrics
        )
        if differentiable:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(weights, metrics)
        return losses, weights, metrics

    @staticmethod
    def backward(ctx, grad_losses, *_):
        (gradient,) = ctx.saved_tensors
        return scale_saved_gradient(gradient, grad_losses.unsqueeze(-1)), None, None, None, None, None, None


class _FusedLossSums(torch.autograd.Function):
    """As `_FusedItemLosses`, summed over items."""

    @staticmethod
    def forward(ctx, student, teacher, labels, loss, all_count, generator, with_metrics, differentiable):
        small = _SMALL["cpu" if student.device.type == "cpu" else "other"]
        if student.numel() <= small and not (with_metrics or loss.tempered or loss.label_smoothing):
            total, weight, gradient = _small_sums(loss, student, teacher, labels, all_count, differentiable, generator)
            metrics = None
        else:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if differentiable else None
            losses, weights, metrics = fill_items(
                loss,
                student,
                teacher,
                labels,
                gradient=gradient,
                scale_gradient_by_weight=True,
                generator=generator,
                with_metrics=with_metrics,
            )
            total, weight = (losses * weights).sum(), weights.sum()
            ctx.mark_non_differentiable(metrics)
        if weight is not None:
            ctx.mark_non_differentiable(weight)
        if differentiable:
            ctx.save_for_backward(gradient)
        return total, weight, metrics

    @staticmethod
    def backward(ctx, grad_total, *_):
        (gradient,) = ctx.saved_tensors
        return scale_saved_gradient(gradient, grad_total), *[None] * 7


def _small_sums(
    loss: ItemLoss,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    all_count: bool,
    differentiable: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """sum(weight x loss), sum(weight) unless all items weigh 1, and the gradient of the first.

    The gradient is that of `_block` to the bit; for the losses log_softmax takes fewer operations, and more time each.
    """
    wide = working_dtype(student)
    dtype, student = student.dtype, student.to(wide)
    log_q = student.log_softmax(-1)  # (rows, classes)
    losses = weights = counted = target = p = taught = None
    if labels is not None:
        counted = None if all_count else labels != IGNORED
        target = some_class(labels, counted, student.shape[-1]).unsqueeze(-1)  # (rows, 1)
    if teacher is not None:
        p = taught = teacher.to(wide).softmax(-1)
    if loss.permutation is not None:
        taught = torch.empty_like(p)
        permute_all_but_column(p, argmax_column(teacher), loss.permutation, generator, taught)
    if loss.soft_targets:
        losses = _soft_sums(taught, log_q) * loss.soft_weight if loss.soft_weight != 1 else _soft_sums(taught, log_q)
    if loss.label_weight:
        hard = log_q.gather(-1, target).squeeze(-1)
        hard = hard if loss.label_weight == 1 else hard * loss.label_weight
        losses = hard if losses is None else losses + hard
    if loss.confidence_weighted:
        weights = p.amax(-1)
    if counted is not None:
        losses = losses.where(counted, 0)
        weights = counted.to(wide) if weights is None else weights.where(counted, 0)
    total = -(losses * weights if loss.confidence_weighted else losses).sum()
    gradient = None
    if differentiable:
        gradient = student.softmax(-1)
        _to_gradient(loss, gradient, taught, target)
        if loss.confidence_weighted:
            gradient.mul_(weights.unsqueeze(-1))
        if counted is not None:
            gradient.masked_fill_(~counted.unsqueeze(-1), 0)
        gradient = gradient.to(dtype)
    return total, None if weights is None else weights.sum(), gradient


def _soft_sums(p: Tensor, log_q: Tensor) -> Tensor:
    """sum_i p_i log q_i of every row, where 0 x log 0 is 0."""
    products = p * log_q
    sums = products.sum(-1)
    # As in `_cross_entropy`; the sum of all is not finite where one is not.
    if products.device.type != "cpu" or not math.isfinite(sums.sum().item()):
        sums = products.masked_fill_(p == 0, 0).sum(-1)
    return sums


def fill_items(
    loss: ItemLoss,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    *,
    gradient: Tensor | None = None,
    scale_gradient_by_weight: bool = False,
    generator: torch.Generator | None = None,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, weights, summed metrics and the gradient of the losses, outside of autograd.

    Args:
        loss: see `fused_item_losses`.
        student: (items, classes).
        teacher: (items, classes) or None.
        labels: (items,) or None.
        gradient: (items, classes) of any float dtype, to be filled with each item's gradient; may be `student` itself.
        scale_gradient_by_weight: multiplies each item's gradient by its weight.
        generator: see `fused_item_losses`.
        with_metrics: see `fused_item_losses`.

    Returns:
        (items,) losses, (items,) weights and (metrics,) sums, empty without `with_metrics`.
    """
    wide = working_dtype(student)
    losses, weights = (torch.empty(len(student), dtype=wide, device=student.device) for _ in range(2))
    metrics = torch.zeros(len(METRICS) if with_metrics else 0, dtype=wide, device=student.device)
    workspace = _Workspace(wide)
    for rows in blocks(student):
        z = workspace.widened("student", student[rows])
        place = None if gradient is None else gradient[rows]
        # The gradient is computed in place, unless its tensor is too narrow or holds the logits.
        fits = place is not None and place.dtype == wide and place.data_ptr() != z.data_ptr()
        work = place if fits else workspace.buffer("work", z)
        losses[rows], weights[rows], block_metrics = _block(
            loss,
            z,
            None if teacher is None else workspace.widened("teacher", teacher[rows]),
            None if labels is None else labels[rows],
            work,
            workspace,
            gradient is not None,
            generator,
            with_metrics,
        )
        if with_metrics:
            metrics += block_metrics
        if place is not None:
            if scale_gradient_by_weight and loss.confidence_weighted:
                work.mul_(weights[rows].unsqueeze(-1))
            if not fits:
                place.copy_(work)
    return losses, weights, metrics


class _Workspace:
    """Workspace buffers of a block's size, reused by every block: an allocator would free them in between."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: Tensor) -> Tensor:
        """The buffer of a name, uninitialised, in the shape of `rows` (rows, classes)."""
        if name not in self._tensors:
            self._tensors[name] = torch.empty(rows.shape, dtype=self._dtype, device=rows.device)
        return self._tensors[name][: len(rows)]

    def widened(self, name: str, rows: Tensor) -> Tensor:
        """The rows in the wide dtype, copied to the buffer of a name where they are narrower."""
        return rows if rows.dtype == self._dtype else self.buffer(name, rows).copy_(rows)


def some_class(labels: Tensor, counted: Tensor | None, classes: int) -> Tensor:
    """Labels, and any class for those that do not count; None counts all.

    On a device other than a CPU also for labels that are no class, whose kernels would end the process on them; there
    `born_again.training.checks` reports them.
    """
    if labels.device.type != "cpu":
        return labels.clamp(0, classes - 1)
    return labels if counted is None else labels.where(counted, 0)


def _block(
    loss: ItemLoss,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    work: Tensor,
    workspace: _Workspace,
    differentiable: bool,
    generator: torch.Generator | None,
    with_metrics: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, weights and summed metrics of some rows; `work` (rows, classes) receives the gradient of the losses."""
    counted = target = p = p_scale = taught = top = cross = difference = metrics = None
    at_one = loss.soft_targets and not loss.tempered  # the soft term at temperature 1
    spare = workspace.buffer("spare", student)
    q = torch.softmax(student, -1, out=work)  # (rows, classes)
    q_top = argmax_column(student) if with_metrics else None
    q_scale = _Scale.of(student, q, q_top)
    losses, weights = student.new_zeros(len(student)), student.new_ones(len(student))
    if labels is not None:
        counted = labels != IGNORED
        target = some_class(labels, counted, student.shape[-1]).unsqueeze(-1)  # (rows, 1)
        hard = -q_scale.log_of(student.gather(-1, target)).squeeze(-1)  # (rows,)
    if loss.permutation is not None or with_metrics:
        top = argmax_column(teacher)
    if at_one or loss.confidence_weighted or with_metrics:
        p = taught = torch.softmax(teacher, -1, out=workspace.buffer("p", student))
    if loss.confidence_weighted or with_metrics:
        p_scale = _Scale.of(teacher, p, top)
    if loss.permutation is not None:
        taught = workspace.buffer("taught", student)
        permute_all_but_column(p, top, loss.permutation, generator, taught)
    if with_metrics or (at_one and taught is p):
        cross = _cross_entropy(p, student, q_scale, spare)
    if loss.confidence_weighted:
        weights = p_scale.probability.squeeze(-1)
    if loss.tempered:
        soft, soft_gradient = _tempered(student, teacher, loss.temperature, spare)
        losses = losses + soft * loss.soft_weight
    elif loss.soft_targets:
        soft = cross if taught is p else _cross_entropy(taught, student, q_scale, spare)
        losses = losses + soft * loss.soft_weight
    if loss.label_weight:
        term = hard if not loss.label_smoothing else _smoothed(hard, student, q_scale, loss.label_smoothing)
        losses = losses + term * loss.label_weight

    if with_metrics:
        entropy = _cross_entropy(p, teacher, p_scale, spare)
        agreement = (q_top == top).squeeze(-1).to(p.dtype)
        difference = torch.sub(q, p, out=spare)
        metrics = _sum_metrics(hard, cross, agreement, entropy, difference, target, counted)
    if differentiable:
        _to_gradient(loss, q, taught, target)
        if loss.tempered:
            q.add_(soft_gradient, alpha=loss.soft_weight)
    if counted is not None:
        losses, weights = losses.where(counted, 0), weights.where(counted, 0)
        # As with classes of probability 0: a check is cheap on a CPU.
        if differentiable and (work.device.type != "cpu" or not bool(counted.all())):
            work.masked_fill_(~counted.unsqueeze(-1), 0)
    return losses, weights, metrics


def _to_gradient(loss: ItemLoss, q: Tensor, taught: Tensor | None, target: Tensor | None) -> None:
    """In place: the student's probabilities (rows, classes) to the gradient of the losses, but for a tempered term."""
    at_one = loss.soft_targets and not loss.tempered
    # The label's term has w (q - its distribution), the soft one at temperature 1 w (q - p).
    of_q = loss.label_weight + (loss.soft_weight if at_one else 0)
    if of_q != 1:
        q.mul_(of_q)
    if at_one:
        q.sub_(taught, alpha=loss.soft_weight)
    if loss.label_weight:
        on_label = loss.label_weight * (1 - loss.label_smoothing)
        q.scatter_add_(-1, target, torch.full_like(target, -on_label, dtype=q.dtype))
    if loss.label_weight and loss.label_smoothing:
        q.sub_(loss.label_weight * loss.label_smoothing / q.shape[-1])


@dataclass(frozen=True)
class _Scale:
    """Turns logits into log probabilities: log p_i = logit_i - largest + log(probability).

    Args:
        largest: logit of each row, (rows, 1).
        probability: of that logit, (rows, 1).
    """

    largest: Tensor
    probability: Tensor

    @classmethod
    def of(cls, logits: Tensor, probabilities: Tensor, top: Tensor | None = None) -> _Scale:
        """From both (rows, classes), and where it is known the column of the largest, (rows, 1).

        Softmax and two maxima take half as long on a CPU as log_softmax and exp.
        """
        if top is not None:
            return cls(logits.gather(-1, top), probabilities.gather(-1, top))
        return cls(logits.amax(-1, keepdim=True), probabilities.amax(-1, keepdim=True))

    def log_of(self, logits: Tensor) -> Tensor:
        """Logarithms of the probabilities of some logits (rows, any)."""
        return logits - self.largest + self.probability.log()


def _smoothed(hard: Tensor, student: Tensor, q_scale: _Scale, smoothing: float) -> Tensor:
    """The cross-entropy with the smoothed label of each row, (rows,), from that with the label itself."""
    uniform = -q_scale.log_of(student.mean(-1, keepdim=True)).squeeze(-1)  # mean of -log q_i over the classes
    return (1 - smoothing) * hard + smoothing * uniform


def _tempered(student: Tensor, teacher: Tensor, temperature: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    """The soft term at a temperature, times its square: (rows,), and its gradient (rows, classes)."""
    student, p = student / temperature, (teacher / temperature).softmax(-1)
    q = student.softmax(-1)
    soft = _cross_entropy(p, student, _Scale.of(student, q), spare) * temperature**2
    # d(T^2 x soft)/dz = T^2 x (q - p) / T
    return soft, q.sub_(p).mul_(temperature)


def _sum_metrics(
    hard: Tensor,
    cross: Tensor,
    agreement: Tensor,
    entropy: Tensor,
    difference: Tensor,
    target: Tensor,
    counted: Tensor,
) -> Tensor:
    """(metrics,), summed over the rows that count; `difference` (rows, classes) is q - p at temperature 1."""
    on_target = difference.gather(-1, target).squeeze(-1)  # (rows,)
    squares = torch.linalg.vector_norm(difference, dim=-1).square() - on_target.square()
    values = torch.stack(
        [
            hard,
            cross - entropy,
            agreement,
            entropy,
            on_target.abs(),
            squares.clamp_min(0).sqrt(),
            torch.ones_like(entropy),
        ]
    )  # (metrics, rows)
    return values.where(counted, 0).sum(-1)


def _cross_entropy(p: Tensor, logits: Tensor, scale: _Scale, spare: Tensor) -> Tensor:
    """-sum_i p_i log q_i of every row, q = softmax(logits), where 0 x log 0 is 0.

    So a class of teacher probability 0 adds nothing. `spare` (rows, classes) is a workspace.
    """
    products = torch.sub(logits, scale.largest, out=spare).mul_(p)
    over = products.sum(-1)  # (rows,): up to log(probability), since p sums to 1
    # Checking for them synchronises a CUDA device; on a CPU it costs less than masking for nothing.
    if products.device.type != "cpu" or bool(over.isnan().any()):
        over = products.masked_fill_(p == 0, 0).sum(-1)
    return -(over + scale.probability.log().squeeze(-1))
