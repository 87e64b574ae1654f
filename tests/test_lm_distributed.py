"""Two processes of four streams against one of eight: weights, evaluation, prediction and resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_lm_processes import CASES, STREAMS, WINDOW

# Two processes, each of which loads torch anew.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_lm_processes.py")
NAMES = [f"{objective} {accumulate}" for objective, accumulate in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    results = {}
    for processes in (1, 2):
        out = folder / str(processes)
        out.mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results[processes] = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    return results


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
