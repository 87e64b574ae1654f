"""The memory of a training step, counted on tensors without data: every operation runs, nothing is computed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from born_again.objectives.chunked import Head, chunk_rows
from born_again.teacher import logits_of
from born_again.teacher.inputs import cast_floating, input_dtype
from born_again.teacher.output_layer import without_output_layer

_READ = torch.ops.aten._local_scalar_dense.default
_UNIQUE = torch.ops.aten._unique2.default


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step allocates beside weights and optimizer state, at the moment when they are most.

    Args:
        peak: all of them.
        gradients: of the parameters, as part of peak.
        logits: of student and teacher and the gradient of the student's, as part of peak; 0 where peak is elsewhere.
    """

    peak: int
    gradients: int
    logits: int

    @property
    def activations(self) -> int:
        """What is neither: what backward needs, and what operations use for themselves."""
        return self.peak - self.gradients - self.logits


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Inside, tensors have shapes, dtypes and strides of a CPU's, and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def made_without_data(make: Callable[[], nn.Module]) -> nn.Module:
    """The network that a function makes, without data, also where the function reads numbers out of tensors."""
    try:
        return make()
    except DataDependentOutputException:
        with unset_fake_temporarily():
            network = make()
    for module in network.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Gives parameters but BatchNorm's another dtype, in a network made without data, where Module.to fails."""
    done: dict[int, nn.Parameter] = {}
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if id(parameter) not in done:  # tied ones stay tied
                done[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            setattr(module, name, done[id(parameter)])
    return network


def step_memory(
    student: nn.Module,
    teacher: nn.Module | None,
    inputs: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    chunked: bool = False,
    accumulated: bool = False,
    counts_gradients: bool = True,
) -> StepMemory:
    """Runs a step of student and teacher, made inside `without_data`, and counts.

    The loss is born_again's: beside the logits it holds their gradient, and blocks of rows that are small.

    Args:
        student: in train mode.
        teacher: with weights in the precision that it computes in; None trains on labels.
        inputs: a micro-batch, by the names of the student's forward.
        dtype: of autocast; float32 for none.
        chunked: whether the logits are computed some rows at a time.
        accumulated: whether gradients of earlier micro-batches are there.
        counts_gradients: False where the caller counts them, since they do not stay where they arise.
    """
    given = [
        tensor
        for network in (student, teacher)
        if network is not None
        for tensor in (*network.parameters(), *network.buffers())
    ]
    live = _LiveBytes([*given, *inputs.values()])
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(live.is_gradient if counts_gradients else _let_go)
    for _ in range(2 if accumulated and counts_gradients else 1):
        with live:
            total = _loss(student, teacher, inputs, dtype, chunked, live)
            total.backward()
            del total
    return StepMemory(live.peak, live.gradients_at_peak, live.logits_at_peak)


def _dtype(network: nn.Module) -> torch.dtype:
    """The narrowest of its parameters': BatchNorm's stay wide."""
    return min((parameter.dtype for parameter in network.parameters()), key=lambda dtype: dtype.itemsize)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _loss(
    student: nn.Module,
    teacher: nn.Module | None,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    chunked: bool,
    live: _LiveBytes,
) -> Tensor:
    def run(network: nn.Module, autocast: bool) -> tuple[Tensor, Any]:
        call: dict[str, Any] = cast_floating(inputs, None if autocast else input_dtype(network))
        if hasattr(network, "config") and getattr(network.config, "use_cache", None) is not None:
            call["use_cache"] = False
        with contextlib.ExitStack() as stack:
            if autocast:
                stack.enter_context(torch.autocast("cpu", dtype))
            layer = stack.enter_context(without_output_layer(network)) if chunked else None
            values = call.values() if "pixel_values" in call else ()
            return logits_of(network(*values) if values else network(**call)), layer

    teacher_out: Any = None
    teacher_layer: Any = None
    narrow = dtype != torch.float32
    if teacher is not None:
        own = _dtype(teacher)
        with torch.no_grad():
            teacher_out, teacher_layer = run(teacher, narrow and own == torch.float32)
    out, layer = run(student, narrow and _dtype(student) == torch.float32)
    if chunked:
        parts = [*_rows(out, layer), *(() if teacher_out is None else _rows(teacher_out, teacher_layer))]
        return _ChunkedLoss.apply(dtype, *parts)
    logits = out.float()  # as accelerate widens the output of a network under autocast
    del out
    for tensor in (logits, teacher_out):
        if tensor is not None:
            live.is_logits(tensor)
    return _FullLoss.apply(logits, teacher_out, live)


def _rows(hidden: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return hidden.reshape(-1, hidden.shape[-1]), layer.weight


class _FullLoss(torch.autograd.Function):
    """Holds what `born_again.objectives.fused` holds: the gradient of the logits until the backward pass."""

    @staticmethod
    def forward(ctx, student, teacher, live):
        gradient = torch.empty_like(student)
        live.is_logits(gradient)
        ctx.save_for_backward(gradient)
        return student.new_zeros(())

    @staticmethod
    def backward(ctx, grad_total):
        return ctx.saved_tensors[0], None, None


class _ChunkedLoss(torch.autograd.Function):
    """Holds what `born_again.objectives.chunked` holds: gradients of hidden states and output layer, and a chunk."""

    @staticmethod
    def forward(ctx, dtype, hidden, weight, teacher_hidden=None, teacher_weight=None):
        parts = [(hidden, weight)] + ([] if teacher_hidden is None else [(teacher_hidden, teacher_weight)])
        heads = [Head(rows.to(dtype), matrix.to(dtype), None) for rows, matrix in parts]
        to_hidden, to_weight = (torch.zeros(part.shape, dtype=torch.float32) for part in (hidden, weight))
        count = min(map(chunk_rows, heads))
        workspaces = [torch.empty(count, len(weight), dtype=dtype) for _ in heads]
        if dtype != torch.float32:
            workspaces.append(torch.empty(weight.shape, dtype=dtype))  # the product of one chunk
        del workspaces
        ctx.save_for_backward(to_hidden.to(hidden.dtype), to_weight.to(weight.dtype))
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, grad_total):
        return None, *ctx.saved_tensors, None, None


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed; `given` ones are not counted."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self.gradients_at_peak = self.logits_at_peak = 0
        self._live = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self._parts: dict[str, dict[int, int]] = {"gradients": {}, "logits": {}}

    def is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._note("gradients", parameter.grad)

    def is_logits(self, tensor: Tensor) -> None:
        self._note("logits", tensor)

    def _note(self, part: str, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._sizes:
            self._parts[part][key] = self._sizes[key]
            self._see_peak()

    def _see_peak(self) -> None:
        if self._live >= self.peak:
            self.peak = self._live
            self.gradients_at_peak, self.logits_at_peak = (sum(part.values()) for part in self._parts.values())

    def _free(self, key: int) -> None:
        self._live -= self._sizes.pop(key)
        for part in self._parts.values():
            part.pop(key, None)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ:
            return True  # whether all factors are one, say
        if func is _UNIQUE:  # as many as there can be
            flat = args[0].reshape(-1)
            out = flat.clone(), torch.zeros_like(args[0]), torch.zeros_like(flat)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self._live += self._sizes[key]
                    weakref.finalize(storage, self._free, key)
        self._see_peak()
        return out
