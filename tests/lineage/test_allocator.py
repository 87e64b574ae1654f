"""Freed memory stays with the process, in a process of its own, since the setting does."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from born_again.lineage.machine import keep_freed_memory
print(keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2 ** 21) for _ in range(12)]  # 8 MiB each, as the activations of a step
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(4): found = faults()
print(found)
"""
RETURNED = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}


def run(**environment: str) -> tuple[str, int]:
    """Whether malloc was told, and the page faults of a step."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**settings, **environment}
    )
    assert done.returncode == 0, done.stderr
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_not_asked_for_again_unless_the_user_has_it_so():
    told, faults = run()
    assert told == "True" and faults < 100
    told, faults = run(**RETURNED)
    assert told == "False" and faults > 40  # at least one for each huge page
