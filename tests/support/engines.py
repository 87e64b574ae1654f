"""Engines that shard a network over processes, on a CPU: what a launcher and accelerate do on machines with GPUs."""

import os

import accelerate
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Has accelerate take processes on CPUs for processes with a GPU each; before training arguments are made.

    Accelerate shards by FSDP2 on accelerators alone, which torch does on CPUs too.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerate.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


FSDP2 = {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}}


def zero(stage: int) -> dict:
    """A configuration of DeepSpeed, in float32."""
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
    }


ENGINES = {
    "one": {},
    "ddp": {"ddp_backend": "gloo"},
    "fsdp2": FSDP2,
    "zero2": zero(2),
    "zero3": zero(3),
}


def prepare(engine: str) -> dict:
    """Makes this process ready for an engine; returns training arguments."""
    if engine == "fsdp2":
        allow_fsdp_on_cpu()
    if engine.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
    return ENGINES[engine]
