"""How the tensors of an answer become rows of bytes, and tensors again with the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """The parts of one row: dtype and shape of each, one after the other.

    Args:
        parts: (name of a torch dtype such as "bfloat16", shape without the axis of rows) of each tensor.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> RowLayout:
        """The layout of tensors (rows, ...)."""
        return cls(tuple((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:])) for tensor in tensors))

    @classmethod
    def from_json(cls, parts: list[Any]) -> RowLayout:
        return cls(tuple((dtype, tuple(shape)) for dtype, shape in parts))

    def to_json(self) -> list[Any]:
        return [[dtype, list(shape)] for dtype, shape in self.parts]

    @property
    def row_bytes(self) -> int:
        return sum(self._sizes())

    def pack(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Rows of bytes.

        Args:
            tensors: one for each part, (n, ...) of its dtype and shape.

        Returns:
            (n, row_bytes) uint8.

        Raises:
            ValueError: tensors of another dtype or shape.
        """
        if RowLayout.of(tensors) != self:
            raise ValueError(
                f"teacher_cache: the teacher's answer to a sample is {RowLayout.of(tensors).to_json()} after "
                f"{self.to_json()} to others, expected the same dtype and shape for all; use teacher_cache='off'."
            )
        rows = [part.detach().cpu().reshape(len(part), -1).contiguous().view(torch.uint8).numpy() for part in tensors]
        return rows[0] if len(rows) == 1 else np.concatenate(rows, 1)

    def unpack(self, rows: np.ndarray, device: torch.device) -> list[Tensor]:
        """The tensors of rows (n, row_bytes) uint8, contiguous, on a device."""
        tensors, start = [], 0
        for (dtype, shape), size in zip(self.parts, self._sizes(), strict=True):
            # Into memory of torch's own: a kernel may round otherwise at an address that is aligned otherwise.
            tensor = torch.empty((len(rows), math.prod(shape)), dtype=getattr(torch, dtype))
            tensor.view(torch.uint8).copy_(torch.from_numpy(rows[:, start : start + size]))
            tensors.append(tensor.view(len(rows), *shape).to(device, non_blocking=True))
            start += size
        return tensors

    def _sizes(self) -> list[int]:
        return [math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in self.parts]
