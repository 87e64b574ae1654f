"""One pass over blocks of rows against the same loss written as a chain of tensor operations."""

import pytest
import torch
import torch.nn.functional as F

from born_again.objectives import (
    OBJECTIVES,
    distillation_metrics,
    fused,
    item_loss,
    objective_items,
    objective_items_and_metrics,
)
from born_again.objectives.fused import METRICS, ItemLoss, fused_item_losses, max_probabilities
from born_again.objectives.permutations import permute_all_but_argmax

ITEMS, CLASSES = 13, 7


@pytest.fixture(params=[1, 3, 5, 13, 64], ids=lambda rows: f"{rows} rows in a block")
def rows(request, monkeypatch):
    monkeypatch.setattr(fused, "_CPU_BLOCK", -(-request.param * CLASSES // torch.get_num_threads()))
    return request.param


def logits(seed, dtype=torch.float64):
    return torch.randn(ITEMS, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LOSSES = {objective: item_loss(objective, 1.0, 0.7, "fixed") for objective in ("label", *OBJECTIVES)}


def labels(*ignored):
    target = torch.arange(ITEMS) % CLASSES
    target[list(ignored)] = -100
    return target


def chain(student, teacher, target, temperature, label_weight):
    soft = F.cross_entropy(student / temperature, (teacher / temperature).softmax(-1), reduction="none")
    return temperature**2 * soft + label_weight * F.cross_entropy(student, target, reduction="none")


def chain_of(objective, student, teacher, target):
    """Losses and weights of `LOSSES` by a chain of tensor operations."""
    weights = (target >= 0).to(student.dtype)
    hard = F.cross_entropy(student, target, reduction="none")
    if objective == "label":
        return hard, weights
    if objective == "cwtm":
        return hard, weights * teacher.softmax(-1).amax(-1)
    if objective == "dkpp":
        teacher = permute_all_but_argmax(teacher, "fixed", torch.Generator().manual_seed(4))
    return chain(student, teacher, target, 1.0, 0.7 if objective == "ban+l" else 0.0).where(target >= 0, 0), weights


@pytest.mark.parametrize("with_metrics", [False, True])
@pytest.mark.parametrize("objective", LOSSES)
def test_losses_weights_and_gradient_are_those_of_the_chain(rows, objective, with_metrics):
    ours, theirs = (logits(1).requires_grad_() for _ in range(2))
    target, generator = labels(0, 6, 12), torch.Generator().manual_seed(4)
    losses, weights, metrics = fused_item_losses(
        LOSSES[objective], ours, logits(2), target, generator=generator, with_metrics=with_metrics
    )
    expected, expected_weights = chain_of(objective, theirs, logits(2), target)
    scale = torch.linspace(-1, 2, ITEMS, dtype=torch.float64)
    (losses * scale).sum().backward()
    (expected * scale).sum().backward()
    assert (metrics is not None) == with_metrics and not weights.requires_grad
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("label_weight", [0.0, 1.0, 0.3])
def test_temperature_and_label_weight(rows, temperature, label_weight):
    loss = ItemLoss(soft_targets=True, temperature=temperature, label_weight=label_weight)
    for target in (labels(), None) if label_weight == 0 else (labels(),):
        ours, theirs = (logits(1).requires_grad_() for _ in range(2))
        losses, weights, _ = fused_item_losses(loss, ours, logits(2), target)
        expected = chain(theirs, logits(2), labels(), temperature, label_weight)
        losses.sum().backward()
        expected.sum().backward()
        assert weights.eq(1).all()
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_metrics", [False, True])
@pytest.mark.parametrize(("temperature", "share", "smoothing"), [(1, 0.3, 0), (4, 0.3, 0.1), (1, 0, 0.1), (1, 1, 1)])
def test_target_between_teacher_and_smoothed_label(rows, temperature, share, smoothing, with_metrics):
    ours, theirs = (logits(1).requires_grad_() for _ in range(2))
    settings = {"temperature": temperature, "label_share": share, "label_smoothing": smoothing}
    items = objective_items_and_metrics if with_metrics else objective_items
    losses = items("ban", ours, logits(2), labels(), **settings)[0]
    one_hot = F.one_hot(labels(), CLASSES).double()
    smoothed = (1 - smoothing) * one_hot + smoothing / CLASSES
    soft = -((logits(2) / temperature).softmax(-1) * (theirs / temperature).log_softmax(-1)).sum(-1) * temperature**2
    expected = (1 - share) * soft - share * (smoothed * theirs.log_softmax(-1)).sum(-1)
    scale = torch.linspace(-1, 2, ITEMS, dtype=torch.float64)
    (losses * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_items_with_metrics_are_the_items_and_the_metrics(rows, objective, temperature):
    ours, theirs = (logits(1).requires_grad_() for _ in range(2))
    target = labels(0, 6, 12)
    settings = {"temperature": temperature, "label_weight": 0.7, "permutation": "fixed"}
    losses, weights, metrics = objective_items_and_metrics(objective, ours, logits(2), target, **settings)
    expected, expected_weights = objective_items(objective, theirs, logits(2), target, **settings)
    assert losses.equal(expected) and weights.equal(expected_weights)
    losses.mul(weights).sum().backward()
    expected.mul(expected_weights).sum().backward()
    assert ours.grad.equal(theirs.grad) and not ours.grad[[0, 6, 12]].any()
    reference = distillation_metrics(logits(1), logits(2), target)
    assert tuple(metrics) == METRICS and set(metrics) == set(reference)
    for name in METRICS:
        assert not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name], reference[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("objective", LOSSES)
def test_narrow_logits_are_widened_and_their_gradient_is_narrow_again(rows, objective, dtype):
    student = logits(1, dtype).requires_grad_()
    losses, weights, metrics = fused_item_losses(
        LOSSES[objective],
        student,
        logits(2, dtype),
        labels(3),
        generator=torch.Generator().manual_seed(4),
        with_metrics=True,
    )
    losses.mul(weights).mean().backward()
    wide = logits(1, dtype).float().requires_grad_()
    expected, expected_weights = chain_of(objective, wide, logits(2, dtype).float(), labels(3))
    expected.mul(expected_weights).mean().backward()
    assert losses.dtype == weights.dtype == metrics["kd_loss"].dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, wide.grad.to(dtype), rtol=1e-2, atol=1e-3)


def test_ties_agree_as_argmax_does(rows):
    student, teacher = (logits(seed).mul(2).round() for seed in (1, 2))  # few values, many ties
    metrics = fused_item_losses(ItemLoss(soft_targets=True), student, teacher, labels(), with_metrics=True)[2]
    assert metrics["teacher_agreement"] == (student.argmax(-1) == teacher.argmax(-1)).sum()


def test_a_class_that_both_rule_out_adds_nothing(rows):
    for loss in (
        ItemLoss(soft_targets=True, label_weight=1.0),
        ItemLoss(soft_targets=True, temperature=2.0, label_weight=1.0),
    ):
        student, teacher = logits(1), logits(2)
        student[:, 2] = teacher[:, 2] = -torch.inf
        student.requires_grad_()
        losses, _, metrics = fused_item_losses(loss, student, teacher, labels().clamp(0, 1), with_metrics=True)
        assert losses.isfinite().all() and all(value.isfinite() for value in metrics.values())
        kept = [index for index in range(CLASSES) if index != 2]
        expected = chain(student[:, kept], teacher[:, kept], labels().clamp(0, 1), loss.temperature, 1.0)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
        losses.sum().backward()
        assert student.grad.isfinite().all() and not student.grad[:, 2].any()


def test_a_class_that_the_student_alone_rules_out_costs_infinitely_much(rows):
    student = logits(1)
    student[4, 2] = -torch.inf
    losses = fused_item_losses(ItemLoss(soft_targets=True), student, logits(2), labels())[0]
    assert losses.isinf().tolist() == [index == 4 for index in range(ITEMS)]


@pytest.mark.parametrize("objective", LOSSES)
def test_nan_comes_out_as_nan_where_it_counts(rows, objective):
    student = logits(1)
    student[[4, 5], 3] = torch.nan
    student.requires_grad_()
    losses = fused_item_losses(LOSSES[objective], student, logits(2), labels(5))[0]
    assert losses.isnan().tolist() == [index == 4 for index in range(ITEMS)]
    losses.sum().backward()
    assert student.grad.isnan().any(-1).tolist() == [index == 4 for index in range(ITEMS)]


def test_a_label_that_is_no_class_is_an_error():
    for wrong in (CLASSES, -1):
        target = labels()
        target[3] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            fused_item_losses(LOSSES["label"], logits(1), None, target)


@pytest.mark.parametrize("objective", LOSSES)
def test_the_gradient_is_that_of_finite_differences(rows, objective):
    def loss(student):
        generator = torch.Generator().manual_seed(4)
        return fused_item_losses(LOSSES[objective], student, logits(2), labels(3), generator=generator)[0]

    assert torch.autograd.gradcheck(loss, logits(1).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_backward_twice_gives_the_same_where_the_graph_is_retained(rows, dtype):
    student = logits(1, dtype).requires_grad_()
    total = fused_item_losses(LOSSES["ban+l"], student, logits(2, dtype), labels())[0].mean()
    (first,) = torch.autograd.grad(total, student, retain_graph=True)
    (second,) = torch.autograd.grad(total, student, retain_graph=True)
    (third,) = torch.autograd.grad(total, student)
    assert first.equal(second) and first.equal(third)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_a_narrow_gradient_has_the_same_bits_whether_all_items_are_scaled_alike_or_each_by_itself(rows):
    scale = torch.full((ITEMS,), 0.3, dtype=torch.float32)
    for ours in (scale, torch.cat([scale[1:], torch.tensor([0.7])])):
        student = logits(1, torch.bfloat16).requires_grad_()
        losses, *_ = fused_item_losses(LOSSES["ban+l"], student, logits(2, torch.bfloat16), labels())
        (kept,) = torch.autograd.grad(losses.sum(), student, retain_graph=True)
        (losses * ours).sum().backward()
        assert student.grad.equal((kept.float() * ours.unsqueeze(-1)).to(torch.bfloat16))


def test_no_items_have_no_gradient():
    student = logits(1, torch.bfloat16)[:0].requires_grad_()
    losses, *_ = fused_item_losses(LOSSES["ban+l"], student, logits(2, torch.bfloat16)[:0], labels()[:0])
    losses.sum().backward()
    assert len(losses) == 0 and student.grad.shape == (0, CLASSES)


@pytest.mark.parametrize("objective", LOSSES)
def test_logits_far_from_zero_cost_no_digits_of_the_loss(rows, objective):
    """GPT-2's are around -100, and only their differences mean anything."""
    student, teacher = ((logits(seed) + offset).float() for seed, offset in ((1, -1e4), (2, 3e3)))
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    losses, weights, metrics = fused_item_losses(
        LOSSES[objective], student, teacher, labels(3), generator=generators[0], with_metrics=True
    )
    expected, expected_weights, expected_metrics = fused_item_losses(
        LOSSES[objective], student.double(), teacher.double(), labels(3), generator=generators[1], with_metrics=True
    )
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=2e-6, atol=0)
    for name in METRICS:
        torch.testing.assert_close(metrics[name].double(), expected_metrics[name], rtol=1e-5, atol=0, msg=name)


def test_a_second_derivative_is_refused():
    student = logits(1).requires_grad_()
    total = fused_item_losses(LOSSES["ban"], student, logits(2), labels())[0].mean()
    with pytest.raises(RuntimeError, match="create_graph: got True .* differentiable once"):
        torch.autograd.grad(total, student, create_graph=True)


def test_the_saved_gradient_is_returned_without_a_copy(monkeypatch):
    kept = []
    fill = fused.fill_items

    def remember(*args, gradient, **kwargs):
        kept.append(None if gradient is None else gradient.data_ptr())
        return fill(*args, gradient=gradient, **kwargs)

    monkeypatch.setattr(fused, "fill_items", remember)
    student = logits(1).requires_grad_()
    fused_item_losses(LOSSES["ban"], student, logits(2), labels())[0].mean().backward()
    assert kept == [student.grad.data_ptr()]
    with torch.no_grad():
        fused_item_losses(LOSSES["ban"], student, logits(2), labels())
    assert kept[1:] == [None]  # nothing is saved where nothing will be differentiated


def test_largest_probabilities(rows):
    torch.testing.assert_close(max_probabilities(logits(2)), logits(2).softmax(-1).amax(-1), rtol=0, atol=1e-14)
    assert max_probabilities(logits(2, torch.bfloat16)).dtype == torch.float32


def test_no_items_give_no_losses():
    for loss in LOSSES.values():
        losses, weights, metrics = fused_item_losses(
            loss, torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), with_metrics=True
        )
        assert losses.shape == weights.shape == (0,) and metrics["items"] == 0
