"""The chunked implementation on two processes against the full one on one: DDP and the output layer."""

from pathlib import Path

import pytest
import torch
from processes import found_by
from two_chunked_processes import CASES, NETWORKS

# Two processes, each of which loads torch anew.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "two_chunked_processes.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunked")
    implementations = {"full": 1, "chunked": 2}
    return {
        implementation: found_by(SCRIPT, folder / implementation, implementation, processes=processes)
        for implementation, processes in implementations.items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_two_chunked_processes_are_one_plain_one(runs, network, case):
    key = f"{network} {' '.join(map(str, case))}"
    (expected,) = (results[key] for results in runs["full"])
    assert not expected["wrapped"] and not expected["chunked"]
    for rank in runs["chunked"]:
        seen = rank[key]
        assert seen["wrapped"] and seen["chunked"]
        torch.testing.assert_close(seen["weights"], expected["weights"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(seen["logged"], expected["logged"], rtol=1e-4, atol=1e-4)
