"""The machine under a training: what it can, what it is, and how much of it was used."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DynamoBackend
from torch import nn

from born_again.environment import compiler_of, cpu_capabilities, float32_precision
from born_again.models.lstm_precision import computes_lstm

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_PACKAGES = ("born-again", "torch", "transformers", "accelerate", "timm", "datasets", "tokenizers", "numpy")
_USUAL_FLOAT32 = {("conv", "tf32"), ("rnn", "tf32")}  # torch's defaults for cuDNN
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def has_fast_bf16() -> bool:
    """Whether this machine multiplies matrices in bfloat16, and oneDNN may use it (ONEDNN_MAX_CPU_ISA)."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return any(cpu_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def how_it_computes(args: TrainingArguments, network: nn.Module | None = None) -> str:
    """The choices of a training that bear on speed and on the last digits, and the machine, in one line.

    They are those that accelerate will compute in, whether an argument, its launcher or the environment has chosen.

    Args:
        args: those of transformers, or of born_again with channels_last and teacher_precision.
        network: what is trained, for what this machine computes otherwise in it; on any device.
    """
    words = [precision_words(args.mixed_precision)]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, torch.float32)
    if network is not None and any(isinstance(part, nn.LSTM) for part in network.modules()):
        if not computes_lstm(args.device, dtype, grad=True):
            words[0] += f" (LSTMs in fp32: this machine has none in {args.mixed_precision})"
    if torch.get_default_dtype() != torch.float32:
        words.append(f"default dtype {str(torch.get_default_dtype()).removeprefix('torch.')}")
    float32 = float32_precision(args.device.type).items()
    words += [f"{name} {value}" for name, value in float32 if (name, value) not in _USUAL_FLOAT32]
    words.append("channels_last" if getattr(args, "channels_last", False) else "contiguous")
    words.append(f"teacher_precision {getattr(args, 'teacher_precision', 'autocast')}")
    compiler = compiler_of(args)
    words.append("not compiled" if compiler is None else f"compiled by {compiler[0]} ({compiler[1]})")
    if args.gradient_accumulation_steps > 1:
        words.append(f"{args.gradient_accumulation_steps} batches a step")
    where = f"device {args.device}, {args.world_size} process{'es' if args.world_size > 1 else ''}"
    return f"{', '.join(words)}; {where}: {hardware()}"


def precision_words(mixed_precision: str) -> str:
    """What accelerate calls "no", "bf16", "fp16" or "fp8", for people."""
    return "fp32" if mixed_precision == "no" else f"{mixed_precision} autocast"


def precision_problem(mixed_precision: str, device: torch.device) -> str | None:
    """Why a mixed precision cannot be computed on a device, however slowly; None where it can.

    Args:
        mixed_precision: "no", "bf16", "fp16" or "fp8".
        device: of the training.
    """
    if mixed_precision == "fp8":
        return "which accelerate launch --mixed_precision fp8 alone gives"
    if mixed_precision == "fp16" and device.type == "cpu":
        return "which accelerate does not compute on a CPU"
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return f"which {torch.cuda.get_device_name()} does not compute"
    return None


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
    three times a generation. It is the whole process that is told so, hence a choice of the program and not of the
    runner. A process that has frozen objects by itself (gc.freeze) is left as it is.
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
    return f"CPU {cpu_capabilities().get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"


def reset_peak_memory() -> bool:
    """Begins the measurement of `peak_memory_mib` anew.

    Returns:
        Whether it could: of a CUDA device always, of resident memory where Linux lets a process write its clear_refs
        (containers may not; other systems cannot), so that what was held before is still the peak.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _CLEAR_REFS.write_text("5")  # sets VmHWM to what is resident now
    except OSError:
        return False
    return _high_water_mib() is not None


def peak_memory_mib() -> int | None:
    """The most memory this process has held, in MiB: of the CUDA device where there is one, else resident memory.

    It is the most since the last `reset_peak_memory` that could, or since the process began. None where the system
    does not tell (Windows).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    if os.name != "posix":
        return None
    if (peak := _high_water_mib()) is not None:
        return peak
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def _high_water_mib() -> int | None:
    """Linux' own number, which can be reset, as getrusage's cannot."""
    try:
        found = re.search(r"^VmHWM:\s*([0-9]+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) >> 10


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
