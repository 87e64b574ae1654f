"""A frozen network in the form that answers fastest: BatchNorm inside convolutions, weights in a smaller dtype."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def inference_form(network: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a network whose BatchNorm layers after a convolution are part of that convolution.

    In eval mode BatchNorm is a scale and a shift of each channel, which a convolution before it can have in its own
    weights (Jacob et al. 2018, arXiv 1712.05877, section 3.2). Which BatchNorm reads what no one else reads is found
    by running the network once. The others, such as those that open a pre-activation block, stay.

    Args:
        network: in eval mode; not changed.
        inputs: what it is called with, by name; a batch of any size. Floating tensors must lead to the output.
        dtype: of the copy's floating weights, such as torch.bfloat16; None keeps them. Floating inputs are cast.

    Returns:
        The copy, frozen, in eval mode.

    Raises:
        ValueError: a network in train mode, whose BatchNorm is no fixed scale.
    """
    if network.training:
        raise ValueError("network: is in train mode, expected eval mode, in which BatchNorm is fixed; call eval().")
    network = copy.deepcopy(network).requires_grad_(False)
    for convolution, norm in _pairs(network, inputs):
        _fold(network, convolution, norm)
    if dtype is None:
        return network
    network.to(dtype)
    network.register_forward_pre_hook(lambda module, args, kwargs: _cast(args, kwargs, dtype), with_kwargs=True)
    return network


def _pairs(network: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions with the BatchNorm that alone reads their output."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d, Any]] = []
    calls: Counter[nn.Module] = Counter()

    def see_convolution(module: nn.Conv2d, args: tuple, output: Tensor) -> None:
        calls[module] += 1
        outputs[id(output)] = (module, output)  # which keeps it, so that no other tensor gets its id

    def see_norm(module: nn.BatchNorm2d, args: tuple, output: Tensor) -> None:
        calls[module] += 1
        convolution, seen = outputs.get(id(args[0]), (None, None))
        if seen is args[0] and module.track_running_stats:
            found.append((convolution, module, seen.grad_fn))

    hooks = [
        module.register_forward_hook(see_convolution if isinstance(module, nn.Conv2d) else see_norm)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    # With a gradient through the inputs autograd's graph tells who reads what.
    watched = {
        name: value.detach()[:1].clone().requires_grad_() if _is_floating(value) else value
        for name, value in inputs.items()
    }
    try:
        with torch.enable_grad():
            readers = _readers(network(**watched))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (convolution, norm)
        for convolution, norm, node in found
        if node is not None and readers[node] == 1 and calls[convolution] == calls[norm] == 1
    ]


def _readers(outputs: Any) -> Counter:
    """How many operations read the result of each operation that leads to an output."""
    tensors = outputs.values() if isinstance(outputs, Mapping) else outputs
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    pending = [tensor.grad_fn for tensor in tensors if isinstance(tensor, Tensor) and tensor.grad_fn is not None]
    readers: Counter = Counter(pending)  # an output is read by the caller
    seen = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for earlier, _ in node.next_functions:
            if earlier is not None:
                readers[earlier] += 1
                pending.append(earlier)
    return readers


def _fold(network: nn.Module, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
    convolution.bias = nn.Parameter(bias.detach(), requires_grad=False)
    # timm's BatchNorm has the activation that follows it inside.
    rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
    name = next(name for name, module in network.named_modules() if module is norm)
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, rest)


def _cast(args: tuple, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if _is_floating(value) else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
