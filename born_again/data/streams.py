"""A corpus as contiguous streams of token ids, which a language model reads window after window."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORED = -100
VIEW_KEYS = "view_keys"  # as in born_again.teacher.cache.cached_teacher


class TokenStreams(Dataset):
    """A corpus cut into contiguous streams that are read side by side, window after window, in order.

    Every token is predicted once: the inputs are `before` and all tokens but the last, the labels are the tokens
    themselves. Stream s holds positions s L ... (s + 1) L - 1 of both, where L is tokens / streams, rounded up; the
    end of the last stream is padded with input `before` and label -100, which a loss ignores. Item i is window
    i // streams of stream i % streams. So unshuffled batches of `streams` rows hold one window each, row s always
    stream s, and a process that gets the same slice of every batch stays on its own streams. The last window is
    shorter where `window` does not divide L.

    Batches are made and returned on the device of the tokens. There a batch of neighbouring streams, as that of every
    process is, is a copy of a slice, without a transfer. On a GPU the DataLoader must not have workers or pin memory.

    Attributes:
        streams, window: as given.
        length: tokens in a stream, L.
        windows: number of windows of a stream.
        token_count: number of labels that are not ignored: the number of tokens.
        emit_view_keys: whether batches have the column "view_keys", by which a teacher cache finds outputs. Set it
            before a DataLoader with workers is made.

    Example:
        >>> text = TokenStreams(torch.tensor([5, 6, 7, 8, 1, 2, 3, 4]), streams=2, window=3, before=0)
        >>> first = text.__getitems__([0, 1])
        >>> first["input_ids"].tolist(), first["labels"].tolist()
        ([[0, 5, 6], [8, 1, 2]], [[5, 6, 7], [1, 2, 3]])
    """

    def __init__(self, tokens: torch.Tensor, streams: int, window: int, *, before: int):
        """
        Args:
            tokens: (N,) int64 token ids, on any device.
            streams: how many streams, at least 1: the rows of a batch over all processes.
            window: tokens in a window, at least 1 and at most L.
            before: id of the token that comes before the first, that is of `<eos>`.

        Raises:
            ValueError: if the tokens or a number is not so, or the corpus is too short for so many streams.
        """
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or len(tokens) == 0:
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}; expected torch.int64 of shape (N,), N > 0: "
                "pass a split of load_text"
            )
        for argument, value, least in (("streams", streams, 1), ("window", window, 1), ("before", before, 0)):
            if value < least:
                raise ValueError(f"{argument} is {value}; expected at least {least}: give a larger number")
        count = len(tokens)
        allowed = next((number for number in range(min(streams, count), 0, -1) if _fits(count, number, window)), 0)
        if allowed != streams:
            remedies = [f"at most {allowed} streams (the batch size)"] * (allowed > 0)
            remedies += ["a shorter window"] * (window > 1 and _fits(count, min(streams, count), 1))
            raise ValueError(
                f"streams is {streams} and window is {window} for a corpus of {count} tokens; expected every stream "
                f"to hold at least one window, and not padding alone: use {' or '.join(remedies)}"
            )
        self.streams = streams
        self.window = window
        self.length = -(-count // streams)
        self.windows = -(-self.length // window)
        self.token_count = count
        self.emit_view_keys = False
        padding = streams * self.length - count
        first = tokens.new_tensor([before])
        inputs = torch.cat([first, tokens[:-1], first.expand(padding)])
        labels = torch.cat([tokens, tokens.new_full((padding,), IGNORED)])
        self._inputs = inputs.view(streams, self.length)  # (S, L)
        self._labels = labels.view(streams, self.length)  # (S, L)

    def __len__(self) -> int:
        return self.windows * self.streams

    @property
    def view_count(self) -> int:
        """The number of different inputs: the items."""
        return len(self)

    @cached_property
    def cache_fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that the input of a cache key depends on."""
        digest = hashlib.sha256(f"{self.streams} {self.window} {self.length}".encode())
        digest.update(self._inputs.cpu().numpy())  # pyright: ignore[reportArgumentType]
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window of one stream: input_ids and labels, (T,) int64 each."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}; expected less than the {len(self)} windows of all streams")
        return {name: rows[0] for name, rows in self.__getitems__([int(index) % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A ready batch.

        Args:
            indices: (B,) items of one and the same window.

        Returns:
            input_ids and labels, (B, T) int64 each. The label of a position is the word after it: do not shift again.
            With `emit_view_keys` also view_keys (B,) int64 of numpy: the indices.

        Raises:
            ValueError: if the items are not of one window.
        """
        items = [int(index) for index in indices]
        first, last = min(items) // self.streams, max(items) // self.streams
        if first != last or not 0 <= first < self.windows:
            raise ValueError(
                f"indices are of the windows {first} to {last}; expected one of {self.windows}, since a batch is one "
                f"place of the streams: use batches of {self.streams} rows in order, without shuffling"
            )
        place = slice(first * self.window, (first + 1) * self.window)
        start = items[0] % self.streams
        rows: slice | torch.Tensor = slice(start, start + len(items))
        if items != list(range(items[0], items[0] + len(items))):
            rows = torch.tensor(items, device=self._inputs.device) % self.streams
        batch: dict[str, Any] = {
            name: tokens[rows, place].clone(memory_format=torch.contiguous_format)
            for name, tokens in (("input_ids", self._inputs), ("labels", self._labels))
        }
        if self.emit_view_keys:
            batch[VIEW_KEYS] = np.array(items, dtype=np.int64)
        return batch


def _fits(tokens: int, streams: int, window: int) -> bool:
    """Whether every stream is at least a window long and none is padding alone."""
    length = -(-tokens // streams)
    return length >= window and (streams - 1) * length < tokens


def collate_windows(batch: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Pass a ready batch through; stack a list of items of one length.

    Args:
        batch: what `TokenStreams.__getitems__` returned, or windows (time,) of one length.

    Returns:
        A dict of tensors: input_ids and labels (rows, time) int64, and with view keys those.

    Raises:
        ValueError: if `batch` is neither. In Trainer this is `remove_unused_columns`.
    """
    if isinstance(batch, dict):
        return batch
    if not all(isinstance(item, dict) for item in batch) or len({len(item["labels"]) for item in batch}) != 1:
        raise ValueError(
            f"batch is {batch!r:.80}; expected a ready batch or a list of windows of one length: use batches of as "
            "many rows as there are streams, in order, and in a Trainer remove_unused_columns=False in its arguments"
        )
    stacked: dict[str, Any] = {
        name: torch.stack([item[name] for item in batch]) for name in batch[0] if name != VIEW_KEYS
    }
    return {**stacked, VIEW_KEYS: np.stack([item[VIEW_KEYS] for item in batch])} if VIEW_KEYS in batch[0] else stacked
