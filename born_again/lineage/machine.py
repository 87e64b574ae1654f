"""The hardware, processes and numerics of a training: description, records, comparison, memory."""

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend, broadcast_object_list
from torch import nn

from born_again.lineage.global_batch import GlobalBatch
from born_again.lineage.manifest import LineageError
from born_again.lineage.tracking import check_trackers
from born_again.models.lstm_precision import computes_lstm
from born_again.teacher.cache import check_cache_keys
from born_again.teacher.precision import cpu_capabilities
from born_again.training.environment import (
    ORDER_VARIABLES,
    check_engine,
    check_launch,
    compiler_of,
    float32_precision,
    sharding_engine,
)

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
# For blocks this large the cost of an extra mapping is negligible. Older versions of glibc accept the second only.
_MMAP_FROM = (1 << 30, 1 << 25)
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
_PACKAGES = ("born-again", "torch", "transformers", "accelerate", "timm", "datasets", "tokenizers", "numpy")
_DEFAULT_FLOAT32 = {("conv", "tf32"), ("rnn", "tf32")}  # torch's defaults for cuDNN
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# A generation must not be resumed with another value of these.
COMPARED = (
    "mixed_precision",
    "gradient_accumulation_steps",
    "processes",
    "zero_stage",
    "dynamo_backend",
    "dynamo_mode",
    "default_dtype",
)
# Of these, what may change where the global batch stays the same, see born_again.lineage.global_batch.
SHARES = frozenset({"gradient_accumulation_steps", "processes"})
# Training arguments that a lineage refuses, with the reason and the remedy.
_REFUSED = {
    "save_only_model": (
        "its checkpoints would hold no optimizer, and a generation that is interrupted could not be resumed; leave it "
        "out. --save_total_limit bounds what checkpoints take, and they are deleted when their generation is finished."
    ),
    "auto_find_batch_size": (
        "the batch size would depend on the memory that happens to be free, and a student, which has its teacher "
        "beside it, could be trained in smaller batches than its teacher was; set per_device_train_batch_size to what "
        "fits, and make up for it with gradient_accumulation_steps."
    ),
    "ignore_data_skip": (
        "a generation resumed in the middle of an epoch would read the first rows of the epoch twice, and others "
        "never; leave it out."
    ),
    "enable_jit_checkpoint": (
        "on SIGTERM Trainer would end the training as if it were complete, and the generation would be recorded as "
        "finished; leave it out, a lineage saves a checkpoint on SIGTERM and resumes from it."
    ),
}


# ---- Processes ----


def on_first_process(step: Callable[[], Any]) -> None:
    """Runs a function on the first process; an exception is raised on every process, so that none waits forever.

    Every process must call it at the same place; it returns on all of them when the function has ended.

    Args:
        step: called without arguments on the first process only; its result is dropped.

    Raises:
        Exception: what the function raised. On the other processes a RuntimeError with its type and text if it cannot
            be pickled, or is no Exception, as KeyboardInterrupt.
    """
    processes = PartialState()
    failure: list[Exception | None] = [None]
    if processes.is_main_process:
        try:
            step()
        except BaseException as error:
            if processes.num_processes > 1:
                broadcast_object_list([_picklable_error(error)])
            raise
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def _picklable_error(error: BaseException) -> Exception:
    """The error itself if it survives pickling, else a RuntimeError with its type and text."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if isinstance(error, Exception) and type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # whatever its own __init__ or __reduce__ raises
        pass
    return RuntimeError(f"the first process failed: {type(error).__name__}: {error}")


# ---- Hardware and versions ----


def hardware() -> str:
    """The accelerator, or the processor and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {cpu_capabilities().get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions of the libraries that the weights depend on."""
    return installed_versions(_PACKAGES)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages if _is_installed(name)
    }


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def set_threads(threads: int | None) -> None:
    """Sets the CPU threads of torch; None takes all cores where accelerate launch has left the process one thread."""
    if threads is None and os.environ.get("OMP_NUM_THREADS", "1") == "1" and not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None:
        torch.set_num_threads(threads)


def has_fast_bf16() -> bool:
    """Whether this machine has bfloat16 matrix instructions, and oneDNN may use them (ONEDNN_MAX_CPU_ISA)."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return any(cpu_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


# ---- Precision and computation ----


def precision_name(mixed_precision: str) -> str:
    """The readable name of accelerate's mixed precision: "fp32" for "no", else such as "bf16 autocast"."""
    return "fp32" if mixed_precision == "no" else f"{mixed_precision} autocast"


def precision_problem(mixed_precision: str, device: torch.device) -> str | None:
    """Why a mixed precision cannot be used on a device at all; None where it can.

    Args:
        mixed_precision: "no", "bf16", "fp16" or "fp8".
        device: of the training.
    """
    if mixed_precision == "fp8":
        return "which only accelerate launch --mixed_precision fp8 enables"
    if mixed_precision == "fp16" and device.type == "cpu":
        return "which accelerate does not support on a CPU"
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return f"which {torch.cuda.get_device_name()} does not support"
    return None


def describe_computation(args: TrainingArguments, network: nn.Module | None = None) -> str:
    """Precision, memory format, compiler and hardware of a training, in one line.

    They are those that accelerate will use, whether set by an argument, its launcher or the environment.

    Args:
        args: of transformers, or of born_again with channels_last and teacher_precision.
        network: to be trained, on any device; its LSTMs may be computed in another precision on this machine.
    """
    parts = [precision_name(args.mixed_precision)]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, torch.float32)
    if network is not None and any(isinstance(part, nn.LSTM) for part in network.modules()):
        if not computes_lstm(args.device, dtype, grad=True):
            parts[0] += f" (LSTMs in fp32: this machine has none in {args.mixed_precision})"
    if torch.get_default_dtype() != torch.float32:
        parts.append(f"default dtype {str(torch.get_default_dtype()).removeprefix('torch.')}")
    float32 = float32_precision(args.device.type).items()
    parts += [f"{name} {value}" for name, value in float32 if (name, value) not in _DEFAULT_FLOAT32]
    parts.append("channels_last" if getattr(args, "channels_last", False) else "contiguous")
    parts.append(f"teacher_precision {getattr(args, 'teacher_precision', 'autocast')}")
    compiler = compiler_of(args)
    parts.append("not compiled" if compiler is None else f"compiled by {compiler[0]} ({compiler[1]})")
    if getattr(args, "fused_optimizer", False):
        parts.append("fused optimizer")
    if args.gradient_accumulation_steps > 1:
        parts.append(f"{args.gradient_accumulation_steps} batches a step")
    where = f"device {args.device}, {args.world_size} process{'es' if args.world_size > 1 else ''}"
    return f"{', '.join(parts)}; {where}: {hardware()}"


def computation_of(trainer: Trainer) -> dict[str, Any]:
    """What may affect the weights besides the arguments: for the record of a generation.

    Args:
        trainer: after its construction, when accelerate has combined arguments, launcher and environment.

    Returns:
        JSON values:
            mixed_precision: "no", "bf16", "fp16" or "fp8". gradient_accumulation_steps. processes: their number.
            micro_batch_size: rows of one forward of one process.
            distributed_type: accelerate's, such as "NO" or "MULTI_GPU". zero_stage: DeepSpeed's, or None. device: its
                type.
            dynamo_backend, dynamo_mode: of torch.compile; "no" and None where it does not compile.
            default_dtype: torch's for new tensors.
            float32_precision: see `born_again.training.environment.float32_precision`.
            deterministic: whether torch.use_deterministic_algorithms is on.
            threads: of torch on the CPU. environment: variables that affect the order of sums, where they are set.
    """
    accelerator = trainer.accelerator
    plugin = accelerator.state.dynamo_plugin
    compiles = plugin.backend != DynamoBackend.NO
    device = accelerator.device.type
    return {
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "micro_batch_size": GlobalBatch.of(trainer).micro_batch_size,
        "distributed_type": accelerator.distributed_type.value,
        "zero_stage": accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "device": device,
        "dynamo_backend": plugin.backend.value.lower(),
        "dynamo_mode": plugin.mode if compiles else None,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_precision": float32_precision(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in ORDER_VARIABLES if name in os.environ},
    }


def check_computation(
    here: Mapping[str, Any], index: int, record: Mapping[str, Any], ignored: Collection[str] = ()
) -> None:
    """Checks that a generation is resumed with the same precision, accumulation and compilation.

    Args:
        here: as `computation_of` gives it.
        index: of the generation.
        record: of it; one of an earlier version has no "computation", and is not compared.
        ignored: names that may differ.

    Raises:
        LineageError: they differ; names each, with both values.
    """
    if here.get("zero_stage"):  # DeepSpeed's states are read by as many processes as wrote them
        ignored = {*ignored} - {"processes"}
    names = tuple(name for name in COMPARED if name not in ignored)
    differing = _differences(here, record.get("computation", {}), names)
    if differing:
        raise LineageError(
            f"generation {index} would be computed differently than it was begun ({'; '.join(differing)}); give the "
            "same arguments to the script and to its launcher, or train it again with from_generation."
        )


def computation_warning(
    here: Mapping[str, Any], records: Sequence[Mapping[str, Any]], ignored: Collection[str] = ()
) -> str | None:
    """How the computation differs from that of the lineage so far, as text; None where it does not.

    Args:
        here: as `computation_of` gives it.
        records: of the generation, if it has begun, and of those before it.
        ignored: names that may differ.
    """
    there = next((record["computation"] for record in reversed(records) if "computation" in record), {})
    # Not compared between devices, whose defaults differ.
    same_device = ("float32_precision",) if there.get("device") == here["device"] else ()
    names = tuple(name for name in (*COMPARED, *same_device) if name not in ignored)
    differing = _differences(here, there, names)
    return "; ".join(differing) or None


def _differences(here: Mapping[str, Any], there: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}: {here[name]!r} here, {there[name]!r} there"
        for name in names
        if name in there and there[name] != here[name]
    ]


def check_arguments(args: TrainingArguments, taught_on: Any = None) -> None:
    """Validates training arguments: a generation must be resumable, and computed as its arguments say.

    Args:
        args: of a generation.
        taught_on: training set of students, which a teacher_cache must suit before their teacher is trained; None or
            False without students.

    Raises:
        ValueError: a teacher_cache beside a training set without keys, a tracker that is not installed,
            save_only_model, workers that outlive an epoch, a batch size found by trial, batches that resuming does not
            skip, Trainer's own checkpoint on SIGTERM, an engine that shards weights, or fp16 where accelerate does not
            compute it; names the argument.
    """
    for name, reason in _REFUSED.items():
        if getattr(args, name, False):  # an older transformers lacks some
            raise ValueError(f"{name}: got True, expected False in a lineage: {reason}")
    if args.dataloader_persistent_workers and args.dataloader_num_workers:
        raise ValueError(
            "dataloader_persistent_workers: got True, expected False in a lineage: workers that outlive an epoch keep "
            "their random state, which a training resumed in the middle of an epoch would not have, so its weights "
            "would differ; leave it out, workers are started once an epoch."
        )
    check_launch(args)
    check_trackers(args)
    if taught_on is not None and taught_on is not False:
        check_cache_keys(args, taught_on)
    engine = sharding_engine(args)
    if engine not in (None, "FSDP", "DeepSpeed"):
        raise ValueError(
            f"accelerate launch: got {engine}, which shards weights and checkpoints over processes, expected FSDP2, "
            "DeepSpeed, DistributedDataParallel or one process in a lineage, whose generations are whole files; "
            "launch it without --use_megatron_lm. FSDP2 (--use_fsdp --fsdp_version 2) shards the weights."
        )
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError(
            "fp16: got True, or fp16 from the launcher, on a CPU, where accelerate silently computes in "
            "float32; use --bf16 True, or --bf16 False --fp16 False for float32."
        )


def check_sharding(trainer: Trainer, has_one_folder: bool = True) -> None:
    """Validates how an engine shards the student of a lineage.

    Args:
        trainer: of a generation.
        has_one_folder: whether all processes see the same files.

    Raises:
        ValueError: an engine that is not used or not known, FSDP's offloaded shards, a compiled student, or an
            optimizer or schedule that DeepSpeed's configuration names.
    """
    check_engine(trainer, trainer.model)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if (compiler := compiler_of(trainer.args)) is not None:
        engine = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"torch_compile: got {compiler[0]!r} with {engine}, expected no compilation of a student in shards in a "
            "lineage, whose weights would be saved under other names; leave it out, or use DistributedDataParallel."
        )
    if trainer.is_deepspeed_enabled:
        stage, config = (
            getattr(trainer.accelerator.state.deepspeed_plugin, name) for name in ("zero_stage", "deepspeed_config")
        )
        if not has_one_folder:
            raise ValueError(
                "output_dir: got a folder of its own on each node with DeepSpeed, whose processes read each other's "
                "parts of a checkpoint; expected one folder that all nodes see, or FSDP2 (--use_fsdp --fsdp_version "
                "2), whose checkpoints are whole files."
            )
        if stage not in (1, 2, 3):
            raise ValueError(
                f"zero_stage: got {stage!r}, expected 1, 2 or 3, which shard what a training keeps; without shards "
                "DistributedDataParallel does the same, without --use_deepspeed."
            )
        for name, argument in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
            if name in config:
                raise ValueError(
                    f"deepspeed: its configuration has {name!r} {config[name].get('type')!r}, expected none in a "
                    "lineage, which records and uses that of the training arguments; leave it out, and give "
                    f"--{argument}."
                )
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or plugin.cpu_offload is True:
        raise ValueError(
            "fsdp_offload_params: got True, expected False in a lineage, whose checkpoints are put together on the "
            "devices that the processes are connected by; where a student does not fit, use more processes or "
            "fsdp_activation_checkpointing."
        )


# ---- Memory ----


def keep_freed_memory() -> bool:
    """Tells glibc's malloc, for the rest of the process, to keep freed memory for the next request.

    For programs that only train on a CPU: in this package only the scripts in examples/ call it. The peak memory of
    the process stays about the same, but freed memory is not returned to the system. Environment variables of malloc
    (see man mallopt) take precedence.

    Returns:
        Whether it was set; False with another C library, or where such an environment variable is set.
    """
    if any(name in os.environ for name in _MALLOC_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: musl, macOS, Windows
        return False
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_FROM):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


@contextlib.contextmanager
def frozen_garbage_collector() -> Iterator[None]:
    """A context manager in which the garbage collector ignores the objects that existed before.

    Otherwise every collection traverses the modules of torch and transformers, which are never freed: a quarter of a
    second, three times a generation. It affects the whole process, so the program decides, not the runner. Does
    nothing if the process has called gc.freeze itself.
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


def release_memory(trainer: Trainer) -> None:
    """Releases what a training leaves in accelerate and the compiler, before the next training in this process.

    Memory is freed when the caller drops its own references to trainer and networks.
    """
    trainer.accelerator.free_memory()
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        # Compiled graphs are cached by function: those of an earlier network count towards the recompilation limit of
        # the next one.
        torch.compiler.reset()


def collect_memory() -> None:
    """Collects garbage, and returns cached memory to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory() -> bool:
    """Resets `peak_memory_mib`.

    Returns:
        Whether it was reset: always on a CUDA device; for resident memory only where Linux lets a process write its
        clear_refs (containers may not).
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
    """The peak memory of this process in MiB: of the CUDA device where there is one, else resident memory.

    It counts from the last successful `reset_peak_memory`, or the start of the process. None where it is not available
    (Windows).
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
    """Linux' own peak, which can be reset, unlike that of getrusage."""
    try:
        found = re.search(r"^VmHWM:\s*([0-9]+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) >> 10
