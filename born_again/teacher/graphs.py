"""The forward of a frozen network as CUDA graphs: launched by the host as one piece instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from born_again.teacher.precision import CastInputs

MAX_GRAPHS = 6  # of one network: a full batch, the first window of a text, the last one, ...
_MAX_SEEN = 64  # sizes that are remembered: of padded texts there are many
_WARM_UPS = 3  # in which libraries choose their algorithms and make their workspaces
_CONSTANTS = (bool, int, float, str, type(None))

# Calls a function while its kernels are recorded; returns what launches them again, and the outputs of each launch.
Capture = Callable[[Callable[[], Any], Any], tuple[Callable[[], None], Any]]


class _Graph(NamedTuple):
    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Any


class GraphedForward:
    """Calls a frozen network, by a CUDA graph where a batch has the sizes of an earlier one.

    A graph always reads from the same memory and writes to the same memory, so inputs are copied in and outputs are
    copied out: what is returned belongs to the caller. Sizes that come for the first time are computed eagerly, which
    leaves out what comes once; at the second time the forward is captured. The graphs of one network share one memory
    pool, and there are at most `MAX_GRAPHS`; other sizes stay eager.

    Outputs are bit for bit those of the eager forward: the first ones of each graph are compared. A forward that
    cannot be captured (it waits for the device, draws random numbers, has hooks, or memory runs out) stays eager, of
    which `say` is told once.

    Args:
        network: frozen, in eval mode, whole on one device.
        call: calls it with the arguments by name, and returns nested tuples of tensors and None.
        say: is handed the reason when nothing is captured any more.
        capture: records a forward, see `capture_on_cuda`; another one stands in for it in tests without a GPU.
        device_type: of the tensors that can be captured.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Callable[..., Any],
        say: Callable[[str], None],
        capture: Capture | None = None,
        device_type: str = "cuda",
    ) -> None:
        self._network, self._call, self._say = network, call, say
        self._capture, self._device_type = capture or capture_on_cuda, device_type
        self._seen: set[Any] = set()
        self._graphs: dict[Any, _Graph] = {}
        self._pool: Any = None
        self._is_off = False
        modules = list(network.modules())
        self._hooks = [hooks for part in modules for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._own_hooks = sum(map(len, self._hooks))
        find = getattr(network, "get_output_embeddings", None)
        # The output layer may be stood in for, see `born_again.teacher.output_layer`.
        self._output_layer = {} if find is None or find() is None else vars(find())
        if any(not isinstance(hook, CastInputs) for hooks in self._hooks for hook in hooks.values()):
            self._turn_off("it has hooks")

    def __call__(self, **arguments: Any) -> Any:
        """What `call` returns for these arguments, in memory that nothing else writes to."""
        key = None if self._is_off else self._key(arguments)
        if key is None:
            return self._call(**arguments)
        if (graph := self._graphs.get(key)) is not None:
            for static, given in zip(graph.inputs, _tensors(arguments), strict=True):
                static.copy_(given)
            graph.replay()
            return copied(graph.outputs)
        if key in self._seen and len(self._graphs) < MAX_GRAPHS:
            return self._captured(key, arguments)
        if len(self._seen) < _MAX_SEEN:
            self._seen.add(key)
        return self._call(**arguments)

    def _key(self, arguments: Mapping[str, Any]) -> Any:
        """What a graph is made for; None for arguments of which none can be made."""
        if sum(map(len, self._hooks)) != self._own_hooks:
            return None  # of someone who looks at every call
        kind, parts = self._device_type, []
        for name, value in arguments.items():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor) and part.device.type == kind:
                    parts.append((name, part.shape, part.stride(), part.dtype))
                elif isinstance(part, _CONSTANTS):
                    parts.append((name, type(part), part))
                else:
                    return None
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (*parts, autocast, "forward" in self._output_layer)

    def _captured(self, key: Any, arguments: Mapping[str, Any]) -> Any:
        """The outputs of a forward that is computed eagerly, then captured for the next ones."""
        before = self._random_state()
        expected = self._call(**arguments)
        if not torch.equal(before, self._random_state()):
            return self._turn_off("it draws random numbers", expected)
        static, kind = copied(dict(arguments)), self._device_type
        # Casts that autocast caches would be freed while the graph goes on reading them.
        autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        try:
            with autocast:
                replay, outputs = self._capture(lambda: self._call(**static), self._shared_pool())
            replay()
            are_equal = _are_equal(outputs, expected)
        except Exception as error:  # whatever it is, the eager forward has just gone well
            return self._turn_off(f"it cannot be captured ({next(iter(str(error).splitlines()), '')})", expected)
        if not are_equal:
            return self._turn_off("its outputs would differ", expected)
        self._graphs[key] = _Graph(_tensors(static), replay, outputs)
        return expected

    def _turn_off(self, reason: str, outputs: Any = None) -> Any:
        self._is_off = True
        self._graphs.clear()
        self._say(f"The forward of {type(self._network).__name__} is not replayed as a CUDA graph, since {reason}.")
        return outputs

    def _shared_pool(self) -> Any:
        if self._pool is None and self._device_type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _random_state(self) -> Tensor:
        return torch.cuda.get_rng_state() if self._device_type == "cuda" else torch.get_rng_state()


def capture_on_cuda(call: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Captures a call as a CUDA graph, after calls on a side stream that are not captured.

    Args:
        call: of kernels alone: it may not wait for the device.
        pool: of `torch.cuda.graph_pool_handle`, in which other graphs may be that are never replayed while this one's
            outputs are still to be read.

    Returns:
        What launches the graph on the current stream, and the outputs that it writes to.

    Raises:
        RuntimeError: a call that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that pin memory or write checkpoints go on meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        outputs = call()
    return graph.replay, outputs


def copied(values: Any) -> Any:
    """Nested values with a copy of each tensor."""
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, values)


def _tensors(values: Any) -> list[Tensor]:
    return [part for part in tree_leaves(values) if isinstance(part, Tensor)]


def _are_equal(outputs: Any, expected: Any) -> bool:
    """Whether all tensors have the same bits, NaN among them."""
    pairs = zip(_tensors(outputs), _tensors(expected), strict=True)
    return all(torch.equal(*(part.reshape(-1).view(torch.uint8) for part in pair)) for pair in pairs)
