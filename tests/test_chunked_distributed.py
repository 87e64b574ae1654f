"""The chunked form on two processes against the plain form on one: DistributedDataParallel and the output layer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_chunked_processes import CASES, NETWORKS

# Two processes, each of which loads torch anew.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_chunked_processes.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunked")
    results = {}
    for processes, form in ((1, "plain"), (2, "chunked")):
        out = folder / form
        out.mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), str(out), form],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results[form] = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_two_chunked_processes_are_one_plain_one(runs, network, case):
    key = f"{network} {' '.join(map(str, case))}"
    (expected,) = (results[key] for results in runs["plain"])
    assert not expected["wrapped"] and not expected["chunked"]
    for rank in runs["chunked"]:
        seen = rank[key]
        assert seen["wrapped"] and seen["chunked"]
        torch.testing.assert_close(seen["weights"], expected["weights"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(seen["logged"], expected["logged"], rtol=1e-4, atol=1e-4)
