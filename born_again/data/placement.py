"""Whether a dataset is held on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from born_again.data.images import ImageData
    from born_again.data.text import TextData

# Of the free GPU memory, which the networks need too.
_SHARE = 0.25


def fits_on_gpu(data: ImageData | TextData, device: torch.device, workers: int = 0) -> bool:
    """Whether a dataset can be held on the GPU, where batches are then made without a transfer.

    It requires a CUDA device, a quarter of its free memory or less, and a DataLoader without workers, which cannot use
    tensors on a GPU. The DataLoader must not pin memory.

    Args:
        data: in main memory.
        device: of the training.
        workers: of the DataLoader.
    """
    return device.type == "cuda" and not workers and data.nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]
