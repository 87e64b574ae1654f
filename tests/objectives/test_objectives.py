"""Each loss against a slow twin in float64, its gradient, and the properties that the paper gives it."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from born_again.objectives import (
    IGNORED,
    confidence_weighted_loss,
    dark_knowledge_loss,
    distillation_metrics,
    hard_label_loss,
    objective_items,
    permute_all_but_argmax,
    permuted_dark_knowledge_loss,
)

ITEMS, CLASSES = 7, 5


def softmax_by_hand(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def hard_label_by_hand(student, labels):
    pairs = [
        (softmax_by_hand(row)[label], 1.0) for row, label in zip(student, labels, strict=True) if label != IGNORED
    ]
    return weighted_mean_by_hand([(-math.log(q), weight) for q, weight in pairs])


def dark_knowledge_by_hand(student, teacher, temperature=1.0):
    losses = []
    for z, t in zip(student, teacher, strict=True):
        q = softmax_by_hand([value / temperature for value in z])
        p = softmax_by_hand([value / temperature for value in t])
        losses.append((-sum(a * math.log(b) for a, b in zip(p, q, strict=True)) * temperature**2, 1.0))
    return weighted_mean_by_hand(losses)


def confidence_weighted_by_hand(student, teacher, labels):
    losses = []
    for z, t, label in zip(student, teacher, labels, strict=True):
        if label != IGNORED:
            losses.append((-math.log(softmax_by_hand(z)[label]), max(softmax_by_hand(t))))
    return weighted_mean_by_hand(losses)


def weighted_mean_by_hand(pairs):
    return sum(loss * weight for loss, weight in pairs) / sum(weight for _, weight in pairs)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(ITEMS, CLASSES, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    teacher = torch.randn(ITEMS, CLASSES, dtype=torch.float64, generator=generator).mul_(2)
    labels = torch.tensor([0, 4, IGNORED, 2, 2, IGNORED, 1])
    return student, teacher, labels


def numeric_gradient(function, student, epsilon=1e-6):
    rows = student.tolist()
    gradient = torch.zeros_like(student)
    for item in range(len(rows)):
        for column in range(len(rows[0])):
            values = []
            for sign in (1, -1):
                moved = [row[:] for row in rows]
                moved[item][column] += sign * epsilon
                values.append(function(moved))
            gradient[item, column] = (values[0] - values[1]) / (2 * epsilon)
    return gradient


def assert_value_and_gradient(loss, function, student):
    assert loss.item() == pytest.approx(function(student.tolist()), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, numeric_gradient(function, student.detach()), rtol=1e-6, atol=1e-9)


def test_hard_label_loss_equals_its_twin(logits):
    student, _, labels = logits
    assert_value_and_gradient(
        hard_label_loss(student, labels), lambda z: hard_label_by_hand(z, labels.tolist()), student
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_dark_knowledge_loss_equals_its_twin(logits, temperature):
    student, teacher, _ = logits
    assert_value_and_gradient(
        dark_knowledge_loss(student, teacher, temperature),
        lambda z: dark_knowledge_by_hand(z, teacher.tolist(), temperature),
        student,
    )


def test_confidence_weighted_loss_equals_its_twin(logits):
    student, teacher, labels = logits
    assert_value_and_gradient(
        confidence_weighted_loss(student, teacher, labels),
        lambda z: confidence_weighted_by_hand(z, teacher.tolist(), labels.tolist()),
        student,
    )


@pytest.mark.parametrize("permutation", ["fresh", "fixed"])
def test_permuted_dark_knowledge_loss_equals_its_twin(logits, permutation):
    student, teacher, _ = logits
    shuffled = permute_all_but_argmax(teacher, permutation, torch.Generator().manual_seed(5))
    assert not torch.equal(shuffled, teacher)
    assert_value_and_gradient(
        permuted_dark_knowledge_loss(student, teacher, permutation, torch.Generator().manual_seed(5)),
        lambda z: dark_knowledge_by_hand(z, shuffled.tolist()),
        student,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_check_out_in_every_reduction(logits, reduction):
    student, teacher, labels = logits
    assert gradcheck(lambda z: hard_label_loss(z, labels, reduction=reduction), student)
    assert gradcheck(lambda z: dark_knowledge_loss(z, teacher, 3.0, reduction=reduction), student)
    assert gradcheck(lambda z: confidence_weighted_loss(z, teacher, labels, reduction=reduction), student)
    assert gradcheck(lambda z: permuted_dark_knowledge_loss(z, teacher, "fixed", reduction=reduction), student)


def test_reductions_are_those_of_cross_entropy_with_weights(logits):
    student, teacher, labels = logits
    weights = teacher.softmax(-1).amax(-1).where(labels != IGNORED, 0)
    items = confidence_weighted_loss(student, teacher, labels, reduction="none")
    assert items.shape == (ITEMS,)
    torch.testing.assert_close(items.sum(), confidence_weighted_loss(student, teacher, labels, reduction="sum"))
    torch.testing.assert_close(items.sum() / weights.sum(), confidence_weighted_loss(student, teacher, labels))
    torch.testing.assert_close(
        dark_knowledge_loss(student, teacher, reduction="none").mean(), dark_knowledge_loss(student, teacher)
    )


def test_gradient_of_ban_is_q_minus_p_over_the_batch(logits):
    student, teacher, _ = logits
    (gradient,) = torch.autograd.grad(dark_knowledge_loss(student, teacher), student)
    torch.testing.assert_close(gradient, (student.softmax(-1) - teacher.softmax(-1)).detach() / ITEMS)


def test_gradient_keeps_its_size_as_the_temperature_rises(logits):
    student, teacher, _ = logits
    norms = [torch.autograd.grad(dark_knowledge_loss(student, teacher, t), student)[0].norm() for t in (50.0, 100.0)]
    assert norms[1] / norms[0] == pytest.approx(1, abs=0.05)


def test_weights_of_cwtm_sum_to_one(logits):
    student, teacher, labels = logits
    losses, weights = objective_items("cwtm", student, teacher, labels)
    shares = weights / weights.sum()
    assert shares.sum().item() == pytest.approx(1)
    assert (shares[labels == IGNORED] == 0).all()
    torch.testing.assert_close((shares * losses).sum(), confidence_weighted_loss(student, teacher, labels))


def test_cwtm_with_an_equally_sure_teacher_is_cross_entropy(logits):
    student, _, labels = logits
    teacher = torch.zeros_like(student).scatter(1, torch.arange(ITEMS).remainder(CLASSES).unsqueeze(1), 3.0)
    torch.testing.assert_close(confidence_weighted_loss(student, teacher, labels), hard_label_loss(student, labels))


@pytest.mark.parametrize("permutation", ["fresh", "fixed"])
def test_dkpp_keeps_the_largest_and_the_others_as_a_set(permutation):
    teacher = torch.randn(500, 6, dtype=torch.float64)
    shuffled = permute_all_but_argmax(teacher, permutation, torch.Generator().manual_seed(1))
    top = teacher.argmax(-1, keepdim=True)
    assert torch.equal(shuffled.argmax(-1, keepdim=True), top)
    assert torch.equal(shuffled.gather(1, top), teacher.gather(1, top))
    # Every row keeps its own values: nothing travels from one sample to another.
    assert torch.equal(shuffled.sort(-1).values, teacher.sort(-1).values)


def test_dkpp_draws_every_order_of_the_others_equally_often():
    teacher = torch.tensor([[9.0, 1.0, 2.0, 3.0]]).repeat(6000, 1)
    shuffled = permute_all_but_argmax(teacher, "fresh", torch.Generator().manual_seed(1))
    orders, counts = shuffled[:, 1:].unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)


def test_fixed_permutation_is_one_for_every_item_and_call_and_fresh_is_not():
    ranks = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]).repeat(40, 1)
    generator = torch.Generator().manual_seed(11)
    first, second = (permute_all_but_argmax(ranks, "fixed", generator) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 1
    other_seed = permute_all_but_argmax(ranks, "fixed", torch.Generator().manual_seed(12))
    assert not torch.equal(first, other_seed)
    first, second = (permute_all_but_argmax(ranks, "fresh", generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert len(first.unique(dim=0)) > 30


def test_fresh_permutations_of_one_batch_are_those_of_its_parts():
    teacher = torch.randn(8, 5)
    whole = permute_all_but_argmax(teacher, "fresh", torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    parts = [permute_all_but_argmax(part, "fresh", generator) for part in teacher.split(2)]
    assert torch.equal(whole, torch.cat(parts))


def test_no_gradient_reaches_the_teacher(logits):
    student, teacher, labels = logits
    teacher = teacher.clone().requires_grad_()
    for loss in (
        dark_knowledge_loss(student, teacher),
        confidence_weighted_loss(student, teacher, labels),
        permuted_dark_knowledge_loss(student, teacher),
    ):
        loss.backward()
    assert teacher.grad is None


def test_ignored_items_change_neither_value_nor_gradient(logits):
    student, teacher, labels = logits
    counted = labels != IGNORED
    for objective in ("ban", "ban+l", "cwtm", "dkpp"):
        options = {"permutation": "fixed", "generator": torch.Generator().manual_seed(2)}
        losses, weights = objective_items(objective, student, teacher, labels, **options)
        some, some_weights = objective_items(objective, student[counted], teacher[counted], labels[counted], **options)
        torch.testing.assert_close((losses * weights).sum(), (some * some_weights).sum())
        torch.testing.assert_close(weights.sum(), some_weights.sum())
        (gradient,) = torch.autograd.grad((losses * weights).sum(), student)
        assert (gradient[~counted] == 0).all() and (gradient[counted] != 0).any()


def test_where_every_item_is_ignored_loss_and_gradient_are_zero(logits):
    student, teacher, labels = logits
    nothing = torch.full_like(labels, IGNORED)
    for loss in (hard_label_loss(student, nothing), confidence_weighted_loss(student, teacher, nothing)):
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(logits, dtype):
    student, teacher, labels = (value.detach().to(dtype) if value.is_floating_point() else value for value in logits)
    student.requires_grad_()
    for loss, wide in (
        (hard_label_loss(student, labels), hard_label_loss(student.float(), labels)),
        (dark_knowledge_loss(student, teacher), dark_knowledge_loss(student.float(), teacher.float())),
        (
            confidence_weighted_loss(student, teacher, labels),
            confidence_weighted_loss(student.float(), teacher.float(), labels),
        ),
    ):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, wide)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.dtype == dtype and gradient.isfinite().all()


def test_a_class_that_both_rule_out_adds_nothing():
    student = torch.tensor([[1.0, 0.5, -torch.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.2, 0.9, -torch.inf]], dtype=torch.float64)
    loss = dark_knowledge_loss(student, teacher)
    torch.testing.assert_close(loss, dark_knowledge_loss(student[:, :2], teacher[:, :2]))
    assert torch.autograd.grad(loss, student)[0][0, 2] == 0


def test_terms_are_the_sums_of_their_definitions(logits):
    student, teacher, labels = logits
    metrics = distillation_metrics(student, teacher, labels)
    expected = dict.fromkeys(metrics, 0.0)
    for z, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        if label == IGNORED:
            continue
        q, p = softmax_by_hand(z), softmax_by_hand(t)
        expected["items"] += 1
        expected["ce_loss"] -= math.log(q[label])
        expected["kd_loss"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected["teacher_entropy"] -= sum(a * math.log(a) for a in p)
        expected["teacher_agreement"] += z.index(max(z)) == t.index(max(t))
        expected["importance_weight_norm"] += abs(q[label] - p[label])
        expected["dark_knowledge_norm"] += math.sqrt(
            sum((a - b) ** 2 for i, (a, b) in enumerate(zip(q, p, strict=True)) if i != label)
        )
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-10)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(logits):
    student, _, labels = logits
    metrics = distillation_metrics(student, student.detach(), labels)
    assert metrics["kd_loss"].item() == pytest.approx(0, abs=1e-12)
    assert metrics["teacher_agreement"] == metrics["items"]
    (gradient,) = torch.autograd.grad(dark_knowledge_loss(student, student.detach()), student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_bad_input_is_refused_with_a_sentence(logits):
    student, teacher, labels = logits
    with pytest.raises(ValueError, match="student_logits: got shape .* zero classes"):
        hard_label_loss(torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="student_logits: got shape .* zero items"):
        dark_knowledge_loss(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"expected \(items, classes\); flatten"):
        hard_label_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="teacher_logits: got shape .* expected that of student_logits"):
        dark_knowledge_loss(student, teacher[:, :4])
    with pytest.raises(ValueError, match="student_logits: contains NaN"):
        hard_label_loss(torch.full((1, 2), torch.nan), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="teacher_logits: contains NaN"):
        permuted_dark_knowledge_loss(student, torch.full_like(teacher, torch.nan))
    with pytest.raises(ValueError, match="labels: got shape"):
        confidence_weighted_loss(student, teacher, labels[:3])
    with pytest.raises(ValueError, match="labels: got 5, expected 0 to 4"):
        hard_label_loss(student, labels + 1)
    with pytest.raises(ValueError, match="labels: got -1, expected 0 to 4, or -100"):
        distillation_metrics(student, teacher, torch.full_like(labels, -1))
    with pytest.raises(TypeError, match="labels: got torch.float32, expected class numbers .* labels.long"):
        confidence_weighted_loss(student, teacher, labels.float())
    with pytest.raises(TypeError, match="labels: got torch.float32, expected class numbers .* mixup"):
        hard_label_loss(student, student.softmax(-1).float())
    with pytest.raises(TypeError, match="student_logits: got torch.int64, expected floating point"):
        hard_label_loss(labels.unsqueeze(1), labels)
    with pytest.raises(ValueError, match="temperature: got 0.0, expected a finite number above 0"):
        dark_knowledge_loss(student, teacher, 0.0)
    with pytest.raises(ValueError, match="permutation: got 'random', expected one of 'fresh', 'fixed'"):
        permuted_dark_knowledge_loss(student, teacher, "random")
    with pytest.raises(ValueError, match="reduction: got 'average', expected 'mean', 'sum' or 'none'"):
        dark_knowledge_loss(student, teacher, reduction="average")
    with pytest.raises(ValueError, match="objective: got 'kd', expected one of"):
        objective_items("kd", student, teacher, labels)
