"""Lineages that go on with another number of processes, for test_global_batch.py.

torchrun --nproc_per_node 2 tests/support/reshared_lineages.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from helpers import arguments, language_model, sentences
from processes import leave
from tiny_lineage import Crash
from transformers import AutoModelForCausalLM
from two_lm_processes import STREAMS, lstm, streams

from born_again import BornAgainLMTrainer, LineageRunner, LineageSpec
from born_again.data.streams import collate_windows
from born_again.models.lstm_lm import LstmLMForCausalLM

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# Of generations 0 to 2 the crash is in the middle of the second epoch of the first student.
CRASH = {"text": Crash(1, 5), "windows": Crash(1, 8)}


def lineage(kind: str, folder: Path, crash: Crash | None = None, **changes) -> LineageRunner:
    """Of a GPT-2 on texts of their own lengths, the last batch of an epoch ragged; or of an LSTM on streams."""
    is_text = kind == "text"
    settings = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.1,
        "objective": "ban+l",
        "num_train_epochs": 2,
        "max_steps": -1,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 8 // PROCESSES if is_text else STREAMS,
        "per_device_eval_batch_size": 4 if is_text else STREAMS,
        "accelerator_config": {"split_batches": not is_text},
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": 2,
        **changes,
    }
    data = sentences("next", 22) if is_text else streams(3)

    def build_trainer(student, teacher, generation):
        return BornAgainLMTrainer(
            student,
            arguments(generation.checkpoint_dir, seed=generation.seed, **settings),
            teacher=teacher,
            train_dataset=data,
            eval_dataset={"test": data},
            data_collator=None if is_text else collate_windows,
            callbacks=[] if crash is None else [crash],
        )

    training = arguments(folder, **settings).weight_affecting()
    return LineageRunner(
        LineageSpec("tiny", kind, "words", generations=2, objective="ban+l", seed=3, training=training),
        folder,
        build_student=lambda generation: (language_model if is_text else lambda seed: lstm(seed, 8))(
            torch.initial_seed()
        ),
        build_trainer=build_trainer,
        load_teacher=(AutoModelForCausalLM if is_text else LstmLMForCausalLM).from_pretrained,
        data={"sha256": "a", "rows": {"train": len(data)}},
    )


def crash(kind: str, folder: Path, **changes) -> None:
    try:
        lineage(kind, folder, CRASH[kind], **changes).run()
    except KeyboardInterrupt:
        return
    raise AssertionError("the training ended before it could crash")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for kind in CRASH:
        lineage(kind, folder / f"{kind} begun on 1").run()
        crash(kind, folder / f"{kind} begun on 2")
    leave({}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
