"""Answers to samples that stand for themselves, such as images: what is missing of a batch is asked for alone."""

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
_PARTS = 16  # a batch's part that is asked for has a multiple of a sixteenth of its rows


class CachedRows(CachedTeacher):
    """Keeps the logits of each sample.

    The last bits of a sample's logits may depend on how many others are in the batch, since libraries choose kernels
    by sizes. What is kept are answers out of full batches, and a part of a batch, or a batch of another size, is only
    asked for where its rows have the same bits: that is tried out once for each size, on all rows of the first batch
    in another order and after every layer, since logits have few numbers and may round alike by chance, and
    remembered. Where they have not, the whole batch is asked for. So a training has the weights that it has without
    the cache.
    """

    _example: tuple[dict[str, Any], Tensor] | None = None  # a full batch, and the marks of its rows

    @torch.no_grad()
    def read_on(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        keys, inputs = keys_of(inputs)
        none = [None] * len(self.modules)
        if keys is None:
            return self.frozen(inputs), none
        rows = len(keys)
        found, kept = self.answers.read(keys, self.frozen.device)
        if not self._is_exact(rows):
            # Its live answers are not those of a full batch: nothing of the one may stand for the other.
            found, kept = np.zeros(rows, bool), None
        self._count(found)
        if found.all():
            return kept[0], none
        missing = np.flatnonzero(~found)
        asked = self._asked_with(missing, found)
        if len(asked) == rows:
            logits = self.frozen(inputs)
            self._see(inputs, rows)
            if self._is_exact(rows):
                self._keep(keys[missing], logits[torch.from_numpy(missing).to(logits.device)])
            return logits, none
        picked = torch.from_numpy(asked).to(self.frozen.device)
        part = self.frozen(_rows_of(inputs, picked, rows))
        logits = part.new_empty((rows, *part.shape[1:]))
        logits[torch.from_numpy(np.flatnonzero(found)).to(part.device)] = kept[0]
        logits[picked] = part
        self._keep(keys[missing], part[: len(missing)])
        return logits, none

    def close(self) -> None:
        super().close()
        self._example = None

    def _keep(self, keys: np.ndarray, logits: Tensor) -> None:
        self.answers.write(keys, [logits], "logits")

    def _asked_with(self, missing: np.ndarray, found: np.ndarray) -> np.ndarray:
        """The missing rows, and as many others as make a size whose answers have the right bits; or all rows."""
        rows, step = len(found), max(1, -(-self.batch_rows // _PARTS))
        for size in range(-(-len(missing) // step) * step, rows, step):
            if self._is_exact(size):
                return np.concatenate([missing, np.flatnonzero(found)[: size - len(missing)]])
        return np.arange(rows)

    def _is_exact(self, rows: int) -> bool:
        """Whether rows of a batch of this size have the bits that they have in a full batch."""
        if rows == self.batch_rows:
            return True
        if rows > self.batch_rows or self.frozen.is_compiled:  # which would be compiled again for other sizes
            return False
        if rows not in self.answers.sizes:
            if self._example is None:
                return False
            self.answers.remember_size(rows, self._try_out(rows))
        return self.answers.sizes[rows]

    def _see(self, inputs: Mapping[str, Any], rows: int) -> None:
        """Takes the first full batch for the example that sizes are tried out on."""
        if self._example is not None or rows != self.batch_rows:
            return
        self._example = dict(inputs), self._marks(inputs, rows)
        if not self._try_out(self.batch_rows):
            logger.warning(
                "teacher_cache: on this machine a row of the teacher's answer has other last bits where its batch is "
                "in another order. Kept answers are equal to live ones up to that rounding only, and weights too."
            )

    def _try_out(self, rows: int) -> bool:
        inputs, marks = self._example
        count = self.batch_rows
        # A generator of its own, so that the training draws what it would have drawn.
        order = np.random.default_rng(rows).permutation(count)
        for start in range(0, count, rows):
            picked = torch.from_numpy(np.resize(np.roll(order, -start), rows)).to(marks.device)
            if not torch.equal(self._marks(_rows_of(inputs, picked, count), rows), marks[:, picked]):
                if rows < count:
                    logger.info("Teacher cache: batches of %d are not asked for, since they round otherwise.", rows)
                return False
        return True

    def _marks(self, inputs: Mapping[str, Any], rows: int) -> Tensor:
        """For each layer's output and the logits, the sum of every row's bits as whole numbers: (outputs, rows)."""
        marks: list[Tensor] = []

        def mark(module: nn.Module | None, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() and len(output) == rows and output.numel():
                bits = output.reshape(rows, -1).contiguous().view(_BITS.get(output.itemsize, torch.uint8))
                marks.append(bits.sum(-1, dtype=torch.int64))

        self.frozen.prepare(inputs)
        layers = [layer for module in self.modules for layer in module.modules() if not any(layer.children())]
        if self.frozen.is_compiled:
            layers = []  # a hook would compile it again
        hooks = [layer.register_forward_hook(mark) for layer in layers]
        try:
            mark(None, None, self.frozen(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(marks)


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
