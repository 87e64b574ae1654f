"""Two processes of four against one of eight: same gradient, weights, evaluation, log, for every objective."""

from pathlib import Path

import pytest
import torch
from processes import found_by
from two_processes import CASES

# Two processes, each of which loads torch anew.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "two_processes.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return {processes: found_by(SCRIPT, folder / str(processes), processes=processes) for processes in (1, 2)}


@pytest.mark.parametrize("evaluate_first", [False, True])
@pytest.mark.parametrize("objective", CASES)
def test_two_processes_of_four_are_one_of_eight(runs, objective, evaluate_first):
    key = f"{objective} {evaluate_first}"
    (one,), two = runs[1], runs[2]
    expected = one[key]
    assert not expected["wrapped"]
    for rank in two:
        seen = rank[key]
        assert seen["wrapped"], "training ran without DistributedDataParallel"
        torch.testing.assert_close(seen["gradient"], expected["gradient"], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(seen["weights"], expected["weights"], rtol=1e-10, atol=1e-13)
        names = ("eval_loss", "logged", "fit", "ragged_loss", "ragged_fit")
        for name in (*names, *(["eval_loss_before"] if evaluate_first else [])):
            torch.testing.assert_close(seen[name], expected[name], rtol=1e-5, atol=1e-6)


def test_no_sentence_is_counted_twice(runs):
    (one,), two = runs[1], runs[2]
    for rank in two:
        for name, expected in one["sentences"].items():
            torch.testing.assert_close(rank["sentences"][name], expected, rtol=1e-10, atol=0)


def test_evaluating_first_changes_no_training(runs):
    for ranks in runs.values():
        for results in ranks:
            for objective in CASES:
                assert torch.equal(results[f"{objective} True"]["weights"], results[f"{objective} False"]["weights"])
