"""Two processes with a teacher cache, each its own or one on disk: the weights of a training without one."""

from pathlib import Path

import pytest
import torch
from processes import found_by
from two_cached_processes import CACHES

# Two processes, each of which loads torch anew.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "support" / "two_cached_processes.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return found_by(SCRIPT, tmp_path_factory.mktemp("cached"), processes=2)


@pytest.mark.parametrize("place", range(1, len(CACHES)))
@pytest.mark.parametrize("what", ["images", "text"])
def test_weights_are_those_without_a_cache(ranks, what, place):
    for rank in ranks:
        assert torch.equal(rank[f"{what} {place}"]["weights"], rank[f"{what} 0"]["weights"])
        seen = rank[f"{what} {place}"]["hits"]
        assert seen.equal(ranks[0][f"{what} {place}"]["hits"])  # of both processes together
        assert seen[-1] > 0.3


def test_a_second_training_reads_what_both_processes_of_the_first_cached(ranks):
    for what in ("images", "text"):
        assert (ranks[0][f"{what} 3"]["hits"] == 1).all() and not (ranks[0]["images 2"]["hits"] == 1).all()
