"""A lineage of two generations on several processes, of which the second is disturbed once, in test_stopping.py.

torchrun --nproc_per_node N tests/support/two_stopping_processes.py FOLDER HOW
"""

import os
import signal
import sys
from pathlib import Path

import torch
from helpers import arguments
from tiny_lineage import runner, spec
from transformers import TrainerCallback

from born_again.hub.launch import launch

STEP = 3  # of generation 1; checkpoints are written after steps 2 and 4
TIMEOUT = 10  # seconds


class Disturb(TrainerCallback):
    """Stops, kills or signals this process in a step of the first run, or raises an error there."""

    def __init__(self, folder: Path, how: str) -> None:
        self.mark, self.how = folder / "disturbed", how

    def on_step_begin(self, args, state, control, **kwargs):
        is_due = state.global_step == STEP - 1 and args.output_dir.endswith("gen1") and args.process_index == 1
        if self.how == "nothing" or not is_due or self.mark.exists():
            return
        self.mark.write_text(str(os.getpid()))
        if self.how == "error":
            raise ValueError("a wrong value")
        os.kill(os.getpid(), getattr(signal, self.how))


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    changes = {"ddp_backend": "gloo", "ddp_timeout": TIMEOUT, "per_device_train_batch_size": 4}
    asked = {"spec": spec(generations=1), "changes": changes}

    def start() -> int:
        arguments(folder, **changes)  # before the runner, so that the processes are joined
        if how == "both":
            raise ValueError("what all processes find wrong")
        runner(folder / "out", crash=Disturb(folder, how), **asked).run()
        return 0

    launch(start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
