"""What a generation is computed in: as accelerate says once its trainer is made, recorded, and compared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend

from born_again.environment import ORDER_VARIABLES, float32_precision, sharding_engine
from born_again.lineage.schema import LineageError

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

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
            float32_precision: see `born_again.environment.float32_precision`.
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
