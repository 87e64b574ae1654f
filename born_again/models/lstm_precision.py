"""LSTMs in a dtype that the machine does not support, such as bfloat16: computed in float32, then rounded.

oneDNN has no LSTM in bfloat16 for CPUs without AVX-512, and none in float16 for most CPUs: under autocast torch raises
at the first call, and for weights of that dtype it uses a slow kernel that rounds after every step. Such an LSTM is
computed in float32, and its results are rounded to the requested dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def requested_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a layer's output for x: that of autocast if it is on, else that of x and the weights."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def computes_lstm(device: torch.device, dtype: torch.dtype, grad: bool) -> bool:
    """Whether this machine supports an LSTM in a dtype; tried once per process.

    Args:
        device: of inputs and weights.
        dtype: of autocast or of the weights.
        grad: whether a backward pass is needed too.
    """
    return dtype in _WIDE or device.type == "meta" or _tried(device, dtype, grad)


# A compiler takes the result for a constant, and does not look inside.
@torch.compiler.assume_constant_result
def _tried(device: torch.device, dtype: torch.dtype, grad: bool) -> bool:
    return _exports_or_computes(device, dtype, grad)


# torch 2.8's compiler takes is_exporting() for True.
@torch.compiler.disable
def _exports_or_computes(device: torch.device, dtype: torch.dtype, grad: bool) -> bool:
    return torch.compiler.is_exporting() or _try(device, dtype, grad)  # torch.export takes an LSTM apart


@functools.cache
def _try(device: torch.device, dtype: torch.dtype, grad: bool) -> bool:
    def compute() -> bool:
        x, h, c = (torch.zeros(1, 1, 1, device=device) for _ in range(3))
        weights = [torch.zeros(shape, device=device, requires_grad=grad) for shape in ((4, 1), (4, 1), (4,), (4,))]
        try:
            with torch.set_grad_enabled(grad), torch.autocast(device.type, dtype):
                out = torch.lstm(x, (h, c), weights, True, 1, 0.0, grad, False, True)[0]
            if grad:
                out.sum().backward()
        except RuntimeError:
            return False
        return True

    # In its own thread, without the caller's modes (autocast, fake tensors, a default device).
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute).result()


# Compiled, torch.lstm would be unrolled step by step; a compiler leaves nn.LSTM alone, too.
@torch.compiler.disable
def lstm(
    x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], training: bool, in_float32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.lstm of one layer.

    Args:
        x: (batch, time, inputs) of any float dtype.
        state: hidden and cell state, each (1, batch, units), of the dtype of x.
        weights: weight_ih, weight_hh, bias_ih, bias_hh.
        training: as torch.lstm's `train`.
        in_float32: whether to compute in float32 and round the results to the requested dtype.

    Returns:
        (batch, time, units), and hidden and cell state after the last step, each (1, batch, units).
    """
    if not in_float32:
        return torch.lstm(x, tuple(state), list(weights), True, 1, 0.0, training, False, True)
    dtype = requested_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        wide = [part.float() for part in weights]
        state = tuple(part.float() for part in state)
        results = torch.lstm(x.float(), state, wide, True, 1, 0.0, training, False, True)
    return tuple(part.to(dtype) for part in results)
