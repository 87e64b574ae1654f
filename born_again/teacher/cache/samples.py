"""The teacher cache for independent samples, such as images: only the missing rows of a batch are computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from born_again.teacher.cache.cached_teacher import CachedTeacher, keys_of

logger = logging.getLogger(__name__)

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as whole numbers, by the bytes of a number
_PARTS = 16  # the computed part of a batch has a multiple of a sixteenth of its rows


class CachedRows(CachedTeacher):
    """Caches the logits of each sample.

    The last bits of a sample's logits may depend on the batch size, since libraries choose kernels by sizes. Only
    outputs that are bit-equal to those of full batches are cached, and part of a batch is only computed alone where
    its rows are bit-equal to those of the full batch. That is checked once for each size, on all rows of the first
    batch in another order and after every layer (logits alone are few numbers and may round alike by chance), and
    remembered. Where it does not hold, the whole batch is computed. So a training has the weights that it has without
    the cache.
    """

    _example: tuple[dict[str, Any], Tensor] | None = None  # a full batch, and the checksums of its rows

    @torch.no_grad()
    def forward_with_states(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        keys, inputs = keys_of(inputs)
        none = [None] * len(self.modules)
        if keys is None:
            return self.frozen(inputs), none
        rows = len(keys)
        found, cached = self.outputs.read(keys, self.frozen.device)
        if not self._is_exact(rows):
            # Outputs at this batch size differ from those of a full batch: the two must not be mixed.
            found, cached = np.zeros(rows, bool), None
        self._count(found)
        if found.all():
            return cached[0], none
        missing = np.flatnonzero(~found)
        computed = self._rows_to_compute(missing, found)
        if len(computed) == rows:
            logits = self.frozen(inputs)
            self._remember_example(inputs, rows)
            if self._is_exact(rows):
                self._store_rows(keys[missing], logits[torch.from_numpy(missing).to(logits.device)])
            return logits, none
        picked = torch.from_numpy(computed).to(self.frozen.device)
        part = self.frozen(_rows_of(inputs, picked, rows))
        logits = part.new_empty((rows, *part.shape[1:]))
        logits[torch.from_numpy(np.flatnonzero(found)).to(part.device)] = cached[0]
        logits[picked] = part
        self._store_rows(keys[missing], part[: len(missing)])
        return logits, none

    def close(self) -> None:
        super().close()
        self._example = None

    def _store_rows(self, keys: np.ndarray, logits: Tensor) -> None:
        self.outputs.write(keys, [logits], "logits")

    def _rows_to_compute(self, missing: np.ndarray, found: np.ndarray) -> np.ndarray:
        """The missing rows, filled up with others to a batch size whose outputs are bit-equal; or all rows."""
        rows, step = len(found), max(1, -(-self.batch_rows // _PARTS))
        for size in range(-(-len(missing) // step) * step, rows, step):
            if self._is_exact(size):
                return np.concatenate([missing, np.flatnonzero(found)[: size - len(missing)]])
        return np.arange(rows)

    def _is_exact(self, rows: int) -> bool:
        """Whether outputs at this batch size are bit-equal to those of a full batch."""
        if rows == self.batch_rows:
            return True
        if rows > self.batch_rows or self.frozen.is_compiled:  # it would be compiled again for other sizes
            return False
        if rows not in self.outputs.sizes:
            if self._example is None:
                return False
            self.outputs.remember_size(rows, self._is_bit_equal(rows))
        return self.outputs.sizes[rows]

    def _remember_example(self, inputs: Mapping[str, Any], rows: int) -> None:
        """Takes the first full batch as the example on which batch sizes are checked."""
        if self._example is not None or rows != self.batch_rows:
            return
        self._example = dict(inputs), self._row_checksums(inputs, rows)
        if not self._is_bit_equal(self.batch_rows):
            logger.warning(
                "teacher_cache: on this machine the last bits of the teacher's output for a row depend on the order "
                "of its batch. Cached outputs, and so weights, equal uncached ones only up to that rounding."
            )

    def _is_bit_equal(self, rows: int) -> bool:
        inputs, checksums = self._example
        count = self.batch_rows
        # A generator of its own, so that the training draws what it would have drawn.
        order = np.random.default_rng(rows).permutation(count)
        for start in range(0, count, rows):
            picked = torch.from_numpy(np.resize(np.roll(order, -start), rows)).to(checksums.device)
            if not torch.equal(self._row_checksums(_rows_of(inputs, picked, count), rows), checksums[:, picked]):
                if rows < count:
                    logger.info(
                        "Teacher cache: batches of %d rows are not computed alone, since they round differently.", rows
                    )
                return False
        return True

    def _row_checksums(self, inputs: Mapping[str, Any], rows: int) -> Tensor:
        """For each layer's output and the logits, the sum of every row's bits as whole numbers: (outputs, rows)."""
        checksums: list[Tensor] = []

        def add_checksum(module: nn.Module | None, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() and len(output) == rows and output.numel():
                bits = output.reshape(rows, -1).contiguous().view(_BITS.get(output.itemsize, torch.uint8))
                checksums.append(bits.sum(-1, dtype=torch.int64))

        self.frozen.prepare(inputs)
        layers = [layer for module in self.modules for layer in module.modules() if not any(layer.children())]
        if self.frozen.is_compiled:
            layers = []  # a hook would compile it again
        hooks = [layer.register_forward_hook(add_checksum) for layer in layers]
        try:
            add_checksum(None, None, self.frozen(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(checksums)


def _rows_of(inputs: Mapping[str, Any], picked: Tensor, rows: int) -> dict[str, Any]:
    """Some rows of a batch, each tensor in its own memory format."""
    part = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == rows:
            kind = torch.contiguous_format
            if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
                kind = torch.channels_last
            value = value[picked].contiguous(memory_format=kind)
        part[name] = value
    return part
