"""Medians over alternated repeats, and the memory of one piece of work in a process of its own."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def medians(work: Mapping[str, Callable[[], object]], repeats: int, clock: str = "wall") -> dict[str, float]:
    """Seconds of each piece of work: the median over `repeats` rounds, in each of which all run one after the other.

    One more round comes first and is not counted.
    """
    now, seconds = CLOCKS[clock], {name: [] for name in work}
    for round_ in range(repeats + 1):
        for name, run in work.items():
            start = now()
            run()
            if round_:
                seconds[name].append(now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_memory(work: Callable[[], object]) -> float:
    """MiB by which the peak of this process rises in `work`, above the peak before: call it in a fresh process."""
    before = _peak()
    work()
    return (_peak() - before) / 1024


def _peak() -> int:
    """The largest resident memory of this process so far, in KiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # there the figure of getrusage would be the parent's, where that is larger
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_child(module: str, *arguments: str) -> Sequence[float]:
    """Numbers that `python -m module arguments` prints in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True, timeout=600
    )
    return [float(part) for part in done.stdout.splitlines()[-1].split()]


def print_row(name: str, *cells: str) -> None:
    """One row of a table, its name in a column of its own."""
    print(f"{name:34}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
