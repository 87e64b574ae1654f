"""A training whose peak memory a plan is held against; as a script, what each of its processes does."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
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

    What was there after the training of a tiny network is taken off: the code of libraries is loaded when first used.

    With MALLOC_MMAP_THRESHOLD_=65536 in the environment freed memory goes back to the system at once, so that what the
    allocator leaves unused is not measured.
    """
    found = found_by(Path(__file__), folder, json.dumps(step), processes=step.get("processes", 1))
    return [own["peak"] for own in found]


def train(folder: Path, step: Mapping[str, Any]) -> int:
    import psutil
    import torch
    from helpers import language_model

    from born_again import BornAgainLMTrainer, BornAgainTrainer, BornAgainTrainingArguments, create_image_classifier
    from born_again.data.streams import TokenStreams, collate_windows
    from born_again.lineage.machine import collect_memory, peak_memory_mib, release_memory, reset_peak_memory
    from born_again.models.language_models import CONFIGURATIONS, create_language_model

    processes, accumulation = step.get("processes", 1), step.get("accumulation", 1)
    is_text = step["model"] in CONFIGURATIONS

    def arguments(batch: int) -> BornAgainTrainingArguments:
        args = BornAgainTrainingArguments(
            str(folder),
            max_steps=3,
            per_device_train_batch_size=batch // accumulation // (1 if is_text else processes),
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
        return args

    def train_text(create: Callable[[], Any], streams: int, window: int, words: int) -> BornAgainTrainer:
        student, teacher = create(), create()
        tokens = torch.randint(0, words, (streams * window * 8,))
        data = TokenStreams(tokens, streams, window, before=0)
        args = arguments(streams)
        trainer = BornAgainLMTrainer(student, args, train_dataset=data, data_collator=collate_windows, teacher=teacher)
        trainer.train()
        return trainer

    def train_images(model: str, batch: int) -> BornAgainTrainer:
        labels = [*map(str, range(10))]
        student, teacher = (create_image_classifier(model, labels, [0.5] * 3, [0.5] * 3) for _ in range(2))
        data = [{"pixel_values": torch.randn(3, 32, 32), "labels": row % 10} for row in range(256)]
        trainer = BornAgainTrainer(student, arguments(batch), train_dataset=data, teacher=teacher)
        trainer.train()
        return trainer

    def tiny() -> Any:
        if step["model"].startswith("gpt2"):
            return language_model(1).float()
        return create_language_model("lstm-small", [*map(str, range(22)), "<eos>"])

    # Loads the code of torch and oneDNN that a training uses, some 30 MiB, which is not the network's.
    release_memory(train_text(tiny, 4, 8, 23) if is_text else train_images("test_wide_resnet_cifar", 8))
    collect_memory()
    assert reset_peak_memory()
    before = psutil.Process().memory_info().rss
    if is_text:
        words = [*map(str, range(9999)), "<eos>"]
        create = partial(create_language_model, step["model"], words)
        train_text(create, step["batch"], step.get("window", 35), len(words))
    else:
        train_images(step["model"], step["batch"])
    return (peak_memory_mib() << 20) - before


if __name__ == "__main__":
    own_folder = Path(sys.argv[1])
    leave({"peak": train(own_folder / os.environ.get("RANK", "0"), json.loads(sys.argv[2]))}, own_folder)
