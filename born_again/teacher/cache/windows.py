"""The teacher cache for windows of a text: hidden states before the output layer, and the carried state."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from born_again.teacher import FrozenTeacher
from born_again.teacher.cache.cached_teacher import CachedTeacher, keys_of
from born_again.teacher.cache.outputs import CachedOutputs
from born_again.teacher.output_layer import output_layer, without_output_layer

logger = logging.getLogger(__name__)

_HIDDEN = "hidden states"


class CachedWindows(CachedTeacher):
    """Caches the inputs of the output layers of the teacher's networks, and the states after the window.

    The output layer computes the logits from them, one matrix product, bit-equal to those without the cache. This is
    checked on the first window; where it does not hold (a soft cap after the layer, several layers) the logits
    themselves are cached. A window is read from the cache for all rows of the batch, or computed for all of them.

    Args:
        frozen: see `CachedTeacher`.
        outputs: see `CachedTeacher`.
        batch_rows: see `CachedTeacher`.
        streams: of the training set; key k is window k // streams.
        window: positions of a whole window.
    """

    def __init__(
        self, frozen: FrozenTeacher, outputs: CachedOutputs, batch_rows: int, streams: int, window: int
    ) -> None:
        super().__init__(frozen, outputs, batch_rows)
        self.streams, self.window = streams, window
        self._caches_hidden: bool | None = None
        self._returns_hidden = False
        self._cast: dict[tuple[nn.Linear, torch.dtype], tuple[Tensor, Tensor | None]] = {}

    def forward_with_states(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        hidden, after = self.hidden_with_states(inputs, states)
        if not self._returns_hidden:
            return self._logits_of(hidden), after
        if not self._caches_hidden:
            raise ValueError(
                "loss_implementation: the chunked implementation needs the teacher's hidden states, and the teacher "
                "cache holds its logits; expected 'full' beside this teacher_cache."
            )
        return hidden[0], after

    @contextmanager
    def returning_hidden(self) -> Iterator[nn.Linear]:
        """Inside, a single network returns the input of its output layer instead of logits.

        Yields:
            That layer.
        """
        self._returns_hidden = True
        try:
            yield self._layers[0]
        finally:
            self._returns_hidden = False

    @torch.no_grad()
    def hidden_with_states(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """What comes before the logits.

        Args:
            inputs: see `FrozenTeacher.forward_with_states`; with "input_ids" (rows, time), and keys where outputs are
                cached.
            states: see there.

        Returns:
            For each network what its output layer is given (rows, time, hidden), or its logits where `output_layers`
            is None; and the states after the window.
        """
        keys, inputs = keys_of(inputs)
        if keys is None or len(keys) != self.batch_rows or not self._goes_on(keys, states):
            return self._read_live(inputs, states)
        self.frozen.prepare(inputs)  # its output layers are needed even on a cache hit
        found, parts = self.outputs.read(keys, self.frozen.device)
        if self._caches_hidden is None and self.outputs.layout is not None:
            self._caches_hidden = self.outputs.kind == _HIDDEN
        self._count(found if found.all() else np.zeros(len(keys), bool))
        if found.all():
            return self._taken_apart(parts, inputs["input_ids"].shape[1])
        hidden, after = self._read_live(inputs, states)
        self._check_states(after, len(keys))
        parts = [*map(self._as_long_as_a_window, hidden), *(part for state in after for part in state or ())]
        self.outputs.write(keys, parts, _HIDDEN if self._caches_hidden else "logits")
        return hidden, after

    @property
    def output_layers(self) -> list[nn.Linear] | None:
        """The layers that compute logits from hidden states, one for each network; None where logits are cached."""
        return self._layers if self._caches_hidden else None

    @property
    def _layers(self) -> list[nn.Linear | None]:
        return [output_layer(module) for module in self.modules]

    def _goes_on(self, keys: np.ndarray, states: Sequence[Any]) -> bool:
        """Whether the states are those that the first window of a text, or a later one, is read with."""
        begins = all(state is None for state in states)
        return not any(self.carries_state) or begins == bool(keys[0] // self.streams == 0)

    def _read_live(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        if self._caches_hidden is None:
            self._caches_hidden = self._layers_alone_make_logits(inputs, states)
            if not self._caches_hidden:
                logger.warning(
                    "teacher_cache: the teacher's logits are not the output of its output layer alone, or the layer "
                    "is compiled with the rest, so the logits are cached, which are larger than hidden states."
                )
        return (
            self._read_without_layers(inputs, states) if self._caches_hidden else self._network_outputs(inputs, states)
        )

    def _read_without_layers(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(without_output_layer(module))
            return self._network_outputs(inputs, states)

    def _network_outputs(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        logits, after = self.frozen.logits_by_network(inputs, states)
        return [part.contiguous() for part in logits], after

    def _layers_alone_make_logits(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> bool:
        if self.frozen.is_compiled or any(layer is None for layer in self._layers):
            return False  # a compiled network cannot skip a layer
        logits, _ = self.frozen.logits_by_network(inputs, states)
        hidden, _ = self._read_without_layers(inputs, states)
        with self.frozen.precision_context():
            return all(
                part.shape[-1] == layer.in_features and torch.equal(self._applied(layer, part), whole)
                for layer, part, whole in zip(self._layers, hidden, logits, strict=True)
            )

    def _logits_of(self, hidden: list[Tensor]) -> Tensor:
        if self._caches_hidden:
            with torch.no_grad(), self.frozen.precision_context():
                hidden = [self._applied(layer, part) for layer, part in zip(self._layers, hidden, strict=True)]
        return self.frozen.ensemble_logits(hidden)

    def _applied(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """The layer's output, as under autocast where that is on, but without casting its weights every time."""
        kind = hidden.device.type
        if not torch.is_autocast_enabled(kind) or torch.float64 in (hidden.dtype, layer.weight.dtype):
            return layer(hidden)
        dtype = torch.get_autocast_dtype(kind)
        if (layer, dtype) not in self._cast:
            bias = None if layer.bias is None else layer.bias.to(dtype)
            self._cast[layer, dtype] = layer.weight.to(dtype), bias
        return F.linear(hidden.to(dtype), *self._cast[layer, dtype])

    def close(self) -> None:
        super().close()
        self._cast.clear()

    def _taken_apart(self, parts: list[Tensor], time: int) -> tuple[list[Tensor], list[Any]]:
        count = len(self.modules)
        hidden = [part[:, :time].contiguous() for part in parts[:count]]
        rest, after = iter(parts[count:]), []
        # States follow in the order of the networks, those of each as many as its share.
        per_network = (len(parts) - count) // max(1, sum(self.carries_state))
        for carries in self.carries_state:
            after.append(tuple(next(rest) for _ in range(per_network)) if carries else None)
        return hidden, after

    def _as_long_as_a_window(self, hidden: Tensor) -> Tensor:
        missing = self.window - hidden.shape[1]  # of the last window
        return F.pad(hidden, (0, 0, 0, missing)) if missing else hidden  # (rows, window, hidden)

    def _check_states(self, states: Sequence[Any], rows: int) -> None:
        counts = {len(state) for state in states if state is not None}
        if len(counts) > 1 or any(len(part) != rows for state in states for part in state or ()):
            raise ValueError(
                "teacher_cache: the teacher carries a state whose first axis is not the rows of the batch, or its "
                "networks carry states of different numbers of parts; expected neither; use teacher_cache='off'."
            )
