"""A training whose peak memory a plan is held against; as a script, what each of its processes does."""

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import found_by, leave

OPTIMIZERS = {
    "sgd": {"optim": "sgd"},
    "sgd-momentum": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"},
    "adamw": {"optim": "adamw_torch"},
}


def measured_peaks(step: Mapping[str, Any], folder: Path) -> list[int]:
    """Peak resident memory, in bytes, of each process of a taught training of three steps, above its libraries'.

    With MALLOC_MMAP_THRESHOLD_=65536 in the environment freed memory goes back to the system at once, so that what the
    allocator leaves unused is not measured.
    """
    found = found_by(Path(__file__), folder, json.dumps(step), processes=step.get("processes", 1))
    return [own["peak"] for own in found]


def train(folder: Path, step: Mapping[str, Any]) -> int:
    import psutil
    import torch

    from born_again import BornAgainLMTrainer, BornAgainTrainer, BornAgainTrainingArguments, create_image_classifier
    from born_again.data.streams import TokenStreams, collate_windows
    from born_again.lineage.machine import peak_memory_mib, reset_peak_memory
    from born_again.models.language_models import CONFIGURATIONS, create_language_model

    processes, accumulation = step.get("processes", 1), step.get("accumulation", 1)
    is_text = step["model"] in CONFIGURATIONS
    args = BornAgainTrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=step["batch"] // accumulation // (1 if is_text else processes),
        gradient_accumulation_steps=accumulation,
        bf16=step["precision"] == "bf16",
        use_cpu=True,
        objective="ban",
        teacher_precision="inference",
        teacher_accuracy_samples=0,
        channels_last=not is_text,
        accelerator_config={"split_batches": is_text},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_backend="gloo" if processes > 1 else None,
        **OPTIMIZERS[step.get("optimizer", "sgd-momentum")],
    )
    assert args.world_size == processes
    torch.nn.Conv2d(4, 4, 3)(torch.randn(4, 4, 8, 8)).sum().backward()  # loads what is loaded when first used
    gc.collect()
    assert reset_peak_memory()
    before = psutil.Process().memory_info().rss
    if is_text:
        streams, window, words = step["batch"], step.get("window", 35), [*map(str, range(9999)), "<eos>"]
        student, teacher = (create_language_model(step["model"], words) for _ in range(2))
        tokens = torch.randint(0, len(words), (streams * window * 8,))
        data = TokenStreams(tokens, streams, window, before=0)
        trainer = BornAgainLMTrainer(student, args, train_dataset=data, data_collator=collate_windows, teacher=teacher)
    else:
        labels = [*map(str, range(10))]
        student, teacher = (create_image_classifier(step["model"], labels, [0.5] * 3, [0.5] * 3) for _ in range(2))
        data = [{"pixel_values": torch.randn(3, 32, 32), "labels": row % 10} for row in range(256)]
        trainer = BornAgainTrainer(student, args, train_dataset=data, teacher=teacher)
    trainer.train()
    return (peak_memory_mib() << 20) - before


if __name__ == "__main__":
    own_folder = Path(sys.argv[1])
    leave({"peak": train(own_folder / os.environ.get("RANK", "0"), json.loads(sys.argv[2]))}, own_folder)
