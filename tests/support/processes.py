"""Scripts on one or more processes, as a launcher starts them, and what each of them found."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def launched(script: Path, folder: Path, *arguments: str, processes: int) -> subprocess.CompletedProcess:
    """Runs `script FOLDER *arguments` on so many processes, by torch.distributed.run where they are more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )


def found_by(script: Path, folder: Path, *arguments: str, processes: int) -> list[dict]:
    """Runs `script FOLDER *arguments` on so many processes and returns what each left with `leave`, by rank.

    Args:
        script: a program that hands its results to `leave`.
        folder: made for it.
        arguments: after the folder.
        processes: with more than one, by torch.distributed.run.
    """
    done = launched(script, folder, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def leave(results: dict, folder: Path) -> None:
    """In the script: keeps the results of this process for `found_by`, and ends its part in the group."""
    distributed = torch.distributed.is_initialized()
    torch.save(results, folder / f"rank{torch.distributed.get_rank() if distributed else 0}.pt")
    if distributed:
        torch.distributed.destroy_process_group()
