"""Engines that shard a network over processes, on CPUs: what a launcher and accelerate do on machines with GPUs."""

import os

import accelerate
from accelerate.utils import DistributedType

ENGINES = {
    "fsdp2": {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}},
    **{
        f"zero{stage}": {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                # ZeRO-3 leaves tensors of up to 100,000 numbers whole.
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            }
        }
        for stage in (2, 3)
    },
}


def prepare(engine: str) -> dict:
    """Makes this process ready for an engine, before training arguments are made; returns arguments.

    Accelerate shards by FSDP2 on accelerators alone, which torch does on CPUs too: it is told that processes on CPUs
    have a GPU each. DeepSpeed is told to take them as they are.
    """
    if engine.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        return ENGINES[engine]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerate.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    return ENGINES[engine]
