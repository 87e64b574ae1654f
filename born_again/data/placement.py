"""Whether the images of a training are kept beside the network."""

from __future__ import annotations

import torch

from born_again.data.images import ImageData

# Of the memory of a GPU that is free; the networks come afterwards.
_SHARE = 0.25


def fits_on_gpu(data: ImageData, device: torch.device, workers: int = 0) -> bool:
    """Whether a dataset can be on the device of its training, where batches are then made without a transfer.

    It can if that is a CUDA device, the dataset takes at most a quarter of the memory that is free there, and no
    worker process makes the batches, since workers cannot hold what is on a GPU. Its DataLoader must not pin memory.

    Args:
        data: in main memory.
        device: of the training.
        workers: of the DataLoader.
    """
    return device.type == "cuda" and not workers and data.nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]
