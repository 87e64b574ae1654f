"""The sums of a micro-batch, in the few operations of a small batch and block by block, against its items."""

import pytest
import torch

from born_again.objectives import OBJECTIVES, distillation_metrics, fused, item_loss, objective_items
from born_again.objectives.fused import fused_loss_sums

ITEMS, CLASSES = 13, 7
SETTINGS = {
    "label": {},
    "ban": {},
    "ban+l": {"label_weight": 0.7},
    "cwtm": {},
    "dkpp": {"permutation": "fixed"},
    "ban, annealed": {"label_share": 0.3},
    "ban, tempered": {"temperature": 3.0},
    "ban+l, smoothed": {"label_smoothing": 0.2},
}


def objective_sums(
    objective, student, teacher, target, *, generator=None, all_count=False, with_metrics=False, **settings
):
    loss = item_loss(objective, **settings)
    how = {"generator": generator, "all_count": all_count, "with_metrics": with_metrics}
    return fused_loss_sums(loss, student, teacher, target, **how)


@pytest.fixture(params=["small", "by blocks"])
def form(request, monkeypatch):
    if request.param == "by blocks":
        monkeypatch.setattr(fused, "_SMALL", {"cpu": 0, "other": 0})
        monkeypatch.setattr(fused, "_CPU_BLOCK", -(-3 * CLASSES // torch.get_num_threads()))
    return request.param


def logits(seed, dtype=torch.float64):
    return torch.randn(ITEMS, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(*ignored):
    target = torch.arange(ITEMS) % CLASSES
    target[list(ignored)] = -100
    return target


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ignored", [(), (0, 5)], ids=["all count", "some are ignored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_and_gradient_are_those_of_the_items(form, name, ignored, dtype):
    objective = name.partition(",")[0]
    teacher = None if objective == "label" else logits(2, dtype)
    ours, theirs = (logits(1, dtype).requires_grad_() for _ in range(2))
    target, settings = labels(*ignored), SETTINGS[name]
    generators = (torch.Generator().manual_seed(4) for _ in range(2))
    losses, weights = objective_items(objective, theirs, teacher, target, generator=next(generators), **settings)
    total, weight, metrics = objective_sums(
        objective, ours, teacher, target, generator=next(generators), all_count=not ignored, **settings
    )
    assert metrics is None
    if not ignored and objective != "cwtm":
        assert weight == ITEMS and isinstance(weight, float)
    tolerance = {"rtol": 1e-13 if dtype == torch.float64 else 1e-6, "atol": 0}
    torch.testing.assert_close(total, (losses * weights).sum(), **tolerance)
    torch.testing.assert_close(torch.as_tensor(weight, dtype=weights.dtype), weights.sum(), **tolerance)
    (total / 3).backward()
    ((losses * weights).sum() / 3).backward()
    if objective == "cwtm":  # an item's weight comes before the division, and after it among items
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2 * torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_metrics_are_summed_beside(form, objective):
    student, teacher, target = logits(1), logits(2), labels(3)
    total, weight, metrics = objective_sums(
        objective, student, teacher, target, generator=torch.Generator().manual_seed(4), with_metrics=True
    )
    without = objective_sums(objective, student, teacher, target, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close((total, weight), without[:2])
    for name, value in distillation_metrics(student, teacher, target).items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_a_class_that_both_rule_out_adds_nothing(form):
    student, teacher = logits(1), logits(2)
    expected = objective_sums("ban", student[:, 1:], teacher[:, 1:], None)[0]
    student[:, 0] = teacher[:, 0] = -torch.inf
    torch.testing.assert_close(objective_sums("ban", student, teacher, None)[0], expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nan_comes_out_as_nan_where_it_counts(form, objective):
    student, teacher, target = logits(1).requires_grad_(), logits(2), labels(3)
    with torch.no_grad():
        student[3] = torch.nan
    total = objective_sums(objective, student, teacher, target)[0]
    assert total.isfinite()
    total.backward()
    assert student.grad.isfinite().all() and student.grad[3].eq(0).all()
    with torch.no_grad():
        student[4] = torch.nan
    assert objective_sums(objective, student, teacher, target)[0].isnan()


@pytest.mark.parametrize("objective", SETTINGS)
def test_the_gradient_is_that_of_finite_differences(form, objective):
    teacher = None if objective == "label" else logits(2)

    def total(student):
        generator = torch.Generator().manual_seed(4)
        kind = objective.partition(",")[0]
        return objective_sums(kind, student, teacher, labels(3), generator=generator, **SETTINGS[objective])[0]

    assert torch.autograd.gradcheck(total, logits(1).requires_grad_())


def test_backward_twice_gives_the_same_where_the_graph_is_retained(form):
    student = logits(1).requires_grad_()
    total = objective_sums("ban", student, logits(2), None)[0]
    first = torch.autograd.grad(total, student, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(total, student)[0], first)


def test_no_items_have_no_gradient(form):
    student = logits(1)[:0].requires_grad_()
    total, weight, _ = objective_sums("ban+l", student, logits(2)[:0], labels()[:0])
    total.backward()
    assert total == 0 and weight == 0 and student.grad.shape == (0, CLASSES)


def test_a_label_that_is_no_class_is_an_error():
    with pytest.raises((IndexError, RuntimeError), match="index"):
        objective_sums("label", logits(1), None, labels().add(CLASSES), all_count=True)
