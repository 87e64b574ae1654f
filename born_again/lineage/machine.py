"""The machine under a training: what it can, what it is, and how much of it was used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

_PACKAGES = ("born-again", "torch", "transformers", "accelerate", "timm", "datasets", "tokenizers", "numpy")


def has_fast_bf16() -> bool:
    """Whether this machine multiplies matrices in bfloat16."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def use_cores(threads: int | None) -> None:
    """accelerate launch leaves a CPU process one thread; an explicit number of threads is kept."""
    if threads is None and os.environ.get("OMP_NUM_THREADS", "1") == "1" and not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None:
        torch.set_num_threads(threads)


def versions() -> dict[str, str]:
    """The versions of the libraries that decide the weights."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)
    }


def hardware() -> str:
    """The accelerator, or the processor with how many threads torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"


def peak_memory_mib() -> int | None:
    """The most memory this process has held so far: of the CUDA device where there is one, else resident memory.

    None where the system does not tell (Windows).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    if os.name != "posix":
        return None
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
