"""The machine and the processes under a training: what they are, what they compute in, and how much was used."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import pickle
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend, broadcast_object_list
from torch import nn

from born_again.lineage.manifest import LineageError
from born_again.models.lstm_precision import computes_lstm
from born_again.teacher.precision import cpu_capabilities
from born_again.training.environment import (
    ORDER_VARIABLES,
    compiler_of,
    float32_precision,
    sharding_engine,
)

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
# Where a block is so large, one more mapping is nothing beside what is done with it. Older versions take less.
_MMAP_FROM = (1 << 30, 1 << 25)
_SETTINGS_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tells glibc's malloc, for the rest of the process, to keep freed memory for the next request.

    For programs that do little else than train on a CPU: nothing in this package calls it by itself but what runs the
    scripts in examples/. The most memory that a process takes stays about the same, but what it took it keeps.
    Environment variables of malloc (see man mallopt) are left to have their way.

    Returns:
        Whether it was told; False with another C library, or where the user has settings of malloc.
    """
    if any(name in os.environ for name in _SETTINGS_OF_THE_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: musl, macOS, Windows
        return False
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_FROM):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def on_first_process(step: Callable[[], Any]) -> None:
    """Takes a step on the first process; what it raises is raised on every process, so that none waits for ever.

    Every process must call it at the same place. It ends on all of them when the step has ended.

    Args:
        step: called without arguments on the first process alone; what it returns is dropped.

    Raises:
        Exception: what the step raised. On the other processes a RuntimeError with its type and text where it cannot
            be sent to them.
    """
    processes = PartialState()
    failure: list[Exception | None] = [None]
    if processes.is_main_process:
        try:
            step()
        except Exception as error:
            if processes.num_processes == 1:
                raise
            broadcast_object_list([_as_sent(error)])
            raise
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def _as_sent(error: Exception) -> Exception:
    """An error that the other processes can read: itself, unless pickle loses it or cannot make it again."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # whatever an __init__ or __reduce__ of its own raises
        pass
    return RuntimeError(f"the first process failed: {type(error).__name__}: {error}")


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


# A training that goes on in another one of these would be neither what was begun nor what is asked for.
COMPARED = (
    "mixed_precision",
    "gradient_accumulation_steps",
    "processes",
    "dynamo_backend",
    "dynamo_mode",
    "default_dtype",
)


def computation_of(trainer: Trainer) -> dict[str, Any]:
    """What decides the weights beside the arguments, or may: for the record of a generation.

    Args:
        trainer: after its construction, when accelerate has settled arguments, launcher and environment.

    Returns:
        JSON values:
            mixed_precision: "no", "bf16", "fp16" or "fp8". gradient_accumulation_steps. processes: how many.
            distributed_type: accelerate's, such as "NO" or "MULTI_GPU". device: its type.
            dynamo_backend, dynamo_mode: of torch.compile; "no" and None where it does not compile.
            default_dtype: torch's for new tensors.
            float32_precision: see `born_again.training.environment.float32_precision`.
            deterministic: whether torch.use_deterministic_algorithms is on.
            threads: of torch on the CPU. environment: variables that decide the order of sums, where they are set.
    """
    accelerator = trainer.accelerator
    plugin = accelerator.state.dynamo_plugin
    compiles = plugin.backend != DynamoBackend.NO
    device = accelerator.device.type
    return {
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "device": device,
        "dynamo_backend": plugin.backend.value.lower(),
        "dynamo_mode": plugin.mode if compiles else None,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_precision": float32_precision(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in ORDER_VARIABLES if name in os.environ},
    }


def check_computation(here: Mapping[str, Any], index: int, record: Mapping[str, Any]) -> None:
    """Refuses to go on with a generation in another precision, accumulation or compilation than it was begun in.

    Args:
        here: as `computation_of` gives it.
        index: of the generation.
        record: of it; one of an earlier version has no "computation", and is not compared.

    Raises:
        LineageError: it would be computed otherwise; names what, here and there.
    """
    differing = _differences(here, record.get("computation", {}), COMPARED)
    if differing:
        raise LineageError(
            f"generation {index} would be computed otherwise than it was begun ({'; '.join(differing)}); give the "
            "same arguments to the script and to its launcher, or begin it again with from_generation."
        )


def computation_warning(here: Mapping[str, Any], records: list[Mapping[str, Any]]) -> str | None:
    """What differs from how a lineage was computed before, in words; None where nothing does.

    Args:
        here: as `computation_of` gives it.
        records: of the generation, if it has begun, and of those before it.
    """
    there = next((record["computation"] for record in reversed(records) if "computation" in record), {})
    # On another device it is another choice, of which the user may have none.
    same_device = ("float32_precision",) if there.get("device") == here["device"] else ()
    differing = _differences(here, there, (*COMPARED, *same_device))
    return "; ".join(differing) or None


def check_arguments(args: TrainingArguments) -> None:
    """Refuses arguments whose checkpoints a generation could not go on from, or that are not what is computed.

    Raises:
        ValueError: save_only_model, workers that outlive an epoch, an engine that shards weights, or fp16 where
            accelerate does not compute it; names the argument.
    """
    if args.save_only_model:
        raise ValueError(
            "save_only_model: got True, expected False in a lineage: its checkpoints would hold no optimizer, and a "
            "generation that is interrupted could not go on from them; leave it out. --save_total_limit bounds what "
            "checkpoints take, and they are deleted when their generation is finished."
        )
    if args.dataloader_persistent_workers and args.dataloader_num_workers:
        raise ValueError(
            "dataloader_persistent_workers: got True, expected False in a lineage: workers that outlive an epoch keep "
            "their random numbers, which a training resumed in the middle of an epoch would draw anew, and its "
            "weights would be others; leave it out, workers are started once an epoch."
        )
    engine = sharding_engine(args)
    if engine is not None:
        raise ValueError(
            f"accelerate launch: got {engine}, which shards weights and checkpoints over processes, expected "
            "DistributedDataParallel or one process in a lineage, whose checkpoints and generations are whole files; "
            "launch it without --use_fsdp, --use_deepspeed and --use_megatron_lm, and leave fsdp and deepspeed out of "
            "the arguments."
        )
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError(
            "fp16: got True, or fp16 from the launcher, on a CPU, where accelerate computes it in float32 without a "
            "word; use --bf16 True, or --bf16 False --fp16 False for float32."
        )


def _differences(here: Mapping[str, Any], there: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}: {here[name]!r} here, {there[name]!r} there"
        for name in names
        if name in there and there[name] != here[name]
    ]
