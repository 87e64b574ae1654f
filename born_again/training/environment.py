"""Precision, compilation and accumulation that accelerate's launcher and the environment set."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from accelerate.utils.environment import get_int_from_env, parse_flag_from_env
from torch import distributed
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)

PRECISIONS = ("bf16", "fp16")
# Read by torch, cuBLAS and oneDNN: the precision of float32 arithmetic.
PRECISION_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)
# The order of sums, and with it their last digits.
ORDER_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
)

_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_DYNAMO = "ACCELERATE_DYNAMO_"
# As accelerate reads them.
_PROCESSES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
_TAKEN = {"FSDP": "FSDP", "DeepSpeed": "DEEPSPEED", "Megatron": "MEGATRON_LM"}  # values of DistributedType
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}
_COMPILE_FLAGS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def take_from_launcher(given: Collection[str], parsed: Any) -> dict[str, Any]:
    """Settings of `accelerate launch` as training arguments; a flag that the user gave takes precedence.

    TrainingArguments and accelerate read the launcher's environment behind the arguments: `--bf16 False` would compute
    in bf16 where the launcher says so, and ACCELERATE_GRADIENT_ACCUMULATION_STEPS would be dropped. Here the
    environment becomes arguments, which are shown, recorded and compared. Where a flag contradicts it, the flag is
    used, the first process logs a warning, and the variable is removed from the environment of this process.

    Call it before TrainingArguments are made.

    Args:
        given: names of the flags on the command line or in a config file.
        parsed: their values by name, as an object with attributes.

    Returns:
        Training arguments by name, for the flags that were not given: bf16 and fp16, torch_compile and the arguments
        beside it, gradient_accumulation_steps.
    """
    values: dict[str, Any] = {}
    precision = os.environ.get(_MIXED_PRECISION, "no").lower()
    wanted = [name for name in PRECISIONS if name in given and getattr(parsed, name)]
    if precision != "no":
        denied = precision in given and not getattr(parsed, precision)
        if denied or (wanted and wanted != [precision]):
            flag = precision if denied else wanted[0]
            _flag_wins(flag, getattr(parsed, flag), f"{_MIXED_PRECISION}={precision}", (_MIXED_PRECISION,))
            values |= {name: False for name in PRECISIONS if name not in given}
        else:
            values |= {name: name == precision for name in PRECISIONS if name not in given}
    backend = os.environ.get(f"{_DYNAMO}BACKEND", "no")
    chosen = [name for name in _COMPILE_FLAGS if name in given]
    if backend.upper() != "NO":
        mode = os.environ.get(f"{_DYNAMO}MODE", "default")
        if chosen:
            names = [name for name in os.environ if name.startswith(_DYNAMO)]
            _flag_wins(chosen[0], getattr(parsed, chosen[0]), f"{_DYNAMO}BACKEND={backend}", names)
        else:
            values |= {"torch_compile": True, "torch_compile_backend": backend.lower()}
            values |= {"torch_compile_mode": mode} if mode != "default" else {}
    steps = os.environ.get(_ACCUMULATION, "")
    if steps.isdigit() and int(steps) > 1:
        name = "gradient_accumulation_steps"
        if name not in given:
            values[name] = int(steps)
        elif getattr(parsed, name) != int(steps):
            _flag_wins(name, getattr(parsed, name), f"{_ACCUMULATION}={steps}", (_ACCUMULATION,))
    return values


def sharding_engine(args: TrainingArguments) -> str | None:
    """What shards the network over processes, as an argument or the launcher says, such as "FSDP"; else None."""
    if args.fsdp or args.deepspeed:
        return "FSDP" if args.fsdp else "DeepSpeed"
    return next((name for variable, name in _ENGINES.items() if os.environ.get(variable, "").lower() == "true"), None)


def number_of_processes() -> int:
    """How many the launcher has started, before they are joined."""
    return get_int_from_env(_PROCESSES, 1)


def share_of_batch(batch: int) -> int:
    """What each process takes of a recipe's batch, that of all of them together.

    Raises:
        ValueError: it cannot be shared out equally.
    """
    processes = number_of_processes()
    if batch % processes:
        divisors = [count for count in range(1, min(batch, 1024) + 1) if batch % count == 0]
        raise ValueError(
            f"per_device_train_batch_size: the recipe's batch of {batch} cannot be shared out equally to {processes} "
            f"processes; start {', '.join(map(str, divisors[:-1]))} or {divisors[-1]} of them, or give "
            f"--per_device_train_batch_size for each process, such as {max(1, batch // processes)}, which is another "
            "experiment."
        )
    return batch // processes


def join_processes_on_cpu(args: TrainingArguments) -> None:
    """Joins the processes of a launch with use_cpu so that they wait for each other for ddp_timeout seconds.

    TrainingArguments would leave them torch's 30 minutes. Where the processes are joined already it does nothing.

    Args:
        args: whose __post_init__ begins.
    """
    on_cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_cpu and number_of_processes() > 1 and not distributed.is_initialized():
        PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))


def check_launch(args: TrainingArguments) -> None:
    """Refuses a process that was started as one of several and trains alone.

    Raises:
        ValueError: accelerate has joined it with no other, so that each would write the same files.
    """
    started = number_of_processes()
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"use_cpu: got {args.use_cpu} where the launcher started {started} processes, and accelerate joined none "
            f"of them, since it found no GPU for them: each would train alone, on device {args.device}, and write the "
            "same files; expected use_cpu=True (--use_cpu True) to join them on CPUs, a GPU for each, or one process."
        )


def check_engine(trainer: Trainer, student: nn.Module) -> None:
    """Refuses what spreads a network over devices in a way that trains otherwise than was asked, or is not known here.

    Raises:
        ValueError: an engine that accelerate did not take; FSDP1; parallel dimensions within a network; a device_map
            of several devices; BatchNorm in the 16 bits of DeepSpeed.
    """
    accelerator, engine = trainer.accelerator, sharding_engine(trainer.args)
    taken = accelerator.distributed_type.value
    if engine is not None and taken != _TAKEN[engine]:
        raise ValueError(
            f"accelerate launch: got {engine}, which accelerate did not take: this training would run as {taken} on "
            f"{accelerator.num_processes} processes, every one with the whole network; expected several processes "
            f"with a GPU each and no use_cpu, or {engine} left out of the launcher and the arguments."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if engine == "FSDP" else None
    if getattr(plugin, "fsdp_version", 2) == 1:
        raise ValueError(
            "fsdp_version: got 1, expected 2, since FSDP1 flattens weights into pieces that no loss here was tested "
            "with; give --fsdp_version 2 to accelerate launch, or fsdp_config={'version': 2}."
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallel, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
    sizes["tp"] = max(sizes["tp"], getattr(student, "_tp_size", None) or 1)
    if engine == "DeepSpeed":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        sizes["tp"] = max(sizes["tp"], config.get("tensor_parallel", {}).get("autotp_size", 1))
        precision = accelerator.mixed_precision
        if precision in PRECISIONS and any(isinstance(layer, _BatchNorm) for layer in student.modules()):
            raise ValueError(
                f"{precision}: got True with DeepSpeed for {type(student).__name__}, which has BatchNorm: DeepSpeed "
                f"casts its weights and not its statistics, and torch refuses the two together; give --{precision} "
                "False, or use DistributedDataParallel, which computes in autocast."
            )
    if split := [f"{name}_size={size}" for name, size in sizes.items() if size > 1]:
        raise ValueError(
            f"parallelism_config: got {', '.join(split)}, which share one row out over several processes, expected 1 "
            "of each: teacher and loss are computed on whole rows. Where a network does not fit on one device, FSDP2 "
            "shards its weights and not its rows."
        )
    placed = {str(device) for device in (getattr(student, "hf_device_map", None) or {}).values()}
    if len(placed) > 1:
        raise ValueError(
            f"model: the student is spread over {', '.join(sorted(placed))} by a device_map, expected one device for "
            "each process; load it without device_map, and start one process for each GPU with accelerate launch."
        )


def launcher_chooses_precision() -> bool:
    """Whether the launcher sets a mixed precision; "no" is also its default."""
    return os.environ.get(_MIXED_PRECISION, "no").lower() != "no"


def compiler_of(args: TrainingArguments) -> tuple[str, str] | None:
    """Backend and mode that Trainer hands to torch.compile, None where it does not compile.

    Trainer uses accelerate's plugin, which reads what the arguments leave open from the environment.
    """
    plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    return None if plugin.backend == DynamoBackend.NO else (plugin.backend.value.lower(), plugin.mode)


def float32_precision(device: str) -> dict[str, str]:
    """How torch multiplies float32 numbers, by operation: "tf32" and "bf16" round them first, "medium" and "high" may.

    Args:
        device: its type, "cpu" or "cuda".

    Returns:
        What is not the most exact; {} where all is.
    """
    backends = torch.backends
    found: dict[str, str] = {}
    if hasattr(getattr(backends.mkldnn, "matmul", None), "fp32_precision"):
        gpu = {"matmul": backends.cuda.matmul, "conv": backends.cudnn.conv, "rnn": backends.cudnn.rnn}
        cpu = {"matmul": backends.mkldnn.matmul, "conv": backends.mkldnn.conv, "rnn": backends.mkldnn.rnn}
        found = {name: backend.fp32_precision for name, backend in (gpu if device == "cuda" else cpu).items()}
    else:
        found["matmul"] = torch.get_float32_matmul_precision()
        if device == "cuda" and backends.cudnn.allow_tf32:
            found["conv"] = "tf32"
    found = {name: value for name, value in found.items() if value not in ("none", "ieee", "highest")}
    return found | {name: os.environ[name] for name in PRECISION_VARIABLES if name in os.environ}


def _flag_wins(name: str, value: Any, said: str, variables: Collection[str]) -> None:
    for variable in variables:
        os.environ.pop(variable, None)
    if os.environ.get("RANK", "0") == "0":
        logger.warning("--%s %s takes precedence; the launcher's %s is ignored.", name, value, said)
