"""Inference copies of a frozen network: BatchNorm folded into convolutions, weights in a smaller dtype."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

logger = logging.getLogger(__name__)

# Exact types: a subclass may compute its weight anew in each forward, as timm's StdConv2d does, which would undo what
# is folded into it. Parametrized layers have a class of their own.
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def cpu_capabilities() -> dict[str, Any]:
    """What torch tells of the processor, with its name as "cpu_name"; an older torch tells only what is read here."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    names: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "cpu_name": next(iter(names), platform.machine()),
    }


def folded_copy(network: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a network with its BatchNorm layers folded into the convolutions before them.

    In eval mode BatchNorm is a scale and a shift of each channel, which a convolution before it can have in its own
    weights (Jacob et al. 2018, arXiv 1712.05877, section 3.2). Tracing one forward pass finds each BatchNorm that is
    the only reader of a convolution's output. The others, such as those that open a pre-activation block, stay. Then
    the copy is run once on the inputs: where its outputs differ from the network's, a warning says so and nothing is
    folded.

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
    return fold_and_cast(copy.deepcopy(network), inputs, dtype)


def fold_and_cast(network: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """As `folded_copy`, in place: for a network that nothing else uses."""
    if network.training:
        raise ValueError("network: is in train mode, expected eval mode, in which BatchNorm is fixed; call eval().")
    network.requires_grad_(False)
    _fold_all(network, inputs)
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
            _flatten(module)
    network.register_forward_pre_hook(CastInputs(dtype), with_kwargs=True)
    return network


def _flatten(layer: nn.RNNBase) -> None:
    """Makes the weights of a layer one piece of memory on a GPU, as cuDNN wants them, those in bfloat16 too.

    torch takes bfloat16 for a dtype that cuDNN does not know, and leaves such weights apart: cuDNN then copies them at
    every call, with a warning. It does compute in it, and so does the function that torch calls here.
    """
    known = torch.backends.cudnn.CUDNN_TENSOR_DTYPES
    missing = {torch.bfloat16} - known
    known.update(missing)
    try:
        layer.flatten_parameters()
    finally:
        known.difference_update(missing)


def _fold_all(network: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Folds every pair, or none where the network would then compute something else."""
    pairs = _pairs(network, inputs)
    if not pairs:
        return
    tolerance = max(_epsilon(convolution.weight) for convolution, _ in pairs) ** 0.5
    with torch.no_grad():
        expected = _tensors(network(**inputs))
        unfold = [_fold(network, convolution, norm) for convolution, norm in pairs]
        error = max(map(_relative_error, _tensors(network(**inputs)), expected))
    # Rounding adds up from layer to layer, while a wrong weight is wrong by more than a root of one rounding.
    if error <= tolerance:
        return
    for restore in unfold:
        restore()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        logger.warning(
            f"BatchNorm of {type(network).__name__} is not folded into its convolutions: the outputs would differ by "
            f"{error:.2g} of their size, where rounding explains {tolerance:.2g}. The network computes with its "
            "BatchNorm layers as they are."
        )


def _epsilon(weight: Tensor) -> float:
    if weight.is_cuda and weight.dtype == torch.float32:
        return 2**-10  # of TF32, in which cuDNN computes convolutions
    return torch.finfo(weight.dtype).eps


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """The size of the difference relative to that of what is expected; infinite for what is not a number."""
    finite = expected.isfinite()  # masked logits are not
    wide = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found[finite].to(wide), expected[finite].to(wide)
    error, size = (found - expected).norm().item(), expected.norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / size if size else math.inf if error else 0.0


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a layer computes what its class says, with the weights that it has."""
    return (
        type(module) in kinds
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks  # which may set weights, as weight_norm's does
    )


def _pairs(network: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions with the BatchNorm that alone reads their output."""
    layers = {
        module: kind
        for module in network.modules()
        for kinds, kind in ((_CONVOLUTIONS, "convolution"), (_NORMS, "norm"))
        if _is_plain(module, kinds)
    }
    if len(set(layers.values())) < 2:
        return []
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d, Any]] = []
    calls: Counter[nn.Module] = Counter()

    def see_convolution(module: nn.Conv2d, args: tuple, output: Tensor) -> None:
        calls[module] += 1
        outputs[id(output)] = (module, output)  # which keeps it, so that no other tensor gets its id

    def see_norm(module: nn.BatchNorm2d, args: tuple, output: Tensor) -> None:
        calls[module] += 1
        convolution, seen = outputs.get(id(args[0]), (None, None)) if args else (None, None)
        fixed = module.track_running_stats and module.running_mean is not None and not module.training
        if seen is not None and seen is args[0] and fixed:
            found.append((convolution, module, seen.grad_fn))

    hooks = [
        module.register_forward_hook(see_convolution if kind == "convolution" else see_norm)
        for module, kind in layers.items()
    ]
    rows = {len(value) for value in inputs.values() if _is_floating(value) and value.dim()}
    # One row is enough. With a gradient through the inputs autograd's graph tells who reads what.
    traced = {
        name: value[:1] if isinstance(value, Tensor) and value.dim() and len(value) in rows else value
        for name, value in inputs.items()
    }
    traced = {
        name: value.detach().clone().requires_grad_() if _is_floating(value) else value
        for name, value in traced.items()
    }
    try:
        with torch.enable_grad():
            readers = _readers(network(**traced))
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
    pending = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
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


def _tensors(outputs: Any) -> list[Tensor]:
    """The floating tensors among nested outputs."""
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, tuple | list):
        return [tensor for part in outputs for tensor in _tensors(part)]
    return [outputs] if _is_floating(outputs) else []


def _fold(network: nn.Module, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Callable[[], None]:
    """Puts BatchNorm into the convolution before it; what is returned takes it out again."""
    before = convolution.weight, convolution.bias
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
    # A layer may be a part of several others.
    names = [name for name, module in network.named_modules(remove_duplicate=False) if module is norm]

    def put(layer: nn.Module) -> None:
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, layer)

    def restore() -> None:
        convolution.weight, convolution.bias = before
        put(norm)

    put(rest)
    return restore


class CastInputs:
    """A hook before the forward of a network with weights of another dtype than its inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), self.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of nested tuples, lists and dicts, such as a recurrent state, in another dtype."""
    if type(value) in (tuple, list):
        return type(value)(_cast(part, dtype) for part in value)
    if type(value) is dict:
        return {name: _cast(part, dtype) for name, part in value.items()}
    # Not where it has that dtype already: a compiler would make a graph of it.
    return value.to(dtype) if _is_floating(value) and value.dtype != dtype else value


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
