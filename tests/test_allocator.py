"""Freed memory stays with the process, in a process of its own, since the setting does."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from born_again.allocator import keep_freed_memory
if {keep}: print(keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2 ** 21) for _ in range(12)]  # 8 MiB each, as the activations of a step
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(4): found = faults()
print(found)
"""


def run(keep: bool, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_not_asked_for_again():
    (without,), (told, kept) = run(False), run(True)
    assert told == "True"
    assert int(kept) < 100 < int(without)


def test_settings_of_the_user_are_left_alone():
    told, _ = run(True, MALLOC_TRIM_THRESHOLD_="100000")
    assert told == "False"
