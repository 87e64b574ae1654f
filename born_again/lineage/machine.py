"""The machine under a training: what it can, what it is, and how much of it was used."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DynamoBackend
from torch import nn

from born_again.models.lstm_precision import computes_lstm

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_PACKAGES = ("born-again", "torch", "transformers", "accelerate", "timm", "datasets", "tokenizers", "numpy")


def has_fast_bf16() -> bool:
    """Whether this machine multiplies matrices in bfloat16, and oneDNN may use it (ONEDNN_MAX_CPU_ISA)."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def how_it_computes(args: TrainingArguments, network: nn.Module | None = None) -> str:
    """The choices of a training that bear on speed and on the last digits, and the machine, in one line.

    Args:
        args: those of transformers, or of born_again with channels_last and teacher_precision.
        network: what is trained, for what this machine computes otherwise in it; on any device.
    """
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "fp32"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if network is not None and any(isinstance(part, nn.LSTM) for part in network.modules()):
        if not computes_lstm(args.device, dtype, grad=True):
            precision += f" (LSTMs in fp32: this machine has none in {precision[:4]})"
    layout = "channels_last" if getattr(args, "channels_last", False) else "contiguous"
    compiler = "not compiled"
    if args.torch_compile:
        compiler = f"compiled by {args.torch_compile_backend} ({args.torch_compile_mode or 'default'})"
    teacher = f"teacher_precision {getattr(args, 'teacher_precision', 'autocast')}"
    where = f"device {args.device}, {args.world_size} process{'es' if args.world_size > 1 else ''}"
    return f"{precision}, {layout}, {teacher}, {compiler}; {where}: {hardware()}"


def release_memory(trainer: Trainer) -> None:
    """Lets go of what a training leaves behind that the next one in this process must not find.

    Memory is freed when the caller drops its own references to trainer and networks.
    """
    trainer.accelerator.free_memory()
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        # Graphs are kept by function: those of an earlier network count against the limit of the next one's, beyond
        # which torch gives up compiling.
        torch.compiler.reset()


def collect_memory() -> None:
    """Frees what has been let go."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def leaving_old_objects_alone() -> Iterator[None]:
    """Inside, the garbage collector looks only at what was made inside.

    Else every collection goes through the modules of torch and transformers, which never go: a quarter of a second,
    three times a generation. A process that has frozen objects by itself (gc.freeze) is left as it is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
