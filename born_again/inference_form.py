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
            What is left of BatchNorm is float32, and the frequencies of rotary position embeddings keep theirs.

    Returns:
        The copy, frozen, in eval mode. It is to be called outside autocast.

    Raises:
        ValueError: a network in train mode, whose BatchNorm is no fixed scale.
    """
    return put_in_inference_form(copy.deepcopy(network), inputs, dtype)


def put_in_inference_form(network: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """As `inference_form`, of the network itself: for one that no one else needs."""
    if network.training:
        raise ValueError("network: is in train mode, expected eval mode, in which BatchNorm is fixed; call eval().")
    network.requires_grad_(False)
    for convolution, norm in _pairs(network, inputs):
        _fold(network, convolution, norm)
    if dtype is None:
        return network
    for module in network.modules():
        # What is left of BatchNorm is as fast in float32 beside smaller activations, and rounds less.
        own = torch.float32 if isinstance(module, nn.modules.batchnorm._BatchNorm) else dtype
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(own)
        for name, buffer in module.named_buffers(recurse=False):
            # Of rotary position embeddings: the angles of far positions need all digits.
            if buffer.is_floating_point() and not name.endswith("inv_freq"):
                setattr(module, name, buffer.to(own))
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants the weights of a layer in one piece
    network.register_forward_pre_hook(lambda module, args, kwargs: _cast((args, kwargs), dtype), with_kwargs=True)
    return network


def _pairs(network: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions with the BatchNorm that alone reads their output."""
    if not all(any(isinstance(part, kind) for part in network.modules()) for kind in (nn.Conv2d, nn.BatchNorm2d)):
        return []
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
    rows = {len(value) for value in inputs.values() if _is_floating(value) and value.dim()}
    # One row is enough. With a gradient through the inputs autograd's graph tells who reads what.
    watched = {
        name: value[:1] if isinstance(value, Tensor) and value.dim() and len(value) in rows else value
        for name, value in inputs.items()
    }
    watched = {
        name: value.detach().clone().requires_grad_() if _is_floating(value) else value
        for name, value in watched.items()
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


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of nested tuples, lists and dicts, such as a recurrent state, in another dtype."""
    if type(value) in (tuple, list):
        return type(value)(_cast(part, dtype) for part in value)
    if type(value) is dict:
        return {name: _cast(part, dtype) for name, part in value.items()}
    return value.to(dtype) if _is_floating(value) else value


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
