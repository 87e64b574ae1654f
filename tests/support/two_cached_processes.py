"""What one of several processes does in test_teacher_cache_distributed.py: trainings without a cache and with each.

torchrun --nproc_per_node N tests/two_cached_processes.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from cached_trainings import hits, image_trainer, images, lstm, text_trainer, weights
from processes import leave

CACHES = ("off", "memory", "disk", "disk")


def trained(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {"weights": weights(trainer), "hits": torch.tensor(hits(trainer), dtype=torch.float64)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    backend = {"ddp_backend": "gloo"} if processes > 1 else {}
    results = {}
    for place, cache in enumerate(CACHES):
        shared = {"teacher_cache": cache, **backend}
        ours = image_trainer(
            folder / "images",
            dataset=images(50),
            per_device_train_batch_size=5,
            gradient_accumulation_steps=2,
            dataloader_num_workers=2,
            **shared,
        )
        results[f"images {place}"] = trained(ours)
        streams = {"accelerator_config": {"split_batches": True}}
        results[f"text {place}"] = trained(text_trainer(folder / "text", lstm(1), lstm(2, 6), **streams, **shared))
    leave(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
