"""Two processes of four streams against one of eight: weights, evaluation, prediction and resume."""

from pathlib import Path

import pytest
import torch
from processes import found_by
from two_lm_processes import CASES, STREAMS, WINDOW

# Two processes, each of which loads torch anew.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "two_lm_processes.py"
NAMES = [f"{objective} {accumulate}" for objective, accumulate in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    return {processes: found_by(SCRIPT, folder / str(processes), processes=processes) for processes in (1, 2)}


@pytest.mark.parametrize("case", NAMES)
def test_two_processes_of_four_streams_are_one_of_eight(runs, case):
    (one,), two = runs[1], runs[2]
    expected = one[case]
    assert not expected["wrapped"]
    for rank in two:
        seen = rank[case]
        assert seen["wrapped"], "training ran without DistributedDataParallel"
        for name in ("weights", "nll", "predictions", "fit"):
            torch.testing.assert_close(seen[name], expected[name], rtol=1e-10, atol=1e-12)
        for name in ("tokens", "labels", "fit_tokens"):
            assert seen[name].equal(expected[name])
        torch.testing.assert_close(seen["losses"], expected["losses"], rtol=1e-4, atol=1e-4)  # logged in 4 digits
    assert two[0][case]["weights"].equal(two[1][case]["weights"])


@pytest.mark.parametrize("case", NAMES)
def test_resuming_in_an_epoch_restores_the_streams_of_every_process(runs, case):
    for ranks in runs.values():
        for rank in ranks:
            assert rank[f"{case} resumed"]["weights"].equal(rank[case]["weights"])


def test_every_token_is_counted_once(runs):
    for ranks in runs.values():
        for rank in ranks:
            seen = rank["ban+l 1"]
            assert seen["tokens"] == seen["fit_tokens"] == (seen["labels"] != -100).sum()
            assert seen["labels"].shape == (5 * STREAMS, WINDOW)
