"""A dataset of augmented, normalised batches from images in memory, on the CPU or the GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.trainer_callback import TrainerCallback

from born_again.data.augment import PADDING, count_views, draw_views, identity_view, render_views

if TYPE_CHECKING:
    from born_again.data.images import ImageSplit


VIEW_KEYS = "view_keys"  # as in born_again.teacher.cache.cached_teacher


class ImageDataset(Dataset):
    """A split as a map-style dataset that augments and normalises a batch at a time.

    A DataLoader gets a whole batch from `__getitems__`: give it `collate_fn=collate_batch`,
    and `Trainer` `data_collator=collate_batch` with `remove_unused_columns=False` (Trainer's column filter expects a
    list of samples). With augmentation, add `EpochCallback` to the Trainer: see there.

    The epoch lives in shared memory, so that worker processes that outlive an epoch (`persistent_workers`) see it
    change.

    Attributes:
        emit_view_keys: whether batches have the column "view_keys", by which a teacher cache finds outputs. Set it
            before a DataLoader with workers is made.
    """

    def __init__(
        self,
        split: ImageSplit,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        augment: bool,
        flip: bool,
        seed: int,
        padding: int = PADDING,
    ):
        """
        Args:
            split: pixels (N, H, W, 3) uint8 and labels (N,) int64, both on any one device, where batches are made and
                returned; on a GPU the DataLoader must not have workers or pin memory.
            mean: mean of each channel, on the scale where 255 is 1.
            std: standard deviation of each channel, same scale, above 0.
            augment: crop (and mirror) at random; False gives the image itself in every epoch.
            flip: whether mirroring is part of the augmentation.
            seed: of the augmentation, any integer.
            padding: of the random crops, in pixels; see `born_again.data.augment.usual_padding`.

        Raises:
            ValueError: if pixels and labels differ in number, or a standard deviation is not above 0.
        """
        if len(split.pixels) != len(split.labels):
            raise ValueError(
                f"split has {len(split.pixels)} images and {len(split.labels)} labels; expected as many of each: "
                "check how it was cut"
            )
        if min(std) <= 0:
            raise ValueError(f"std is {tuple(std)}; expected three numbers above 0: use 1.0 for a constant channel")
        self.pixels = split.pixels
        self.labels = split.labels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.augment = augment
        self.flip = flip
        self.seed = seed
        self.padding = padding
        self.emit_view_keys = False
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose views are returned, counted from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Return the views of `epoch` (counted from 0) from now on, in this process and its workers.

        Raises:
            ValueError: if `epoch` is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; expected 0 or more: count epochs from 0")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def views(self, samples: torch.Tensor) -> torch.Tensor:
        """The numbers of the views of `samples` (B,) int64 in the current epoch: (B,) int64 on the CPU."""
        if not self.augment:
            return torch.full(samples.shape, identity_view(self.padding), dtype=torch.int64)
        return draw_views(self.seed, self.epoch, samples, self.flip, self.padding)

    @property
    def view_count(self) -> int:
        """The number of different inputs: samples times views."""
        return len(self) * count_views(self.flip, self.padding)

    @cached_property
    def label_range(self) -> tuple[int, int] | None:
        """The smallest and the largest label, which a trainer so knows without waiting for the device at every step.

        None where a label is -100, which is ignored, and where there is no label.
        """
        if not len(self.labels):
            return None
        low, high = (int(end) for end in self.labels.aminmax())
        return (low, high) if low >= 0 else None

    @cached_property
    def cache_fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that the input of a cache key depends on; not of seed and epoch."""
        facts = f"{tuple(self.pixels.shape)} {self.mean} {self.std} {self.flip} {self.padding}"
        digest = hashlib.sha256(facts.encode())
        digest.update(self.pixels.cpu().contiguous().numpy())  # pyright: ignore[reportArgumentType]
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample: pixel_values (3, H, W) float32 and labels () int64."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}; expected less than the {len(self)} samples of this split")
        batch = self.__getitems__([int(index) % len(self)])
        return {name: values[0] for name, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A whole batch.

        Args:
            indices: (B,) sample indices, each in 0 ... N - 1.

        Returns:
            pixel_values (B, 3, H, W) float32 in channels_last memory format, and labels (B,) int64; with
            `emit_view_keys` also view_keys (B,) int64 of numpy: sample * views of a sample + view.
        """
        samples = torch.as_tensor(indices, dtype=torch.int64)
        # One non-blocking transfer of views and samples to the device.
        chosen = torch.stack([samples, self.views(samples)])  # (2, B)
        there, views = chosen.to(self.pixels.device, non_blocking=True)
        pixel_values = render_views(self.pixels, there, views, self.mean, self.std, self.padding)
        batch: dict[str, Any] = {"pixel_values": pixel_values, "labels": self.labels.index_select(0, there)}
        if self.emit_view_keys:
            batch[VIEW_KEYS] = (chosen[0] * count_views(self.flip, self.padding) + chosen[1]).numpy()
        return batch


def collate_batch(batch: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a whole batch unchanged; stack a list of single samples.

    Args:
        batch: as returned by `ImageDataset.__getitems__`, or a list of samples of `__getitem__`.

    Returns:
        The batch as a dictionary of tensors.

    Raises:
        ValueError: if `batch` is neither. In Trainer the cause is `remove_unused_columns`, which expects a list of
            samples and reduces a whole batch to its keys.
    """
    if isinstance(batch, dict):
        return batch
    if not batch or not all(isinstance(sample, dict) for sample in batch):
        raise ValueError(
            f"batch is {batch!r:.80}; expected a whole batch or a list of samples: in a Trainer, set "
            "remove_unused_columns=False in its arguments"
        )
    stacked: dict[str, Any] = {
        name: torch.stack([sample[name] for sample in batch]) for name in batch[0] if name != VIEW_KEYS
    }
    if VIEW_KEYS in batch[0]:
        stacked[VIEW_KEYS] = np.stack([sample[VIEW_KEYS] for sample in batch])
    stacked["pixel_values"] = stacked["pixel_values"].contiguous(memory_format=torch.channels_last)
    return stacked


collate_batch.keeps_labels = True  # see `ImageDataset.label_range`


class EpochCallback(TrainerCallback):
    """Set the epoch of the training dataset when an epoch begins.

    accelerate's dataloaders do so themselves, except where they reach a sampler with an epoch of its own through a
    wrapper first (`DataLoaderShard.set_epoch`: an `elif`): with the seedable sampler that Trainer uses, that is
    training on several processes, an epoch resumed half-way, and `dispatch_batches`. Every epoch would then have the
    views of the first, without an error. `Trainer` calls this in every process before the first batch of an epoch.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Calls the dataset's `set_epoch`, if it has one, with `int(state.epoch)` (fractional after a resume)."""
        set_epoch = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch or 0))
