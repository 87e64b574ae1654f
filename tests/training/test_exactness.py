"""Every arrangement of a step on processes and micro-batches computes what one process does with all of it at once."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from exactness import CELLS, OBJECTIVES, Cell, computed
from processes import found_by

NEEDS_DEEPSPEED = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
SCRIPT = Path(__file__).parents[1] / "support" / "exactness.py"


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """What two processes computed of one set of cells, all in one start."""

    def found(which, engine="ddp"):
        return found_by(SCRIPT, tmp_path_factory.mktemp(which), which, engine, processes=2)

    return functools.cache(found)


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """What one process computed of a cell."""

    def reference(cell):
        torch.set_num_threads(1)
        return computed(cell, tmp_path_factory.mktemp("one"))

    return functools.cache(reference)


def check(expected, seen, rounding=1e-12):
    for name in ("gradients", "weights", "evaluated", "teacher"):
        scale = float(expected[name].abs().max()) if expected[name].numel() else 1.0
        torch.testing.assert_close(
            seen[name], expected[name], rtol=rounding, atol=rounding * scale, msg=f"{name} differ"
        )
    torch.testing.assert_close(seen["logged"], expected["logged"], rtol=1e-4, atol=1e-4)  # in 4 digits


@pytest.mark.parametrize("task", ["images", "tokens"])
def test_every_objective_has_a_gradient_of_its_own(on_one, task):
    first = [on_one(Cell(task, objective))["gradients"][0] for objective in OBJECTIVES]
    assert all(not one.allclose(other) for one, other in itertools.combinations(first, 2))


@pytest.mark.parametrize("cell", CELLS["few"], ids=str)
def test_two_processes_compute_what_one_does(on_one, on_two, cell):
    expected = on_one(cell.reference)
    assert not expected["wrapped"]
    for rank in on_two("few"):
        assert rank[str(cell)]["wrapped"], "training ran without DistributedDataParallel"
        check(expected, rank[str(cell)])


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS["all"], ids=str)
def test_the_matrix_on_two_processes(on_one, on_two, cell):
    for rank in on_two("all"):
        check(on_one(cell.reference), rank[str(cell)])


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS["all"] if cell.reference != cell], ids=str)
def test_the_matrix_of_accumulated_micro_batches(on_one, cell):
    check(on_one(cell.reference), on_one(cell))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS["sharded"], ids=str)
@pytest.mark.parametrize(
    ("engine", "rounding"),
    [
        ("fsdp2", 1e-12),
        pytest.param("zero2", 3e-6, marks=NEEDS_DEEPSPEED),
        pytest.param("zero3", 3e-6, marks=NEEDS_DEEPSPEED),
    ],
)
def test_the_matrix_of_students_in_shards(on_one, on_two, engine, rounding, cell):
    for rank in on_two("sharded", engine):
        check(on_one(cell.reference), rank[str(cell)], rounding)


def test_every_process_draws_its_own_dropout_masks_and_again_after_a_resume(on_two):
    first, second = (rank["drawn"] for rank in on_two("few"))
    assert not first["masks"].equal(second["masks"])
    for rank in (first, second):
        assert rank["masks"].equal(rank["masks resumed"]) and rank["weights"].equal(rank["weights resumed"])
    assert first["weights"].equal(second["weights"])


def test_rows_grouped_by_length_are_shared_out_without_overlap(on_two):
    first, second = (rank["grouped"] for rank in on_two("few"))
    for epoch in range(2):
        shown = torch.cat([rank.view(2, -1)[epoch] for rank in (first, second)])
        assert len(shown.unique()) == len(shown) == 24
