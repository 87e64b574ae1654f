"""What one of several processes does in test_chunked_distributed.py: the chunked or the full loss.

torchrun --nproc_per_node N tests/two_chunked_processes.py FOLDER IMPLEMENTATION
"""

import os
import sys
from pathlib import Path

import torch
from helpers import arguments, language_model, llama, sentences
from processes import leave

from born_again import BornAgainTrainer
from born_again.objectives import chunked

NETWORKS = {"tied": language_model, "untied": llama}
CASES = (("ban", 1, None), ("ban+l", 2, None), ("cwtm", 1, None), ("cwtm", 2, False))  # objective, accumulated, unused


def trained(
    folder: Path, implementation: str, network: str, objective: str, accumulate: int, unused: bool | None
) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(
        folder,
        objective=objective,
        loss_implementation=implementation,
        max_steps=3,
        per_device_train_batch_size=8 // processes // accumulate,
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        ddp_find_unused_parameters=unused,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
    )
    build = NETWORKS[network]
    trainer = BornAgainTrainer(build(1), args, train_dataset=sentences("next", rows=24), teacher=build(2))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]),
        "wrapped": torch.tensor(isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)),
        "chunked": torch.tensor(trainer._chunked),
        "logged": torch.tensor([[entry["loss"], entry["kd_loss"], entry["ce_loss"]] for entry in logged]),
    }


def main(folder: Path, implementation: str) -> None:
    torch.set_num_threads(1)
    chunked._CHUNK = 23 * 7 * 8
    results = {
        f"{network} {' '.join(map(str, case))}": trained(folder, implementation, network, *case)
        for network in NETWORKS
        for case in CASES
    }
    leave(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
