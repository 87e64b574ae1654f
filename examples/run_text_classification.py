"""Trains a lineage of text classifiers: any encoder of transformers, on GLUE, any Hub dataset, or CSV and JSON files.

    accelerate launch examples/run_text_classification.py --model_name_or_path distilbert-base-uncased --task_name sst2
    accelerate launch examples/run_text_classification.py --config_name prajjwal1/bert-tiny --train_file train.csv \
        --validation_file valid.csv                                                   # from scratch

The flags are those of transformers' run_glue.py and run_classification.py, of BornAgainTrainingArguments and of a
lineage. With --model_name_or_path every generation starts from the same pretrained weights, with a new classifier;
with --config_name it is trained from scratch. The same command resumes where it stopped.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from born_again import BornAgainTrainingArguments, Lineage
from born_again.any_model.scripts import (
    ClassificationFlags,
    classification_recipe,
    lineage_options,
    run_classification,
)
from born_again.data.labelled import LabelledSplits
from born_again.hub.launch import launch, run_for_each_seed
from born_again.lineage.arguments import parse_arguments, parse_mapping

GLUE = "nyu-mll/glue"
SENTENCES = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class Arguments(ClassificationFlags):
    """Model and texts; see BornAgainTrainingArguments for the training."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the tokenizer; the model's when not given."}
    )
    task_name: str | None = field(default=None, metadata={"help": f"Of GLUE: {', '.join(SENTENCES)}."})
    train_file: str | None = field(default=None, metadata={"help": "CSV or JSON file of training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "CSV or JSON file of validation rows."})
    test_file: str | None = field(default=None, metadata={"help": "CSV or JSON file of test rows."})
    text_column_names: str | None = field(
        default=None, metadata={"help": "One column, or two of a pair with a comma; found by its type when not given."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens that a text is cut to."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to that length, instead of by the batch."})


def recipe(args: Namespace) -> dict[str, Any]:
    """Defaults that suit the given arguments, which take precedence over them."""
    model = args.model_name_or_path or args.config_name or "model"
    data = args.task_name or args.dataset_name or (Path(args.train_file).stem if args.train_file else "texts")
    return classification_recipe(args, model, data, args.model_name_or_path is not None)


def text_columns(flags: Arguments, splits: LabelledSplits) -> tuple[str, ...]:
    """The one or two columns of text.

    Raises:
        ValueError: none, or so many that they cannot be told.
    """
    known = splits.train.column_names
    if flags.text_column_names is not None:
        chosen = tuple(name.strip() for name in flags.text_column_names.split(","))
        if len(chosen) > 2 or not set(chosen) <= set(known):
            raise ValueError(
                f"text_column_names: got {flags.text_column_names!r}, expected one or two of {', '.join(known)}."
            )
        return chosen
    if flags.task_name is not None:
        return SENTENCES[flags.task_name]
    texts = [
        name
        for name, feature in splits.train.features.items()
        if isinstance(feature, datasets.Value)
        and feature.dtype in ("string", "large_string")
        and name not in ("label", "labels", "idx", "id", flags.label_column_name)
    ]
    if not 1 <= len(texts) <= 2:
        raise ValueError(
            f"text_column_names: got none, and the columns of text are {', '.join(texts) or 'none'}, expected one or "
            "two; name them, as in --text_column_names premise,hypothesis."
        )
    return tuple(texts)


def model_maker(flags: Arguments, names: tuple[str, ...]) -> Callable[[], nn.Module]:
    """What makes the network of a generation."""
    source = model_source(flags)
    config = AutoConfig.from_pretrained(
        source,
        revision=flags.model_revision,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **parse_mapping("model_args", flags.model_args),
    )
    if flags.model_name_or_path is None:
        return lambda: AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return lambda: AutoModelForSequenceClassification.from_pretrained(
        source, config=config, revision=flags.model_revision, ignore_mismatched_sizes=True, dtype="float32"
    )


def model_source(flags: Arguments) -> str:
    source = flags.model_name_or_path or flags.config_name
    if source is None:
        raise ValueError(
            "model_name_or_path: got none, expected a Hub id or folder of pretrained weights; or give --config_name "
            "to train a configuration from scratch."
        )
    return source


def build(flags: Arguments, training: BornAgainTrainingArguments, splits: LabelledSplits) -> Lineage:
    """The lineage of the flags."""
    tokenizer = AutoTokenizer.from_pretrained(
        flags.tokenizer_name or model_source(flags), revision=flags.model_revision
    )
    columns, length = text_columns(flags, splits), min(flags.max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if flags.pad_to_max_length else False

    def tokenized(rows: dict[str, list[str]]) -> Any:
        return tokenizer(*(rows[name] for name in columns), truncation=True, max_length=length, padding=padding)

    texts, classes = {}, datasets.ClassLabel(names=list(splits.names))
    with training.main_process_first(desc="tokenizing"):  # the others read its cache
        for split, rows in splits.splits().items():
            kept = rows.map(tokenized, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")
            texts[split] = kept.add_column("labels", splits.labels[split].tolist()).cast_column("labels", classes)
    return Lineage(
        model_maker(flags, splits.names),
        training,
        train_dataset=texts.pop("train"),
        eval_dataset=texts,
        processing_class=tokenizer,
        dataset=GLUE if flags.task_name else flags.dataset_name or flags.train_file,
        pretrained=flags.pretrained or None,
        **lineage_options(flags),
    )


def main(flags: Arguments, training: BornAgainTrainingArguments) -> int:
    files = {"train": flags.train_file, "validation": flags.validation_file, "test": flags.test_file}
    model_source(flags)
    if flags.task_name is not None and flags.task_name not in SENTENCES:
        raise ValueError(
            f"task_name: got {flags.task_name!r}, expected one of {', '.join(SENTENCES)} (stsb is a regression, which "
            "has no classes to teach)."
        )

    first = next(filter(None, files.values()), "")
    return run_classification(
        flags,
        training,
        lambda splits: build(flags, training, splits),
        files=files,
        builder="json" if Path(first).suffix in (".json", ".jsonl") else "csv",
        name=GLUE if flags.task_name else None,
        config=flags.task_name,
    )


def start(command_line: list[str] | None = None) -> int:
    arguments = parse_arguments((Arguments, BornAgainTrainingArguments), recipe, command_line, description=__doc__)
    return run_for_each_seed(main, *arguments)


if __name__ == "__main__":
    launch(start)
