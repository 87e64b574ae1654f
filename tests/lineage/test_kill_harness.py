"""Lineages killed at any moment and started again are those that nothing killed, to the byte."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "support" / "kill_harness.py"


@pytest.mark.slow
def test_killed_lineages_end_as_those_that_were_not(tmp_path):
    # The children are forked by a process with one thread, which this one is not.
    command = [sys.executable, str(HARNESS), "--kills", "24", "--seed", "1", "--workdir", str(tmp_path / "kills")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=1800)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    kills, lineages = re.search(r"(\d+) kills of (\d+) lineages in .*: none not equal", done.stdout).groups()
    assert int(kills) >= 18 and int(lineages) >= 6
    table = done.stdout.split("\n\n")[0]
    by_kind = {"images": ("epoch", "steps", "best"), "text": ("epoch", "minutes", "steps", "best")}
    for lineage in [f"{kind}-{when}" for kind in by_kind for when in by_kind[kind]]:
        assert lineage in table
    for mode in ("event", "place", "time", "cut gen"):
        assert f"  {mode}" in table
