"""What a kept answer depends on: where any of it differs, other answers are kept in another folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from born_again.environment import cpu_capabilities

# Of a configuration: where it came from, not what it computes.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def network_sha256(network: nn.Module) -> str:
    """SHA-256, hexadecimal, of what a network computes with: layers, configuration, every parameter and buffer."""
    digest = hashlib.sha256(f"{type(network).__qualname__} {network!r}".encode())
    config = getattr(network, "config", None)
    if hasattr(config, "to_dict"):
        values = {name: value for name, value in config.to_dict().items() if name not in _ORIGIN}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    # Buffers that no checkpoint holds are computed with too.
    for name, tensor in sorted({**dict(network.named_buffers()), **network.state_dict()}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def precision_of(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of an answer beside weights and inputs, at the moment of the call."""
    autocast = torch.is_autocast_enabled(device.type)
    on_cuda = device.type == "cuda"
    return {
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "convolution_tf32": torch.backends.cudnn.allow_tf32 if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "cpu": None if on_cuda else [torch.backends.cpu.get_cpu_capability(), cpu_capabilities().get("cpu_name")],
        "threads": None if on_cuda else torch.get_num_threads(),  # sums are shared among them
        "torch": torch.__version__,
    }


def cache_identity(networks: Sequence[nn.Module], data: str, device: torch.device, **facts: Any) -> dict[str, Any]:
    """Everything that one kept answer depends on.

    Args:
        networks: of the teacher, as they were given.
        data: `cache_fingerprint` of the training set.
        device: that they are on.
        **facts: whatever else, JSON-able.
    """
    teachers = [network_sha256(network) for network in networks]
    return {"format": 3, "teachers": teachers, "data": data, **precision_of(device), **facts}


def identity_name(identity: Mapping[str, Any]) -> str:
    """A folder's name: the first 20 digits of the identity's SHA-256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
