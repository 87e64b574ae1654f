"""Two processes that keep their teacher's answers, each for itself or both on one disk: the weights of none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_cached_processes import CACHES

# Two processes, each of which loads torch anew.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_cached_processes.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("place", range(1, len(CACHES)))
@pytest.mark.parametrize("what", ["images", "text"])
def test_weights_are_those_without_a_cache(ranks, what, place):
    for rank in ranks:
        assert torch.equal(rank[f"{what} {place}"]["weights"], rank[f"{what} 0"]["weights"])
        seen = rank[f"{what} {place}"]["hits"]
        assert seen.equal(ranks[0][f"{what} {place}"]["hits"])  # of both processes together
        assert seen[-1] > 0.3


def test_a_second_training_finds_what_both_processes_of_the_first_have_kept(ranks):
    for what in ("images", "text"):
        assert (ranks[0][f"{what} 3"]["hits"] == 1).all() and not (ranks[0]["images 2"]["hits"] == 1).all()
