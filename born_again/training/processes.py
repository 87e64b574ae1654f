"""What makes several processes one training: rows that count once, and random numbers of each process's own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler
from transformers import set_seed

from born_again.objectives import IGNORED
from born_again.training.checks import class_numbers
from born_again.training.item_counts import LABEL_RANGE

logger = logging.getLogger(__name__)


class ProcessesMixin:
    """The part of BornAgainTrainer for trainings on several processes, where it computes the loss.

    Of 22 rows, 4 to each of two processes, accelerate fills the last batch of 6 with 2 of the first rows. The network
    sees these, and so does BatchNorm; they have no part in the loss, the metrics or the gradient.
    """

    @property
    def _is_one_of_many(self) -> bool:
        return self._owns_loss and self.args.world_size > 1

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Trainer's, of batches whose repeated rows have the label -100."""
        if self._is_one_of_many:
            epoch_iterator = map(self._ignore_repeated_rows, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _ignore_repeated_rows(self, batch: Any) -> Any:
        state, name = self.accelerator.gradient_state, self.label_names[0]
        if not state.end_of_dataloader or batch.get(name) is None:
            return batch
        rest, places = _rows_of_last_batch(state.active_dataloader)
        if rest is None:
            return batch
        labels = class_numbers(batch[name], name)
        places = places or len(labels)
        own = max(0, min(rest - self.args.process_index * places, places))
        if own == places:
            return batch
        if own and len(labels) != places:
            raise ValueError(
                f"data_collator: makes {len(labels)} rows of {name} of {places} samples, so which of them were "
                "repeated to fill the last batch, and must not count, cannot be told; expected a row for each sample, "
                "or dataloader_drop_last=True."
            )
        labels = labels.clone()
        labels[own:] = IGNORED
        return {**batch, name: labels, LABEL_RANGE: None}

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's."""
        config = self.args.accelerator_config
        if (
            self._is_one_of_many
            and config.dispatch_batches is False
            and isinstance(self.train_dataset, IterableDataset)
        ):
            self._warn(
                "accelerator_config: got dispatch_batches=False, with which accelerate does not say which rows of a "
                "stream it repeats to fill the last batch, so they count twice; leave it out, or end the training by "
                "max_steps before the stream ends."
            )
        return super().get_train_dataloader()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        """Trainer's, with a generator of its own where accelerate gives it none, such as one that groups by length."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        is_left_out = not isinstance(sampler, RandomSampler) and getattr(sampler, "generator", self) is None
        if self._is_one_of_many and is_left_out:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed)
        return sampler

    def _synchronize_batchnorm(self, student: nn.Module) -> None:
        """Has BatchNorm normalise by the rows of all processes, where the arguments ask for it.

        Raises:
            ValueError: on a CPU, where torch has no such layer.
        """
        if not (self._is_one_of_many and getattr(self.args, "sync_batchnorm", False)):
            return
        if self.args.device.type == "cpu":
            raise ValueError(
                "sync_batchnorm: got True on a CPU, where torch.nn.SyncBatchNorm does not run, expected False: leave "
                "it out, or take a network with GroupNorm or LayerNorm."
            )
        from timm.layers import convert_sync_batchnorm  # which knows timm's own layers, as torch's does not

        for name, child in student.named_children():
            setattr(student, name, convert_sync_batchnorm(child))

    def _begin_on_processes(self) -> None:
        """Before the first step of a training on several processes."""
        if not self._is_one_of_many:
            return
        layers = [layer for layer in self.model.modules() if isinstance(layer, _BatchNorm)]
        if layers and self.is_world_process_zero():
            all_of_them = any(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
            logger.info(
                "BatchNorm: %d layers normalise by the rows of %s; rows repeated to fill the last batch of an epoch "
                "are among them.",
                len(layers),
                "all processes" if all_of_them else "each process alone (sync_batchnorm=True: of all of them)",
            )
        if self.args.process_index:
            # Else all would have the same dropout masks.
            self._seed_process("")

    def _seed_process(self, moment: str) -> None:
        text = f"{self.args.seed} process {self.args.process_index}{moment}".encode()
        set_seed(int.from_bytes(hashlib.sha256(text).digest()[:4], "big"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's; from a checkpoint of another number of processes new random numbers, as it has none for each."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self._owns_loss:
            return
        written = len([*Path(checkpoint).glob("rng_state_*.pth")]) or 1
        if written != self.args.world_size:
            # Trainer would go on with those of the first step.
            self._seed_process(f" of {self.args.world_size} after step {self.state.global_step}")


def _rows_of_last_batch(loader: Any) -> tuple[int | None, int | None]:
    """How many rows all processes together have left for the last batch, and how many places each has for them.

    Returns:
        None for the rows where none is repeated or the loader does not say; None for the places where each row of a
        batch is one.
    """
    if isinstance(loader, DataLoaderDispatcher):
        return (loader.remainder if loader.remainder > 0 else None), None
    # Not by the loader's `remainder`: it counts the dataset and not the sampler, and is not there after a resume.
    sampler, shard = getattr(loader, "batch_sampler", None), None
    while hasattr(sampler, "batch_sampler"):
        shard = sampler if isinstance(sampler, BatchSamplerShard) else shard
        sampler = sampler.batch_sampler
    if shard is None or shard.batch_size is None or shard.drop_last:
        return None, None
    places = shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size
    return len(sampler.sampler) % (places * shard.num_processes) or None, places
