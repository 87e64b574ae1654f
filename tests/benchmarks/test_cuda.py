"""`python -m tests.benchmarks.cuda` runs to its end wherever it is started, and no part of it can stop the others."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from tests.benchmarks import cuda

OPTIONS = Namespace(smoke=True, cifar100=None)


def test_a_part_that_takes_too_long_or_fails_is_a_row_of_the_table(capsys):
    stopped = cuda.run_part("loss", OPTIONS, 0.1)
    assert stopped["status"] == "stopped after 0 s" and stopped["rows"] == []
    cuda.print_part(stopped)
    assert "| loss " in capsys.readouterr().out


@pytest.mark.slow
def test_smoke(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.cuda", "--smoke", "--output", str(tmp_path / "cuda.json")]
    parts = ["test_wide_resnet_cifar", "loss", "lineage"]
    done = subprocess.run([*command, "--parts", *parts], cwd=cuda.ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cuda.json").read_text())["parts"]
    assert [(part["part"], part["status"]) for part in found] == [(name, "done") for name in parts]
    rows = [row for part in found for row in part["rows"]]
    assert len(rows) == 4 + 4 + 1 and all(row["value"] > 0 and row["what"] in done.stdout for row in rows)
