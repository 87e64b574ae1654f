"""Precision, compilation and accumulation that accelerate's launcher and the environment set."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin

if TYPE_CHECKING:
    from transformers import TrainingArguments

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
