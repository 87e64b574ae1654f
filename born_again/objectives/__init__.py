"""The paper's objectives: pure functions of logits and labels.

Furlanello et al. 2018 (arXiv 1805.04770). Notation: z student logits, t teacher logits, q = softmax(z),
p = softmax(t), * the true class, b the number of items, n the number of classes. An item is whatever carries one
label: an image, a sequence, a token.

Every loss takes logits of shape (items, classes) in any float dtype, computes in float32 or wider, sends no gradient
to the teacher, and reduces as torch.nn.functional.cross_entropy does. Items labelled `IGNORED` count for nothing; a
mean over items that are all ignored is 0, with gradient 0.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from born_again.objectives.fused import IGNORED, ItemLoss, fused_item_losses, max_probabilities
from born_again.objectives.permutations import PERMUTATIONS
from born_again.objectives.permutations import permute_all_but_argmax as permute_all_but_argmax

OBJECTIVES = ("ban", "ban+l", "cwtm", "dkpp")
OBJECTIVES_WITH_LABELS = ("ban+l", "cwtm")


def hard_label_loss(student_logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy with the labels, what generation 0 is trained on.

    Args:
        student_logits: (items, classes), any float dtype.
        labels: (items,), any integer dtype, `IGNORED` (-100) for items that do not count.
        reduction: "mean" over the items that count, "sum", or "none".

    Returns:
        Nats: a scalar, or (items,) with reduction "none".

    Raises:
        ValueError: shapes that do not fit, no items, no classes, labels out of range, NaN logits.
        TypeError: logits that are no floats, labels that are.

    Example:
        >>> student_logits = torch.randn(3, 10)
        >>> labels = torch.tensor([7, 1, -100])  # the last item does not count
        >>> expected = torch.nn.functional.cross_entropy(student_logits, labels)
        >>> torch.allclose(hard_label_loss(student_logits, labels), expected)
        True
    """
    _check_logits("student_logits", student_logits)
    labels = _checked_labels(labels, student_logits)
    return _reduce(*objective_items("label", student_logits, None, labels), reduction)


def dark_knowledge_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """BAN: soft cross-entropy with the teacher's distribution, -sum_i p_i log q_i (paper, equation 2).

    Multiplied by temperature squared, so that its gradient keeps its size as the temperature rises (Hinton et al.
    2015, arXiv 1503.02531, section 2.1). At temperature 1 the gradient of the mean per logit is (q_i - p_i) / b
    (equation 5).

    Args:
        student_logits: (items, classes), any float dtype.
        teacher_logits: (items, classes), any float dtype; no gradient reaches it.
        temperature: divides both logits; above 0.
        reduction: "mean", "sum" or "none".

    Returns:
        Nats: a scalar, or (items,) with reduction "none".

    Raises:
        ValueError: shapes that do not fit, no items, no classes, NaN logits, temperature not above 0.
        TypeError: logits that are no floats.

    Example:
        >>> student_logits, teacher_logits = torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)
        >>> dark_knowledge_loss(student_logits, teacher_logits).backward()
        >>> q, p = student_logits.softmax(dim=1), teacher_logits.softmax(dim=1)
        >>> torch.allclose(student_logits.grad, (q - p) / 3, atol=1e-6)
        True
    """
    _check_pair(student_logits, teacher_logits)
    _check_temperature(temperature)
    return _reduce(*objective_items("ban", student_logits, teacher_logits, None, temperature=temperature), reduction)


def confidence_weighted_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, reduction: str = "mean"
) -> Tensor:
    """CWTM: cross-entropy with the labels, each item weighted by the teacher's largest probability (equation 10).

    The weight is the teacher's maximum even where the teacher is wrong. As with class weights in
    torch.nn.functional.cross_entropy, "none" and "sum" carry the weight max_i p_i itself, and "mean" is the weighted
    mean of the paper, whose weights sum to 1 over the items that count.

    Args:
        student_logits: (items, classes), any float dtype.
        teacher_logits: (items, classes), any float dtype; no gradient reaches it.
        labels: (items,), any integer dtype, `IGNORED` (-100) for items that do not count.
        reduction: "mean", "sum" or "none".

    Returns:
        Nats: a scalar, or (items,) with reduction "none".

    Raises:
        ValueError: shapes that do not fit, no items, no classes, labels out of range, NaN logits.
        TypeError: logits that are no floats, labels that are.

    Example:
        >>> student_logits, teacher_logits = torch.randn(3, 10), torch.randn(3, 10)
        >>> labels = torch.tensor([7, 1, 4])
        >>> losses = torch.nn.functional.cross_entropy(student_logits, labels, reduction="none")
        >>> weights = teacher_logits.softmax(dim=1).amax(dim=1)
        >>> expected = (weights * losses).sum() / weights.sum()
        >>> torch.allclose(confidence_weighted_loss(student_logits, teacher_logits, labels), expected)
        True
    """
    _check_pair(student_logits, teacher_logits)
    labels = _checked_labels(labels, student_logits)
    return _reduce(*objective_items("cwtm", student_logits, teacher_logits, labels), reduction)


def permuted_dark_knowledge_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    permutation: str = "fresh",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """DKPP: soft cross-entropy with a teacher whose non-argmax probabilities are permuted (equation 11).

    The argmax of each item stays in place, the other n - 1 probabilities are permuted within the item. The paper does
    not say whether the permutation is drawn again, so both readings are offered.

    Args:
        student_logits: (items, classes), any float dtype.
        teacher_logits: (items, classes), any float dtype; no gradient reaches it.
        permutation: "fresh" draws a permutation for every item of every call from `generator`; "fixed" uses one
            permutation of the other n - 1 positions, drawn from the generator's initial seed, for every item and call.
        generator: on the device of the logits for "fresh"; torch's default generator when None.
        reduction: "mean", "sum" or "none".

    Returns:
        Nats: a scalar, or (items,) with reduction "none".

    Raises:
        ValueError: shapes that do not fit, no items, no classes, NaN logits, an unknown permutation.
        TypeError: logits that are no floats.

    Example:
        >>> student_logits, teacher_logits = torch.randn(3, 10), torch.randn(3, 10)
        >>> generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        >>> drawn = [permuted_dark_knowledge_loss(student_logits, teacher_logits, generator=g) for g in generators]
        >>> torch.equal(*drawn)  # the same permutations from the same seed
        True
        >>> pairs = student_logits[:, :2], teacher_logits[:, :2]  # of two classes there is nothing to permute
        >>> torch.allclose(permuted_dark_knowledge_loss(*pairs), dark_knowledge_loss(*pairs))
        True
    """
    _check_pair(student_logits, teacher_logits)
    if permutation not in PERMUTATIONS:
        raise ValueError(f"permutation: got {permutation!r}, expected one of {', '.join(map(repr, PERMUTATIONS))}.")
    items = objective_items("dkpp", student_logits, teacher_logits, None, permutation=permutation, generator=generator)
    return _reduce(*items, reduction)


def objective_items(
    objective: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    temperature: float = 1.0,
    label_weight: float = 1.0,
    permutation: str = "fresh",
    label_smoothing: float = 0.0,
    label_share: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-item losses and weights, unreduced, so that a caller can reduce over more than one batch.

    The loss of an optimisation step is sum(weight x loss) / sum(weight) over all of its items, wherever they are.
    Unlike the public losses it checks no value, so it never synchronises with a CUDA device: NaN comes out as NaN.

    Args:
        objective: "label" (cross-entropy), or one of `OBJECTIVES`; "ban+l" is label_weight x cross-entropy + "ban".
        student_logits: (items, classes), any float dtype.
        teacher_logits: (items, classes), any float dtype; None for "label".
        labels: (items,), int64; None means that every item counts ("ban" and "dkpp" only).
        temperature: of "ban" and "ban+l".
        label_weight: of "ban+l".
        permutation: of "dkpp".
        label_smoothing: of the label's term, where the objective has one: the share of its distribution that is spread
            evenly over all classes, 0 to 1.
        label_share: of "ban", 0 to 1: the target is (1 - label_share) x teacher + label_share x label. It rises over
            a training with teacher annealing (Clark et al. 2019, BAM, arXiv 1907.04829, section 2).
        generator: of "dkpp".

    Returns:
        (items,) losses in nats and (items,) weights, float32 or wider; both are 0 where the label is `IGNORED`.
    """
    loss = item_loss(objective, temperature, label_weight, permutation, label_smoothing, label_share)
    return fused_item_losses(loss, student_logits, teacher_logits, labels, generator=generator)[:2]


def objective_items_and_metrics(
    objective: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    label_weight: float = 1.0,
    permutation: str = "fresh",
    label_smoothing: float = 0.0,
    label_share: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`objective_items` and `distillation_metrics` of the same items, in one fused pass.

    Args:
        objective: one of `OBJECTIVES`.
        student_logits: (items, classes), any float dtype.
        teacher_logits: (items, classes), any float dtype.
        labels: (items,), int64.
        temperature: and the others, as of `objective_items`.
        label_weight: likewise.
        permutation: likewise.
        label_smoothing: likewise.
        label_share: likewise.
        generator: likewise.

    Returns:
        Losses and weights, as from `objective_items`, and the metrics, as from `distillation_metrics`.
    """
    loss = item_loss(objective, temperature, label_weight, permutation, label_smoothing, label_share)
    losses, weights, metrics = fused_item_losses(
        loss, student_logits, teacher_logits, labels, generator=generator, with_metrics=True
    )
    return losses, weights, metrics or {}


def item_loss(
    objective: str,
    temperature: float = 1.0,
    label_weight: float = 1.0,
    permutation: str = "fresh",
    label_smoothing: float = 0.0,
    label_share: float = 0.0,
) -> ItemLoss:
    """The per-item loss of an objective.

    Args:
        objective: "label", or one of `OBJECTIVES`.
        temperature: and the others, as of `objective_items`.
        label_weight: likewise.
        permutation: likewise.
        label_smoothing: likewise.
        label_share: likewise.

    Raises:
        ValueError: an unknown objective.
    """
    if objective == "label":
        return ItemLoss(label_weight=1.0, label_smoothing=label_smoothing)
    if objective == "ban":
        return ItemLoss(
            soft_targets=True,
            temperature=temperature,
            soft_weight=1 - label_share,
            label_weight=label_share,
            label_smoothing=label_smoothing,
        )
    if objective == "ban+l":
        return ItemLoss(
            soft_targets=True, temperature=temperature, label_weight=label_weight, label_smoothing=label_smoothing
        )
    if objective == "cwtm":
        return ItemLoss(label_weight=1.0, confidence_weighted=True, label_smoothing=label_smoothing)
    if objective == "dkpp":
        return ItemLoss(soft_targets=True, permutation=permutation)
    raise ValueError(f"objective: got {objective!r}, expected one of {', '.join(map(repr, OBJECTIVES))}.")


def item_weights(objective: str, teacher_logits: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """The weight of each item in the mean: 1, the teacher's largest probability for "cwtm", 0 where ignored.

    Args:
        objective: "label", or one of `OBJECTIVES`.
        teacher_logits: (items, classes), any float dtype; read by "cwtm" alone.
        labels: (items,), int64, `IGNORED` for items that do not count; None where every item counts.

    Returns:
        (items,) float32 or wider, or None where every item weighs 1.
    """
    if objective == "cwtm":
        return max_probabilities(cast(Tensor, teacher_logits).detach()).where(labels != IGNORED, 0)
    return None if labels is None else (labels != IGNORED).float()


@torch.no_grad()
def distillation_metrics(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The metrics that are logged while a student learns, summed over the items that count, at temperature 1.

    The gradient of equation 7 splits, per item, into an importance weight q_* - p_* on the true class and the dark
    knowledge (q_i - p_i), i != *, on the others; the norms of the two parts are returned.

    Args:
        student_logits: (items, classes), any float dtype.
        teacher_logits: (items, classes), any float dtype.
        labels: (items,), any integer dtype, `IGNORED` for items that do not count.

    Returns:
        Scalars on the device of the logits: `ce_loss` (cross-entropy with the labels, nats), `kd_loss` (KL(p || q),
        nats), `teacher_agreement` (items whose argmax is the teacher's), `teacher_entropy` (nats),
        `importance_weight_norm`, `dark_knowledge_norm`, and `items`, how many were summed.

    Raises:
        ValueError: shapes that do not fit, labels out of range.
        TypeError: labels that are floats.
    """
    labels = _checked_labels(labels, student_logits)
    counted = labels != IGNORED  # (items,)
    target = labels.where(counted, 0).unsqueeze(-1)  # (items, 1)
    log_q = widened(student_logits).log_softmax(-1)
    log_p = widened(teacher_logits).log_softmax(-1)
    p = log_p.exp()
    difference = log_q.exp().sub_(p)  # (items, classes)
    on_target = difference.gather(-1, target).squeeze(-1)  # (items,)
    impossible = p == 0  # 0 x log 0 is 0 in an entropy
    metrics = {
        "ce_loss": -log_q.gather(-1, target).squeeze(-1),
        "kd_loss": (p * (log_p - log_q).masked_fill_(impossible, 0)).sum(-1),
        "teacher_agreement": (student_logits.argmax(-1) == teacher_logits.argmax(-1)).to(p.dtype),
        "teacher_entropy": -(p * log_p.masked_fill_(impossible, 0)).sum(-1),
        "importance_weight_norm": on_target.abs(),
        "dark_knowledge_norm": difference.scatter_(-1, target, 0).norm(dim=-1),
        "items": torch.ones_like(on_target),
    }
    return {name: values.where(counted, 0).sum() for name, values in metrics.items()}


def widened(logits: Tensor) -> Tensor:
    """The logits, of any float dtype, in float32, or wider where they are.

    Args:
        logits: (..., classes), any float dtype.
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def _reduce(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    weighted = losses * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if reduction == "mean":
        return weighted.sum() / at_least_tiny(weights.sum())
    raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'.")


def at_least_tiny(total_weight: Tensor) -> Tensor:
    """The divisor of a weighted mean: where nothing counts, 0 / tiny is 0 instead of NaN.

    Args:
        total_weight: scalar, any float dtype.
    """
    return total_weight.clamp_min(torch.finfo(total_weight.dtype).tiny)


def _check_logits(name: str, logits: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"{name}: got {logits.dtype}, expected floating point logits, not probabilities or labels.")
    if logits.dim() != 2:
        raise ValueError(
            f"{name}: got shape {tuple(logits.shape)}, expected (items, classes); flatten batch and time with "
            "logits.reshape(-1, classes)."
        )
    if logits.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, zero classes; a loss needs at least one.")
    if logits.shape[0] == 0:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, zero items; leave empty batches out.")
    if logits.isnan().any():
        raise ValueError(f"{name}: contains NaN; lower the learning rate or look at the inputs of the network.")


def _check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    _check_logits("student_logits", student_logits)
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits: got shape {tuple(teacher_logits.shape)}, expected that of student_logits, "
            f"{tuple(student_logits.shape)}: teacher and student must see the same items and know the same classes."
        )
    _check_logits("teacher_logits", teacher_logits)


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """The labels as int64."""
    items, classes = logits.shape
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"labels: got {labels.dtype}, expected class numbers of an integer dtype; use labels.long() for class "
            "numbers that are stored as floats. Soft labels, as mixup and CutMix make them, have no loss here."
        )
    if labels.shape != (items,):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({items},), one for each row of logits.")
    labels = labels.long()
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if outside.any():
        raise ValueError(
            f"labels: got {labels[outside][0].item()}, expected 0 to {classes - 1}, or {IGNORED} to ignore an item."
        )
    return labels


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number above 0; the paper uses 1.")
