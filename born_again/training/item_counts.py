"""How many items a step has, and what is known of their labels before a device is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from born_again.objectives import IGNORED

# Key in a batch: its smallest and its largest label, where the host knows them and none is ignored; None where one is.
LABEL_RANGE = "label_range"


class ItemCountsMixin:
    """The part of BornAgainTrainer that counts the items of a step, where it computes the loss."""

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        if not self._owns_loss:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = 0
        for index, batch in enumerate(batch_samples):
            labels = self._shift(self._split_labels(batch)[1])
            known = None if LABEL_RANGE in batch else self._range_on_host(labels)
            if known is not None:
                batch_samples[index] = {**batch, LABEL_RANGE: known}
            count = count + (labels.numel() if known else labels.ne(IGNORED).sum())
        if isinstance(count, int) and self.args.world_size == 1:
            return count
        return self._sum_over_processes(torch.as_tensor(count, device=device))

    def _range_on_host(self, labels: Tensor) -> tuple[int, int] | None:
        """The smallest and the largest of some labels, if none is ignored and no device has to be waited for.

        A dataset on the device says what it knows of all of its labels, if the collator leaves them as they are.
        """
        if labels.device.type != "cpu":
            kept = getattr(self.data_collator, "keeps_labels", False)
            return getattr(self.train_dataset, "label_range", None) if kept else None
        if not labels.numel():
            return None
        low, high = (int(end) for end in labels.aminmax())
        return None if low == IGNORED else (low, high)
