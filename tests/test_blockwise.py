"""One pass over blocks of rows against the same loss written as a chain of tensor operations."""

import pytest
import torch
import torch.nn.functional as F

from born_again import blockwise
from born_again.blockwise import TERMS, distilled_items
from born_again.objectives import OBJECTIVES, distillation_terms, objective_items, watched_items

ITEMS, CLASSES = 13, 7


@pytest.fixture(params=[1, 3, 5, 13, 64], ids=lambda rows: f"{rows} rows in a block")
def rows(request, monkeypatch):
    monkeypatch.setattr(blockwise, "_CPU_BLOCK", request.param * CLASSES)
    return request.param


def logits(seed, dtype=torch.float64):
    return torch.randn(ITEMS, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(*ignored):
    target = torch.arange(ITEMS) % CLASSES
    target[list(ignored)] = -100
    return target


def chain(student, teacher, target, temperature, label_weight):
    soft = F.cross_entropy(student / temperature, (teacher / temperature).softmax(-1), reduction="none")
    return temperature**2 * soft + label_weight * F.cross_entropy(student, target, reduction="none")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("label_weight", [0.0, 1.0, 0.3])
def test_losses_and_gradient_are_those_of_the_chain(rows, temperature, label_weight):
    ours, theirs = (logits(1).requires_grad_() for _ in range(2))
    losses, terms = distilled_items(ours, logits(2), labels(), temperature=temperature, label_weight=label_weight)
    expected = chain(theirs, logits(2), labels(), temperature, label_weight)
    weights = torch.linspace(-1, 2, ITEMS, dtype=torch.float64)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert terms is None
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_watched_items_are_the_items_and_the_terms(rows, objective, temperature):
    ours, theirs = (logits(1).requires_grad_() for _ in range(2))
    target = labels(0, 6, 12)
    settings = {"temperature": temperature, "label_weight": 0.7, "permutation": "fixed"}
    losses, weights, terms = watched_items(objective, ours, logits(2), target, **settings)
    expected, expected_weights = objective_items(objective, theirs, logits(2), target, **settings)
    assert losses.equal(expected) and weights.equal(expected_weights)
    losses.mul(weights).sum().backward()
    expected.mul(expected_weights).sum().backward()
    assert ours.grad.equal(theirs.grad) and not ours.grad[[0, 6, 12]].any()
    reference = distillation_terms(logits(1), logits(2), target)
    assert tuple(terms) == TERMS and set(terms) == set(reference)
    for name in TERMS:
        assert not terms[name].requires_grad
        torch.testing.assert_close(terms[name], reference[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_logits_are_widened_and_their_gradient_is_narrow_again(rows, dtype):
    student = logits(1, dtype).requires_grad_()
    losses, terms = distilled_items(student, logits(2, dtype), labels(), label_weight=1.0, watch=True)
    losses.sum().backward()
    wide = logits(1, dtype).float().requires_grad_()
    expected = chain(wide, logits(2, dtype).float(), labels(), 1.0, 1.0)
    expected.sum().backward()
    assert losses.dtype == terms["kd_loss"].dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(student.grad, wide.grad.to(dtype), rtol=1e-2, atol=1e-2)


def test_a_class_that_both_rule_out_adds_nothing(rows):
    student, teacher = logits(1), logits(2)
    student[:, 2] = teacher[:, 2] = -torch.inf
    student.requires_grad_()
    losses, terms = distilled_items(student, teacher, labels().clamp(0, 1), label_weight=1.0, watch=True)
    assert losses.isfinite().all() and all(value.isfinite() for value in terms.values())
    kept = [index for index in range(CLASSES) if index != 2]
    expected = chain(student[:, kept], teacher[:, kept], labels().clamp(0, 1), 1.0, 1.0)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    losses.sum().backward()
    assert student.grad.isfinite().all() and not student.grad[:, 2].any()


def test_nan_comes_out_as_nan(rows):
    student = logits(1)
    student[4, 3] = torch.nan
    losses, _ = distilled_items(student, logits(2), labels(), label_weight=1.0)
    assert losses.isnan().tolist() == [index == 4 for index in range(ITEMS)]


def test_the_gradient_is_that_of_finite_differences(rows):
    def loss(student):
        return distilled_items(student, logits(2), labels(3), temperature=2.0, label_weight=0.5)[0]

    assert torch.autograd.gradcheck(loss, logits(1).requires_grad_())


def test_backward_twice_gives_the_same(rows):
    student = logits(1).requires_grad_()
    total = distilled_items(student, logits(2), labels(), label_weight=1.0)[0].sum()
    (first,) = torch.autograd.grad(total, student, retain_graph=True)
    (second,) = torch.autograd.grad(total, student)
    assert first.equal(second)


def test_no_items_give_no_losses():
    losses, terms = distilled_items(
        torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), watch=True
    )
    assert losses.shape == (0,) and terms["items"] == 0
