"""Permutations of wide rows, which are drawn row by row and not by sorting."""

import pytest
import torch

from born_again.objectives.permutations import argmax_column, permute_all_but_argmax

CLASSES = 300


@pytest.fixture(params=[1, 3], ids=lambda threads: f"{threads} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def shuffled(rows, seed=1):
    return permute_all_but_argmax(rows, "fresh", torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_stays_and_the_others_keep_to_their_row(threads, dtype):
    teacher = torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = teacher.clone()
    result = shuffled(teacher)
    top = teacher.argmax(-1, keepdim=True)
    assert teacher.equal(before) and result.gather(1, top).equal(teacher.gather(1, top))
    assert result.sort(-1).values.equal(teacher.sort(-1).values) and not result.eq(teacher).all(-1).any()


def test_it_does_not_matter_which_thread_or_call_draws_a_row():
    teacher, before = torch.randn(11, CLASSES), torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(shuffled(teacher))
    torch.set_num_threads(before)
    generator = torch.Generator().manual_seed(1)
    results.append(torch.cat([permute_all_but_argmax(part, "fresh", generator) for part in teacher.split(3)]))
    assert all(result.equal(results[0]) for result in results)
    assert not shuffled(teacher, seed=2).equal(results[0])


def test_every_place_is_as_likely_as_any_other(threads):
    rows = 3000
    teacher = torch.arange(CLASSES).flip(0).float().expand(rows, -1)  # the largest first
    places = shuffled(teacher).argsort(-1, descending=True)[:, 1:]  # where the other entries went
    for entry in (0, 1, 150, CLASSES - 2):
        counts = places[:, entry].bincount(minlength=CLASSES)[1:].double()
        expected = rows / (CLASSES - 1)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - (CLASSES - 2)) < 5 * (2 * (CLASSES - 2)) ** 0.5
    neighbours = (places[:, 0] < places[:, 1]).double().mean()
    assert abs(neighbours - 0.5) < 5 * 0.5 / rows**0.5


def test_first_largest_is_argmax_with_ties_and_nan():
    values = torch.tensor([[1.0, 3.0, 3.0], [2.0, torch.nan, 5.0], [-torch.inf] * 3])
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert argmax_column(values.to(dtype)).equal(values.to(dtype).argmax(-1, keepdim=True))
