"""The loss from hidden states, chunk by chunk, against the same loss from all logits."""

import pytest
import torch

from born_again.objectives import OBJECTIVES, chunked, fused, objective_items, objective_items_and_metrics
from born_again.objectives.chunked import Head, chunked_confidence_weight, chunked_objective

ITEMS, WIDTH, WORDS = 13, 5, 11


@pytest.fixture(params=[1, 4, 13, 64], ids=lambda rows: f"{rows} rows in a chunk")
def rows(request, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK", request.param * WORDS * 8)
    monkeypatch.setattr(chunked, "_SHARE", ITEMS)
    monkeypatch.setattr(fused, "_CPU_BLOCK", -(-3 * WORDS // torch.get_num_threads()))
    return request.param


def head(seed, width=WIDTH, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (ITEMS, width), (WORDS, width), (WORDS,)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return Head(*(part.requires_grad_() for part in (parts if bias else parts[:2])))


def parts(of):
    return [part for part in (of.hidden, of.weight, of.bias) if part is not None]


def plain(of):
    return torch.nn.functional.linear(of.hidden, of.weight, of.bias)


def labels(*ignored):
    target = torch.arange(ITEMS) % WORDS
    target[list(ignored)] = -100
    return target


SETTINGS = {
    "label": {"label_smoothing": 0.1},
    "ban": {"temperature": 2.0, "label_share": 0.3},
    "ban+l": {"label_weight": 0.7},
    "cwtm": {"label_smoothing": 0.2},
    "dkpp": {"permutation": "fresh"},
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("objective", SETTINGS)
def test_sums_and_gradients_are_those_of_the_plain_way(rows, objective, bias):
    ours, theirs = head(1, bias=bias), head(1, bias=bias)
    teacher = None if objective == "label" else head(2, width=3, bias=not bias)
    target, settings = labels(0, 6, 12), SETTINGS[objective]
    total, weight, metrics = chunked_objective(
        objective,
        ours,
        teacher,
        target,
        generator=torch.Generator().manual_seed(4),
        with_metrics=teacher is not None,
        **settings,
    )
    (3 * total / weight).backward()
    generator = torch.Generator().manual_seed(4)
    if teacher is None:
        losses, weights = objective_items(objective, plain(theirs), None, target, **settings)
    else:
        losses, weights, expected_metrics = objective_items_and_metrics(
            objective, plain(theirs), plain(teacher), target, generator=generator, **settings
        )
        for name, value in expected_metrics.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-10, atol=1e-12, msg=name)
            assert not metrics[name].requires_grad
    (3 * (losses * weights).sum() / weights.sum()).backward()
    torch.testing.assert_close(total, (losses * weights).sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(weight, weights.sum(), rtol=1e-10, atol=0)
    for part, expected in zip(parts(ours), parts(theirs), strict=True):
        torch.testing.assert_close(part.grad, expected.grad, rtol=1e-10, atol=1e-13)
    assert teacher is None or all(part.grad is None for part in parts(teacher))


@pytest.mark.slow_but_for(
    "4 rows in a chunk-ban+l", "13 rows in a chunk-cwtm", "64 rows in a chunk-dkpp", "1 rows in a chunk-ban"
)
@pytest.mark.parametrize("objective", SETTINGS)
def test_the_gradient_is_that_of_finite_differences(rows, objective):
    def total(hidden, weight, bias):
        generator = torch.Generator().manual_seed(4)
        teacher = None if objective == "label" else head(2)
        return chunked_objective(
            objective, Head(hidden, weight, bias), teacher, labels(3), generator=generator, **SETTINGS[objective]
        )[0]

    assert torch.autograd.gradcheck(total, parts(head(1)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_under_autocast_products_are_narrow_and_the_loss_is_wide(rows, objective, monkeypatch):
    products, fill = set(), chunked.fill_items

    def watch(loss, student, teacher, *args, **kwargs):
        products.update({student.dtype, teacher.dtype})
        return fill(loss, student, teacher, *args, **kwargs)

    monkeypatch.setattr(chunked, "fill_items", watch)
    ours, theirs, teacher = (head(seed, dtype=torch.float32) for seed in (1, 1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        total, weight, _ = chunked_objective(
            objective, ours, teacher, labels(3), permutation="fixed", generator=torch.Generator().manual_seed(4)
        )
        losses, weights = objective_items(
            objective,
            plain(theirs),
            plain(teacher).detach(),
            labels(3),
            permutation="fixed",
            generator=torch.Generator().manual_seed(4),
        )
    (total / weight).backward()
    ((losses * weights).sum() / weights.sum()).backward()
    assert total.dtype == weight.dtype == torch.float32 and products == {torch.bfloat16}
    torch.testing.assert_close(total, (losses * weights).sum(), rtol=5e-3, atol=0)  # kernels round bf16 logits apart
    for part, expected in zip(parts(ours), parts(theirs), strict=True):
        assert part.grad.dtype == torch.float32
        torch.testing.assert_close(part.grad, expected.grad, rtol=2e-2, atol=5e-3)


def test_narrow_weights_get_narrow_gradients_summed_wide(rows):
    narrow, wide = head(1, dtype=torch.bfloat16), head(1, dtype=torch.bfloat16)
    total, weight, _ = chunked_objective("ban+l", narrow, head(2, dtype=torch.bfloat16), labels())
    (total / weight).backward()
    wide = Head(*(part.detach().double().requires_grad_() for part in parts(wide)))
    teacher = Head(*(part.detach().double() for part in parts(head(2, dtype=torch.bfloat16))))
    losses, weights = objective_items("ban+l", plain(wide), plain(teacher), labels())
    ((losses * weights).sum() / weights.sum()).backward()
    torch.testing.assert_close(total.double(), (losses * weights).sum(), rtol=2e-2, atol=0)
    for part, expected in zip(parts(narrow), parts(wide), strict=True):
        assert part.grad.dtype == torch.bfloat16
        torch.testing.assert_close(part.grad.double(), expected.grad, rtol=5e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_teacher_may_be_of_another_dtype(rows, dtype):
    teacher, wide = head(2, dtype=dtype), head(2, dtype=dtype).detach()
    total = chunked_objective("ban", head(1), teacher, labels())[0]
    losses, _ = objective_items("ban", plain(head(1)), plain(wide).double(), labels())
    torch.testing.assert_close(total, losses.sum(), rtol=5e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_parts_without_gradient_cost_nothing_and_get_none(rows):
    ours, theirs = head(1), head(1)
    for part in (ours.weight, theirs.weight):
        part.requires_grad_(False)
    total = chunked_objective("ban", ours, head(2), labels())[0]
    total.backward()
    objective_items("ban", plain(theirs), plain(head(2)), labels())[0].sum().backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(ours.hidden.grad, theirs.hidden.grad, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        assert chunked_objective("ban", ours, head(2), labels())[0].equal(total.detach())


def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused(rows):
    ours = head(1)
    total = chunked_objective("ban", ours, head(2), labels())[0]
    first = torch.autograd.grad(total, parts(ours), retain_graph=True)
    second = torch.autograd.grad(total, parts(ours), retain_graph=True)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="create_graph: got True .* differentiable once"):
        torch.autograd.grad(total, parts(ours), create_graph=True)


def test_no_more_than_a_chunk_of_logits_is_ever_there(rows, monkeypatch):
    seen, fill = [], chunked.fill_items

    def watch(loss, student, teacher, *args, **kwargs):
        seen.append((student.shape, teacher.shape, student.data_ptr()))
        return fill(loss, student, teacher, *args, **kwargs)

    monkeypatch.setattr(chunked, "fill_items", watch)
    chunked_objective("ban", head(1), head(2), labels())[0].backward()
    assert all(a == b and len(a) == 2 and a[0] <= rows for a, b, _ in seen)
    assert sum(shape[0] for shape, _, _ in seen) == ITEMS and len({place for *_, place in seen}) == 1


def test_the_weights_of_cwtm_can_be_had_before_the_loss(rows):
    expected = objective_items("cwtm", plain(head(1)), plain(head(2)), labels(3, 4))[1].sum()
    torch.testing.assert_close(chunked_confidence_weight(head(2), labels(3, 4)), expected.detach(), rtol=1e-12, atol=0)


def test_all_items_ignored_give_nothing():
    ours = head(1)
    total, weight, metrics = chunked_objective("cwtm", ours, head(2), torch.full((ITEMS,), -100), with_metrics=True)
    total.backward()
    assert total == weight == metrics["items"] == 0 and not any(part.grad.any() for part in parts(ours))


def test_no_items_give_nothing():
    nothing = [Head(of.hidden[:0], of.weight, of.bias) for of in (head(1), head(2))]
    total, weight, metrics = chunked_objective("cwtm", *nothing, labels()[:0], with_metrics=True)
    total.backward()
    assert total == weight == metrics["items"] == 0 and chunked_confidence_weight(nothing[1], labels()[:0]) == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"student: got hidden .* \(13, 4\) .* expected \(items, width\)"):
        chunked_objective("ban", Head(head(1, width=4).hidden, head(1).weight), head(2), labels())
    with pytest.raises(ValueError, match="teacher: has 13 items and a vocabulary of 10, the student 13 and 11"):
        chunked_objective("ban", head(1), Head(head(2).hidden, head(2).weight[:10]), labels())
    with pytest.raises(ValueError, match="objective: got 'kd', expected one of"):
        chunked_objective("kd", head(1), head(2), labels())
