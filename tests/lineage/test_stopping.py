"""One of two processes hangs, dies, fails or is told to stop: all end, one says why, and the same command goes on."""

from pathlib import Path

import pytest
from processes import launched
from tiny_lineage import hashes

from born_again.lineage.folders import last_checkpoint
from born_again.lineage.manifest import Manifest

# Two processes, each of which loads torch anew, several times.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "two_stopping_processes.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = launched(SCRIPT, folder, "nothing", processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("Generation 1 of tiny-words:") == 1  # one process speaks
    return hashes(folder / "out")


@pytest.mark.parametrize(
    ("how", "said", "saved"),
    [
        ("SIGSTOP", "LostProcess: process 1 of 2 did not take part in a step", 2),
        ("SIGTERM", "SIGTERM after step 3: everything is saved in", 3),
    ],
)
def test_all_end_and_the_same_command_goes_on(whole, tmp_path, how, said, saved):
    done = launched(SCRIPT, tmp_path, how, processes=2)
    assert done.returncode != 0 and Manifest.read(tmp_path / "out").record(1)["status"] == "training"
    assert done.stderr.count(said) == 1, done.stderr[-4000:]
    assert last_checkpoint(tmp_path / "out" / "checkpoints" / "gen1").name == f"checkpoint-{saved}"
    done = launched(SCRIPT, tmp_path, how, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert hashes(tmp_path / "out") == whole


@pytest.mark.parametrize(("how", "said"), [("error", "ValueError: a wrong value"), ("both", "ValueError: what all")])
def test_an_error_ends_all_and_is_said_once(tmp_path, how, said):
    done = launched(SCRIPT, tmp_path, how, processes=2)
    assert done.returncode == 1 and done.stderr.count(said) == 1, done.stderr[-4000:]
