"""Trains a lineage of image classifiers: a teacher, then students of its architecture, each taught by the one before.

    accelerate launch examples/run_cifar.py --generations 3
    accelerate launch examples/run_cifar.py --generations 3 --dataset digits

The same command resumes where it stopped. Every training argument of transformers is a flag; without flags the recipe
is the paper's (digits and --smoke have small ones).
"""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from born_again import (
    BornAgainTrainer,
    BornAgainTrainingArguments,
    LineageRunner,
    LineageSpec,
    create_image_classifier,
)
from born_again.data.augment import usual_padding
from born_again.data.decode import EMBEDDED, warn
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import ImageData, ImageSplit, allows_flip, flip_warning, load_images
from born_again.data.placement import fits_on_gpu
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
from born_again.hub.model_card import ensemble_card, image_classifier_card
from born_again.lineage.arguments import parse_arguments, parse_mapping
from born_again.lineage.curve import evenly_spaced, take_curve
from born_again.lineage.evaluation import evaluate_classifier
from born_again.lineage.machine import has_fast_bf16, set_threads
from born_again.lineage.reevaluation import evaluation_images
from born_again.lineage.runner import Generation
from born_again.lineage.spec import plain_name
from born_again.metrics import classification_metrics
from born_again.models.image_classifier import (
    check_image_size,
    check_model_args,
    load_image_classifier,
    save_image_classifier,
    takes_model_arg,
)
from born_again.models.shared_ends import check_shared_ends, share_ends
from born_again.report.figures import draw_curve
from born_again.report.page import write_report
from born_again.teacher.preprocessing import check_image_shape, read_otherwise
from born_again.training.environment import share_of_batch, take_from_launcher

IMAGE_SIZE = 32


@dataclass
class LineageArguments(LineageFlags):
    """Model and data of a lineage; see BornAgainTrainingArguments for the training."""

    model: str | None = field(default=None, metadata={"help": "A timm architecture; densenet90_60_cifar for cifar."})
    dropout: float = field(
        default=0.0,
        metadata={
            "help": "proj_drop_rate of the model, and of a student_model that has one; 0.3 for wide_resnet28_*, as in "
            "the paper."
        },
    )
    student_model: str | None = field(
        default=None, metadata={"help": "Architecture of the students; that of the teacher when not given."}
    )
    student_model_args: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the students' architecture, as model_args."}
    )
    share_teacher_ends: bool = field(
        default=False,
        metadata={"help": "Students have their teacher's first convolution and classifier, frozen."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "digits (embedded), cifar10, cifar100 (the default), a Hub id or a folder."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    image_column: str | None = field(default=None, metadata={"help": "Found by its type when not given."})
    label_column: str | None = field(default=None, metadata={"help": "Found by its type when not given."})
    image_size: int = field(default=IMAGE_SIZE, metadata={"help": "Side that images are resized to, in pixels."})
    flip: bool = field(
        default=True, metadata={"help": "Mirror images at random; False where the name says digits or letters."}
    )
    crop: bool = field(default=True, metadata={"help": "Crop images at random from themselves, padded by an eighth."})
    test_samples: int | None = field(
        default=None, metadata={"help": "Number of test images of the 1,797 digits; 1,197 when not given."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many images."})
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training images that is held out as a validation split, and reported as one; the "
            "same images for every seed."
        },
    )
    curve_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate so many images of the validation split, without one of the test split, a few times a "
            "training, for curves; nothing is selected by them. 0 for none; when not given as many as cost about a "
            "hundredth of its time."
        },
    )
    images_on_gpu: bool = field(default=True, metadata={"help": "Keep the images in GPU memory, if they fit."})


# Zagoruyko and Komodakis 2016 (arXiv 1605.07146), as the paper uses it: batch 128, 200 epochs.
PAPER = {
    "optim": "sgd",
    "optim_args": "momentum=0.9,nesterov=True",
    "learning_rate": 0.1,
    "lr_milestones": [0.3, 0.6, 0.8],
    "lr_gamma": 0.2,
    "weight_decay": 5e-4,
    "decay_all_parameters": True,
    "max_grad_norm": 0.0,
    "num_train_epochs": 200.0,
    "per_device_train_batch_size": 128,
}
CIFAR = {"model": "densenet90_60_cifar", "dataset": "cifar100"}
# So few images to train on and so many to test on that half a point of accuracy is six images.
DIGITS = {
    "model": "wide_resnet16_1_cifar",
    "image_size": 16,
    "test_samples": 1197,
    "num_train_epochs": 40.0,
    "per_device_train_batch_size": 32,
}
SMOKE = {
    "model": "test_wide_resnet_cifar",
    "dataset": "digits",
    "num_train_epochs": 2.0,
    "max_train_samples": 512,
    "max_eval_samples": 256,
}
HOUSEKEEPING = {
    "channels_last": True,
    "teacher_precision": "inference",
    "loss_normalization": "step",
    "per_device_eval_batch_size": 256,
    "batch_eval_metrics": True,
    "save_total_limit": 2,
    "logging_steps": 50,
    "report_to": "none",
    "remove_unused_columns": False,
    "ddp_timeout": 600,
}


def recipe(args: Namespace) -> dict[str, Any]:
    """Defaults that suit the given arguments, which take precedence over them."""
    values = {**PAPER, **HOUSEKEEPING, "bf16": has_fast_bf16() and not args.fp16}
    values |= take_from_launcher(args.given, args)
    values |= saving(args.given, args.load_best_model_at_end)
    values["use_cpu"] = not torch.accelerator.is_available()  # without it TrainingArguments refuses bf16 on a CPU
    if args.smoke:
        values |= SMOKE
    elif args.dataset == "digits":
        values |= DIGITS
    else:
        values |= CIFAR
    if "per_device_train_batch_size" not in args.given:
        values["per_device_train_batch_size"] = share_of_batch(values["per_device_train_batch_size"])
    model, dataset = args.model or values["model"], args.dataset or values["dataset"]
    if all(name.endswith("_cifar") for name in (model, args.student_model or model)):
        values["ddp_find_unused_parameters"] = False  # ours use all of theirs at every step
    values["flip"] = allows_flip(dataset)
    values["dropout"] = usual_dropout(model)
    families = dict.fromkeys(family(one) for one in (model, args.student_model or model))
    name = plain_name(f"{'-'.join(families)}-{Path(dataset).name}")
    values["name"] = with_control(name, args.control)
    values["output_dir"] = default_output_dir(with_control(args.name or name, args.control), args.budget)
    return values


def usual_dropout(model: str) -> float:
    return 0.3 if model.startswith("wide_resnet28_") else 0.0


def family(model: str) -> str:
    """densenet90_60_cifar -> densenet, wide_resnet28_10_cifar -> wide-resnet."""
    return re.split(r"\d|_cifar", model)[0].strip("_").replace("_", "-")


def lineage_spec(lineage: LineageArguments, training: BornAgainTrainingArguments) -> LineageSpec:
    """The spec of the flags that affect the weights."""
    names = ("dataset_revision", "image_column", "label_column", "test_samples", "max_train_samples")
    names += ("max_eval_samples", "validation_fraction")
    data_args = {name: getattr(lineage, name) for name in names if getattr(lineage, name) is not None}
    # Earlier lineages do not have these fields: all datasets but digits were mirrored.
    if lineage.image_size != IMAGE_SIZE:
        data_args["image_size"] = lineage.image_size
    if lineage.flip != (lineage.dataset != EMBEDDED):
        data_args["flip"] = lineage.flip
    if not lineage.crop:
        data_args["crop"] = False
    model_args = parse_mapping("model_args", lineage.model_args)
    if lineage.dropout:
        model_args = {"proj_drop_rate": lineage.dropout, **model_args}
    architectures = {"model": lineage.model, "model_args": model_args, **student_architecture(lineage, model_args)}
    if lineage.control is not None:  # compared with the students, so of their architecture
        own = [architectures.pop(name, None) for name in ("student_model", "student_model_args")]
        architectures |= {} if own[0] is None else {"model": own[0], "model_args": own[1]}
    return LineageSpec(
        dataset=lineage.dataset,
        data_args=data_args,
        **spec_fields(lineage, training),
        share_teacher_ends=lineage.share_teacher_ends,
        **architectures,
    )


def student_architecture(lineage: LineageArguments, model_args: dict[str, Any]) -> dict[str, Any]:
    """The fields of the spec for the students' architecture, none where it is the teacher's."""
    given = parse_mapping("student_model_args", lineage.student_model_args)
    if lineage.student_model is None:
        name, args = lineage.model, {**model_args, **given}
    else:
        name, dropout = lineage.student_model, usual_dropout(lineage.student_model)
        check_model_args(name, given, "student_model_args")
        if "dropout" in lineage.given and takes_model_arg(name, "proj_drop_rate"):
            dropout = lineage.dropout
        args = {**({"proj_drop_rate": dropout} if dropout else {}), **given}
    return {} if (name, args) == (lineage.model, model_args) else {"student_model": name, "student_model_args": args}


def check_architectures(spec: LineageSpec, image_size: int) -> None:
    """Validates the networks of teacher and students before any data is read."""
    check_model_args(spec.model, spec.model_args)
    check_image_size(spec.model, image_size, **spec.model_args)
    if spec.student_model is not None:
        check_model_args(spec.student_model, spec.student_model_args, "student_model_args")
        check_image_size(spec.student_model, image_size, **spec.student_model_args)
    if spec.share_teacher_ends and spec.teacher is None:  # else take_teacher checks it
        with torch.device("meta"):
            teacher, student = (timm.create_model(spec.model_of(k), **spec.model_args_of(k)) for k in (0, 1))
        check_shared_ends(student, teacher)


def padding(lineage: LineageArguments) -> int:
    """Of the random crops, in pixels."""
    return usual_padding(lineage.image_size) if lineage.crop else 0


def describe_input(lineage: LineageArguments, training: BornAgainTrainingArguments) -> str:
    """Augmentation and length of the training, for the first lines of a run."""
    size = lineage.image_size
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    length = f"{training.num_train_epochs:g} epochs" if training.max_steps < 0 else f"{training.max_steps:,} steps"
    mirrored = (
        "mirrored at random (--no_flip turns this off)" if lineage.flip else "not mirrored (--flip turns this on)"
    )
    cropped = (
        f"cropped at random from {padding(lineage)} pixels of padding" if lineage.crop else "not cropped (--crop)"
    )
    return f"Images are {size} x {size}, {cropped}, {mirrored}; {length} in batches of {batch}"


def curve_split(
    data: ImageData, lineage: LineageArguments, training: BornAgainTrainingArguments
) -> tuple[ImageSplit, str]:
    """The images that are evaluated during a training, and what the first lines of a run say of them."""
    name, whole = ("test", data.test) if data.validation is None else ("validation", data.validation)
    rows, said = take_curve(
        training,
        lineage.given,
        lineage.curve_samples,
        train_rows=len(data.train),
        rows=len(whole),
        what=f"images of the {name} split",
    )
    return whole.select(evenly_spaced(rows, len(whole))) if rows else whole, said


def build_runner(
    spec: LineageSpec,
    data: ImageData,
    training: BornAgainTrainingArguments,
    lineage: LineageArguments,
    during_training: ImageSplit | None = None,
) -> LineageRunner:
    """The runner, with functions that build, save, evaluate and describe a generation."""
    splits = {"test": data.test} if data.validation is None else {"validation": data.validation, "test": data.test}
    # With a validation split the test split is read once, at the end.
    during = evaluation_images(during_training or next(iter(splits.values())), data.mean, data.std)

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        # A network trained elsewhere may have another mean and std, as its config says.
        own = model.config.pretrained_cfg or {}
        statistics = own.get("mean") or data.mean, own.get("std") or data.std
        batch, device = training.per_device_eval_batch_size, training.device
        return {
            name: evaluate_classifier(model, evaluation_images(split, *statistics), collate_batch, batch, device)
            for name, split in splits.items()
        }

    def build(index: int) -> nn.Module:
        return create_image_classifier(
            spec.model_of(index),
            data.label_names,
            data.mean,
            data.std,
            image_size=data.image_size,
            interpolation=data.interpolation,
            **spec.model_args_of(index),
        )

    def build_student(generation: Generation) -> nn.Module:
        student = build(generation.index)
        if spec.share_teacher_ends and generation.parent is not None:
            share_ends(student, load_image_classifier(Path(training.output_dir) / f"gen{generation.parent}"))
        return student

    def build_trainer(student: nn.Module, teacher: nn.Module | None, generation: Generation) -> BornAgainTrainer:
        return BornAgainTrainer(
            student,
            generation_arguments(training, generation),
            teacher=teacher,
            data_collator=collate_batch,
            train_dataset=ImageDataset(
                data.train,
                data.mean,
                data.std,
                augment=True,
                flip=lineage.flip,
                seed=generation.seed,
                padding=padding(lineage),
            ),
            eval_dataset=during,
            compute_metrics=classification_metrics(),
            callbacks=[EpochCallback()],
        )

    def take_teacher() -> nn.Module:
        teacher = load_external_teacher(
            spec.teacher, lambda: load_image_classifier(spec.teacher, spec.teacher_revision)
        )
        height, width, channels = data.test.pixels.shape[1:]
        check_image_shape(teacher, channels, (height, width))
        if spec.share_teacher_ends:
            check_shared_ends(build(1), teacher)
        if (difference := read_otherwise(teacher.config.pretrained_cfg, data.interpolation)) is not None:
            warn(
                f"teacher: {spec.teacher} says that it was trained on images with {difference}; here images of a size "
                f"other than {height} x {width} are squashed by {data.interpolation}, and it is evaluated and teaches "
                "on these. Resize them as it did before loading them, or correct pretrained_cfg in its config.json if "
                "it is wrong."
            )
        return teacher

    def report(folder: Path) -> None:
        write_report(folder, lambda items: data.test.pixels[items].cpu().numpy())

    return LineageRunner(
        spec,
        training.output_dir,
        build_student=build_student,
        build_trainer=build_trainer,
        load_teacher=load_image_classifier,
        evaluate=evaluate,
        save_student=save_image_classifier,
        write_card=image_classifier_card,
        draw_curve=draw_curve,
        write_report=report if lineage.report else None,
        write_ensemble_card=ensemble_card,
        data=data.fingerprint,
        keep_checkpoints=lineage.keep_checkpoints,
        save_minutes=lineage.save_minutes,
        take_teacher=None if spec.teacher is None else take_teacher,
        from_generation=lineage.from_generation,
        stop_when_worse=lineage.stop_when_worse,
        stop_signals=lineage.stop_signals or (),
        publisher=create_publisher(lineage, training),
    )


def main(lineage: LineageArguments, training: BornAgainTrainingArguments) -> int:
    hub_settings(lineage, training)  # validates before any work
    apply_budget(lineage, training)
    set_threads(lineage.threads)
    disable_progress_bar()  # of weights that load in milliseconds; training keeps its own
    begun = resume_lineage(lineage, training)
    if begun is not None:  # defaults that depend on the dataset, or on the version it was begun with
        chosen = {"flip": begun.dataset != EMBEDDED, "crop": True, "image_size": IMAGE_SIZE, "test_samples": None}
        for name, default in chosen.items():
            if name not in lineage.given:
                setattr(lineage, name, begun.data_args.get(name, default))
    take_control(lineage, training)
    spec = lineage_spec(lineage, training)
    check_architectures(spec, lineage.image_size)
    data = load_images(
        lineage.dataset,
        image_column=lineage.image_column,
        label_column=lineage.label_column,
        revision=lineage.dataset_revision,
        image_size=lineage.image_size,
        test_samples=lineage.test_samples,
        max_train_samples=lineage.max_train_samples,
        max_eval_samples=lineage.max_eval_samples,
        validation_fraction=lineage.validation_fraction,
    )
    if training.process_index == 0:
        print(describe_input(lineage, training))
    part, curves = curve_split(data, lineage, training)
    if curves and training.process_index == 0:
        print(curves)
    if lineage.flip and (doubt := flip_warning(data.label_names)):
        warn(f"--flip: images are mirrored at random, and {doubt}; --no_flip turns this off")
    if lineage.images_on_gpu and fits_on_gpu(data, training.device, training.dataloader_num_workers):
        data, part = data.to(training.device), part.to(training.device)
        training.dataloader_pin_memory = False  # only for tensors in main memory
    students = "" if spec.student_model is None else f", students {describe_architecture(spec, 1)},"
    return train(
        build_runner(spec, data, training, lineage, part),
        training,
        f"{spec.name}: {describe_architecture(spec, 0)}{students} on {lineage.dataset} "
        f"({' + '.join(f'{count:,}' for count in data.fingerprint['rows'].values())} images, "
        f"{len(data.label_names)} classes)",
        tune_process=lineage.tune_process,
    )


def describe_architecture(spec: LineageSpec, generation: int) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in spec.model_args_of(generation).items())
    return spec.model_of(generation) + (f" ({arguments})" if arguments else "")


def start(command_line: list[str] | None = None) -> int:
    arguments = parse_arguments(
        (LineageArguments, BornAgainTrainingArguments), recipe, command_line, description=__doc__
    )
    return run_for_each_seed(main, *arguments)


if __name__ == "__main__":
    launch(start)
