"""Engines that shard a network over processes, on a CPU: what a launcher and accelerate do on machines with GPUs."""

import os

import accelerate
from accelerate.utils import DistributedType

ENGINES = {"fsdp2": {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}}}


def prepare(engine: str) -> dict:
    """Makes this process ready for an engine, before training arguments are made; returns arguments.

    Accelerate shards by FSDP2 on accelerators alone, which torch does on CPUs too: it is told that processes on CPUs
    have a GPU each.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerate.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    return ENGINES[engine]
