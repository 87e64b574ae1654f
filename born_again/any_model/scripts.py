"""What examples/run_image_classification.py and run_text_classification.py share: flags, defaults, and the run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from born_again.any_model import Lineage
from born_again.data.labelled import LabelledSplits, read_labelled
from born_again.hub.launch import (
    LineageFlags,
    apply_budget,
    default_output_dir,
    hub_settings,
    resume_lineage,
    saving,
    train,
    with_control,
)
from born_again.lineage.curve import evenly_spaced, take_curve
from born_again.lineage.machine import has_fast_bf16, set_threads
from born_again.lineage.spec import plain_name
from born_again.training.arguments import BornAgainTrainingArguments
from born_again.training.environment import share_of_batch, take_from_launcher


@dataclass
class ClassificationFlags(LineageFlags):
    """Model and data of a lineage of classifiers, named as in transformers' own scripts."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of pretrained weights that every generation starts from."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    pretrained: bool = field(
        default=False,
        metadata={"help": "Every generation starts from the pretrained classifier too, where it has as many classes."},
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a configuration whose network is trained from scratch; see model_args."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder of the dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Of a Hub dataset with several."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    label_column_name: str | None = field(default=None, metadata={"help": "Found by its type when not given."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training rows to evaluate on, where no other split has labels."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many of each split."})
    curve_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate so many rows of the validation split, without one of the test split, a few times a "
            "training, for curves; nothing is selected by them. 0 for none; when not given as many as cost about a "
            "hundredth of its time."
        },
    )


# As transformers' scripts have them; not tuned.
FINE_TUNING = {"learning_rate": 5e-5, "num_train_epochs": 3.0}
FROM_SCRATCH = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # of the training
    "weight_decay": 0.05,
    "num_train_epochs": 100.0,
}
HOUSEKEEPING = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "teacher_precision": "inference",
    "loss_normalization": "step",
    "save_total_limit": 2,
    "logging_steps": 50,
    "report_to": "none",
    "ddp_timeout": 600,
}


def classification_recipe(args: Namespace, model: str, data: str, is_pretrained: bool) -> dict[str, Any]:
    """Defaults that suit the given arguments, which take precedence over them.

    Args:
        args: parsed so far, see `parse_arguments`.
        model: for the name of the lineage.
        data: likewise.
        is_pretrained: whether every generation starts from pretrained weights.
    """
    values = {**HOUSEKEEPING, **(FINE_TUNING if is_pretrained else FROM_SCRATCH)}
    values |= {"bf16": has_fast_bf16() and not args.fp16, **take_from_launcher(args.given, args)}
    values |= saving(args.given, args.load_best_model_at_end)
    values["use_cpu"] = not torch.accelerator.is_available()  # without it TrainingArguments refuses bf16 on a CPU
    if "per_device_train_batch_size" not in args.given:
        values["per_device_train_batch_size"] = share_of_batch(values["per_device_train_batch_size"])
    if "max_steps" in args.given and args.max_steps > 0:
        values.pop("num_train_epochs")
    if args.smoke:
        values = {name: value for name, value in values.items() if name != "num_train_epochs"}
        values |= {"max_steps": 10, "max_train_samples": 64, "max_eval_samples": 64}
    name = plain_name(f"{Path(model).name}-{Path(data).name}")
    values["name"] = with_control(name, args.control)
    values["output_dir"] = default_output_dir(with_control(args.name or name, args.control), args.budget)
    return values


def lineage_options(flags: LineageFlags) -> dict[str, Any]:
    """The arguments of `Lineage` that are flags of every script."""
    names = (
        "generations name teacher teacher_revision from_generation stop_when_worse keep_checkpoints save_minutes "
        "control report hub_namespace hub_name_pattern hub_license hub_defer hub_report"
    )
    return {name: getattr(flags, name) for name in names.split()} | {"stop_signals": flags.stop_signals or ()}


def run_classification(
    flags: ClassificationFlags,
    training: BornAgainTrainingArguments,
    build: Callable[[LabelledSplits], Lineage],
    *,
    files: Mapping[str, str | None],
    builder: str,
    name: str | None = None,
    config: str | None = None,
) -> int:
    """Reads the data, trains the lineage and prints its results.

    Args:
        flags: of the command.
        training: likewise.
        build: the lineage of the data.
        files: by split, in place of `name`; None for a split without.
        builder: of `datasets`, for the files.
        name: of the dataset, that of the flags when None.
        config: likewise.

    Returns:
        The exit status.
    """
    hub_settings(flags, training)  # validates before any work
    apply_budget(flags, training)
    set_threads(flags.threads)
    resume_lineage(flags, training)
    with training.main_process_first(desc="reading the data"):  # the others read its cache
        splits = read_labelled(
            name or flags.dataset_name,
            config or flags.dataset_config_name,
            flags.dataset_revision,
            files={split: path for split, path in files.items() if path},
            builder=builder,
            label_column=flags.label_column_name,
            validation_fraction=flags.train_val_split,
            max_train_samples=flags.max_train_samples,
            max_eval_samples=flags.max_eval_samples,
        )
    lineage = build(splits)
    split = "validation" if "validation" in splits.evaluation else next(iter(splits.evaluation))
    rows = len(lineage.eval_dataset[split])
    count, curves = take_curve(
        lineage.args,
        flags.given,
        flags.curve_samples,
        train_rows=len(lineage.train_dataset),
        rows=rows,
        what=f"rows of the {split} split",
    )
    if count:
        lineage.curve_dataset = lineage.eval_dataset[split].select(evenly_spaced(count, rows))
        if training.process_index == 0:
            print(curves)
    start = "from scratch" if lineage.starting_point is None else f"from pretrained {lineage.starting_point}"
    counts = " + ".join(f"{len(rows):,}" for rows in splits.splits().values())
    spec = lineage.runner.spec
    return train(
        lineage.runner,
        lineage.args,
        f"{spec.name}: {spec.model} {start} on {spec.dataset} ({counts} rows of {', '.join(splits.splits())}, "
        f"{len(splits.names)} classes)",
        tune_process=flags.tune_process,
    )
