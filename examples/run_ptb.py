"""Trains a lineage of language models: a teacher, then students of its architecture, each taught by the one before.

    accelerate launch examples/run_ptb.py --dataset FOLDER_WITH_PTB_TXT
    accelerate launch examples/run_ptb.py --generations 1 --dataset grammar --smoke

The same command resumes where it stopped. Every training argument of transformers is a flag; without flags the recipe
suits the model (below). The loss is a mean over tokens: a learning rate for a loss summed over the 35 steps of a
window is multiplied by 35 here, and its gradient clipping divided by 35.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from born_again import BornAgainLMTrainer, BornAgainTrainingArguments, LineageRunner, LineageSpec
from born_again.data.placement import fits_on_gpu
from born_again.data.streams import TokenStreams, collate_windows
from born_again.data.text import TextData, load_text, vocabulary_of
from born_again.hub.launch import (
    LineageFlags,
    apply_budget,
    create_publisher,
    default_output_dir,
    generation_arguments,
    hub_settings,
    launch,
    load_external_teacher,
    resume_lineage,
    run_for_each_seed,
    saving,
    spec_fields,
    take_control,
    train,
    with_control,
)
from born_again.hub.model_card import ensemble_card, language_model_card
from born_again.lineage.arguments import parse_arguments, parse_mapping
from born_again.lineage.evaluation import evaluate_language_model
from born_again.lineage.machine import has_fast_bf16, set_threads
from born_again.lineage.reevaluation import evaluation_streams
from born_again.lineage.runner import Generation
from born_again.lineage.spec import plain_name
from born_again.models.language_models import (
    check_language_model,
    create_language_model,
    is_recurrent,
    load_language_model,
)
from born_again.report.figures import draw_curve
from born_again.report.page import write_report
from born_again.teacher import carries_state, positions, vocabulary_size
from born_again.teacher.tokenizers import check_same_tokenizer, has_tokenizer
from born_again.training.environment import number_of_processes, share_of_batch, take_from_launcher


@dataclass
class LineageArguments(LineageFlags):
    """Model and data of a lineage; see BornAgainTrainingArguments for the training."""

    generations: int = field(default=1, metadata={"help": "Students after the teacher."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "lstm-small (the default), lstm-medium, lstm-large, char-cnn-lstm, gpt2-small, or a Hub id or "
            "folder whose configuration is used."
        },
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Of the recurrent models; their own when not given."}
    )
    window: int | None = field(default=None, metadata={"help": "Steps unrolled: 35, and 256 for transformers."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "grammar (embedded), a folder with ptb.train.txt and so on, ptb (the default) or a Hub id."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Found by its type when not given."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many tokens."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many tokens."})
    text_on_gpu: bool = field(default=True, metadata={"help": "Keep the tokens in GPU memory, if they fit."})


# Two layers, embeddings tied to the softmax, in the way of Zaremba et al. 2014 (arXiv 1409.2329): learning rate 20
# quartered when the validation perplexity does not fall, gradients clipped at 0.25. The paper writes learning rate 1,
# which is 35 here if its loss is a sum over the window; it does not say how it clips.
LSTM = {
    "optim": "sgd",
    "learning_rate": 20.0,
    "lr_plateau_factor": 0.25,
    "max_grad_norm": 0.25,
    "num_train_epochs": 40.0,
    "per_device_train_batch_size": 20,
    "window": 35,
}
RECIPES: dict[str, dict[str, Any]] = {
    # Tuned on validation: within 18 epochs it goes on falling a little at learning rate 20, and more at 5.
    "lstm-small": {**LSTM, "num_train_epochs": 18.0, "lr_plateau_gain": 1.0},
    "lstm-medium": LSTM,
    "lstm-large": {**LSTM, "per_device_train_batch_size": 32},
    # The paper: learning rate 2, halved below a gain of 0.5, clipped at 5 (Kim et al. 2016), on a sum over 35 steps.
    "char-cnn-lstm": {
        **LSTM,
        "learning_rate": 70.0,
        "lr_plateau_factor": 0.5,
        "lr_plateau_gain": 0.5,
        "max_grad_norm": 5 / 35,
    },
}
# Not of the paper: a common recipe for small GPT-2 models.
TRANSFORMER = {
    "optim": "adamw_torch",
    "learning_rate": 3e-4,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "max_grad_norm": 1.0,
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 16,
    "window": 256,
}
SMOKE = {"model": "test-lstm", "dataset": "grammar", "num_train_epochs": 30.0, "threads": 1}
HOUSEKEEPING = {
    "objective": "ban+l",
    "teacher_precision": "inference",
    "loss_normalization": "step",
    "accelerator_config": {"split_batches": True},  # each process reads its own streams
    "eval_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,  # of the validation split; the test split is read once, at the end
    "metric_for_best_model": "perplexity",
    "greater_is_better": False,
    "logging_steps": 200,
    "report_to": "none",
    "remove_unused_columns": False,
    "ddp_timeout": 600,
}


def recipe(args: Namespace) -> dict[str, Any]:
    """Defaults that suit the given arguments, which take precedence over them."""
    values = {"model": "lstm-small", "dataset": "ptb", **(SMOKE if args.smoke else {})}
    model, dataset = args.model or values["model"], args.dataset or values["dataset"]
    own = RECIPES[model] if model in RECIPES else LSTM if is_recurrent(model) else TRANSFORMER
    values = {**own, **HOUSEKEEPING, **values, "bf16": has_fast_bf16() and not args.fp16}
    values |= take_from_launcher(args.given, args)
    takes_best = values["load_best_model_at_end"] and "load_best_model_at_end" not in args.given
    values |= saving(args.given, takes_best or args.load_best_model_at_end)
    values["use_cpu"] = not torch.accelerator.is_available()  # without it TrainingArguments refuses bf16 on a CPU
    if "per_device_train_batch_size" not in args.given:
        share_of_batch(values["per_device_train_batch_size"])
    # Number of validation streams, at most that of the training, and as many for each process.
    processes, streams = number_of_processes(), min(8, args.per_device_train_batch_size)
    values["per_device_eval_batch_size"] = max(streams - streams % processes, processes)
    if model in (*RECIPES, "gpt2-small", "test-lstm"):
        values["ddp_find_unused_parameters"] = False  # ours use all of theirs at every step
    if args.lr_milestones or args.lr_scheduler_type != "linear":
        values = {name: value for name, value in values.items() if not name.startswith("lr_plateau")}
    values["name"] = plain_name(f"{Path(model).name}-{Path(dataset).name}")
    values["output_dir"] = default_output_dir(with_control(args.name or values["name"], args.control), args.budget)
    values["name"] = with_control(values["name"], args.control)
    return values


def lineage_spec(lineage: LineageArguments, training: BornAgainTrainingArguments) -> LineageSpec:
    """The spec of the flags that affect the weights."""
    data_args = ("window", "dataset_revision", "text_column", "max_train_samples", "max_eval_samples")
    model_args = parse_mapping("model_args", lineage.model_args)
    if lineage.dropout is not None:
        model_args = {"dropout": lineage.dropout, **model_args}
    return LineageSpec(
        model=lineage.model,
        dataset=lineage.dataset,
        model_args=model_args,
        data_args={name: getattr(lineage, name) for name in data_args if getattr(lineage, name) is not None},
        **spec_fields(lineage, training),
    )


def build_runner(
    spec: LineageSpec, data: TextData, training: BornAgainTrainingArguments, lineage: LineageArguments
) -> LineageRunner:
    """The runner, with functions that build, evaluate and describe a generation."""
    words = vocabulary_of(data.tokenizer)
    window, eval_batch = lineage.window, training.per_device_eval_batch_size

    def streams(tokens: torch.Tensor, count: int, steps: int) -> TokenStreams:
        return TokenStreams(tokens, count, min(steps, len(tokens)), before=data.tokenizer.eos_token_id)

    # Before anything is written: model arguments may be invalid, or a text too short.
    with torch.device("meta"):
        carries = carries_state(create_language_model(spec.model, words, **spec.model_args))
    if not carries:
        data.tokenizer.model_max_length = (
            window  # of which nothing longer was ever read; it is saved beside the weights
        )
    train = streams(data.train, training.per_device_train_batch_size, window)
    validation = streams(data.validation, eval_batch, window)
    measured = evaluation_streams(data, carries, window, eval_batch)

    def build_student(generation: Generation) -> nn.Module:
        return create_language_model(spec.model, words, **spec.model_args)

    def build_trainer(student: nn.Module, teacher: nn.Module | None, generation: Generation) -> BornAgainLMTrainer:
        parent = Path(training.output_dir) / f"gen{generation.parent}"
        return BornAgainLMTrainer(
            student,
            generation_arguments(training, generation),
            teacher=teacher,
            data_collator=collate_windows,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=data.tokenizer,
            teacher_processing_class=None if teacher is None else AutoTokenizer.from_pretrained(parent),
        )

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        # A teacher trained elsewhere may carry a state where its students do not, or the reverse.
        own = carries_state(model)
        texts = measured if own == carries else evaluation_streams(data, own, window, eval_batch)
        return {split: evaluate_language_model(model, text, training.device) for split, text in texts.items()}

    def take_teacher() -> nn.Module:
        network = load_external_teacher(spec.teacher, lambda: load_language_model(spec.teacher, spec.teacher_revision))
        if Path(spec.teacher).is_dir() and not has_tokenizer(spec.teacher):  # transformers would create an empty one
            raise ValueError(
                f"teacher: {spec.teacher!r} has no tokenizer (tokenizer.json or tokenizer_config.json), expected the "
                "one it was trained with, which is compared with the text's; save it there with save_pretrained."
            )
        tokenizer = AutoTokenizer.from_pretrained(spec.teacher, revision=spec.teacher_revision)
        check_same_tokenizer(
            tokenizer,
            data.tokenizer,
            f"Where the teacher was trained on this text's words, save their tokenizer in {spec.teacher!r}.",
        )
        if (limit := positions(network)) is not None and limit < window:
            raise ValueError(
                f"teacher: {spec.teacher!r} was made for texts of {limit} tokens, and the window is {window}; "
                f"expected no more, since it reads what its students read: give --window {limit}, or another teacher."
            )
        if (vocabulary_size(network) or 0) > len(data.tokenizer):
            network.resize_token_embeddings(len(data.tokenizer))  # without padding tokens
        return network

    return LineageRunner(
        spec,
        training.output_dir,
        build_student=build_student,
        build_trainer=build_trainer,
        load_teacher=load_language_model,
        evaluate=evaluate,
        write_card=language_model_card,
        draw_curve=draw_curve,
        write_report=write_report if lineage.report else None,
        write_ensemble_card=ensemble_card,
        data={**data.fingerprint, "coverage": data.coverage},
        keep_checkpoints=lineage.keep_checkpoints,
        save_minutes=lineage.save_minutes,
        take_teacher=None if spec.teacher is None else take_teacher,
        from_generation=lineage.from_generation,
        stop_when_worse=lineage.stop_when_worse,
        stop_signals=lineage.stop_signals or (),
        publisher=create_publisher(lineage, training),
    )


def describe_coverage(data: TextData) -> str:
    """The shares of unknown and untrained tokens, for the first line of a run."""
    shares = {
        what: " + ".join(f"{100 * own[kind]:.2f}" for own in data.coverage.values())
        for kind, what in (("unknown", "unknown"), ("untrained", "known but not in what is trained on"))
        if any(own[kind] for own in data.coverage.values())
    }
    return "".join(f"; {what} {share} % of tokens" for what, share in shares.items()) or "; none unknown"


def main(lineage: LineageArguments, training: BornAgainTrainingArguments) -> int:
    hub_settings(lineage, training)  # validates before any work
    apply_budget(lineage, training)
    set_threads(lineage.threads)
    disable_progress_bar()  # of weights that load in milliseconds; training keeps its own
    check_language_model(lineage.model, lineage.window)
    resume_lineage(lineage, training)
    take_control(lineage, training)
    spec = lineage_spec(lineage, training)
    data = load_text(
        lineage.dataset,
        text_column=lineage.text_column,
        revision=lineage.dataset_revision,
        max_train_samples=lineage.max_train_samples,
        max_eval_samples=lineage.max_eval_samples,
    )
    if lineage.text_on_gpu and fits_on_gpu(data, training.device, training.dataloader_num_workers):
        data = data.to(training.device)
        training.dataloader_pin_memory = False  # only for tensors in main memory
    runner = build_runner(spec, data, training, lineage)
    with torch.device("meta"):
        network = create_language_model(spec.model, vocabulary_of(data.tokenizer), **spec.model_args)
    status = train(
        runner,
        training,
        f"{spec.name}: {spec.model} on {lineage.dataset} ({len(data.train):,} + {len(data.validation):,} + "
        f"{len(data.test):,} tokens, {len(data.tokenizer):,} words{describe_coverage(data)})",
        network,
        tune_process=lineage.tune_process,
    )
    if training.process_index == 0 and data.entropy_per_word is not None:
        print(
            f"Floor: the {lineage.dataset} has {data.entropy_per_word:.4f} nats per word, perplexity "
            f"{math.exp(data.entropy_per_word):.2f}; no model can be below it, except by chance on a short test."
        )
    return status


def start(command_line: list[str] | None = None) -> int:
    arguments = parse_arguments(
        (LineageArguments, BornAgainTrainingArguments), recipe, command_line, description=__doc__
    )
    return run_for_each_seed(main, *arguments)


if __name__ == "__main__":
    launch(start)
