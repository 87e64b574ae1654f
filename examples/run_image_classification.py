"""Trains a lineage of image classifiers: any vision model of timm or transformers, on any dataset or folder of images.

    accelerate launch examples/run_image_classification.py --dataset_name AI-Lab-Makerere/beans \
        --model_name_or_path google/vit-base-patch16-224-in21k                      # fine-tuned, every generation
    accelerate launch examples/run_image_classification.py --train_dir PHOTOS/train --model_name_or_path resnet18

The flags are those of transformers' run_image_classification.py, of BornAgainTrainingArguments and of a lineage. A
plain name of timm, without an owner, is an architecture and trained from scratch, as one of --config_name is. Images
are evaluated exactly as the model's own processor reads them. For training they are augmented as transformers' script
does, cropped at random to the processor's size and mirrored, and then normalised by the processor; or by timm's
training transforms. The same command resumes where it stopped.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from born_again import BornAgainTrainingArguments, Lineage, create_image_classifier
from born_again.any_model.scripts import (
    ClassificationFlags,
    classification_recipe,
    lineage_options,
    run_classification,
)
from born_again.data.decode import choose_image_column, to_rgb
from born_again.data.labelled import LabelledSplits, TransformedImages
from born_again.data.processor_images import image_transforms, set_image_size
from born_again.hub.launch import launch, run_for_each_seed
from born_again.lineage.arguments import parse_arguments, parse_mapping

IMAGE_SIZE = 224


@dataclass
class Arguments(ClassificationFlags):
    """Model and images; see BornAgainTrainingArguments for the training."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of pretrained weights that every generation starts from; or an architecture of "
            "timm such as resnet18, which is trained from scratch."
        },
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the image processor; the model's when not given."}
    )
    train_dir: str | None = field(default=None, metadata={"help": "Folder of training images, in CLASS/."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of validation images, in CLASS/."})
    test_dir: str | None = field(default=None, metadata={"help": "Folder of test images, in CLASS/."})
    image_column_name: str | None = field(default=None, metadata={"help": "Found by its type when not given."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images, in pixels; the model's own when not given, else 224."}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror training images at random."})
    mixup: float = field(default=0.0, metadata={"help": "Refused: see the message."})


def recipe(args: Namespace) -> dict[str, Any]:
    """Defaults that suit the given arguments, which take precedence over them."""
    model = args.model_name_or_path or args.config_name or "resnet18"
    data = args.dataset_name or args.train_dir or "images"
    is_pretrained = args.model_name_or_path is not None and not is_timm_name(model)
    values = classification_recipe(args, model, data, is_pretrained)
    return {**values, "remove_unused_columns": False, "dataloader_num_workers": 0 if values["use_cpu"] else 4}


def is_timm_name(name: str) -> bool:
    """Whether it is an architecture of timm, without weights."""
    return "/" not in name and timm.is_model(name)


def model_maker(flags: Arguments, names: tuple[str, ...]) -> tuple[Callable[[], nn.Module], Any]:
    """What makes the network of a generation, and its image processor."""
    given, options = flags.model_name_or_path, parse_mapping("model_args", flags.model_args)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if given is not None and is_timm_name(given):
        own = timm.get_pretrained_cfg(given)

        def make() -> nn.Module:
            return create_image_classifier(
                given,
                names,
                own.mean,
                own.std,
                image_size=flags.image_size or own.input_size[-1],
                interpolation=own.interpolation,
                crop_mode=own.crop_mode,
                crop_pct=own.crop_pct,
                **options,
            )

        return make, TimmWrapperImageProcessor(make().config.pretrained_cfg)
    source = given or flags.config_name
    if source is None:
        raise ValueError(
            "model_name_or_path: got none, expected a Hub id or folder of pretrained weights, or an architecture of "
            "timm such as resnet18; or give --config_name to train a configuration from scratch."
        )
    revision = {"revision": flags.model_revision}
    if flags.image_size is not None:
        options["image_size"] = flags.image_size
    config = AutoConfig.from_pretrained(source, num_labels=len(names), **revision, **labels, **options)
    if isinstance(config, TimmWrapperConfig):
        processor: Any = TimmWrapperImageProcessor(config.pretrained_cfg)
    else:
        processor = image_processor(flags, source, config)
    if given is None:
        return lambda: AutoModelForImageClassification.from_config(config, dtype=torch.float32), processor

    def load() -> nn.Module:
        return AutoModelForImageClassification.from_pretrained(
            given, config=config, ignore_mismatched_sizes=True, dtype="float32", **revision
        )

    return load, processor


def image_processor(flags: Arguments, source: str, config: Any) -> Any:
    """The model's own, or where a configuration alone has none that of ViT at the model's image size."""
    size = flags.image_size or getattr(config, "image_size", None) or IMAGE_SIZE
    try:
        processor = AutoImageProcessor.from_pretrained(
            flags.image_processor_name or source, revision=flags.model_revision
        )
    except OSError:
        if flags.image_processor_name or flags.model_name_or_path:
            raise
        processor = ViTImageProcessor(size={"height": size, "width": size})
    if flags.image_size is not None:
        set_image_size(processor, size)
    return processor


def build(flags: Arguments, training: BornAgainTrainingArguments, splits: LabelledSplits) -> Lineage:
    """The lineage of the flags."""
    column = choose_image_column(str(flags.dataset_name), splits.train.features, flags.image_column_name)
    make, processor = model_maker(flags, splits.names)
    at_random, for_evaluation = image_transforms(processor, flags.flip)
    images = {
        split: TransformedImages(
            rows, column, splits.labels[split], at_random if split == "train" else for_evaluation, to_rgb
        )
        for split, rows in splits.splits().items()
    }
    return Lineage(
        make,
        training,
        train_dataset=images.pop("train"),
        eval_dataset=images,
        processing_class=None if isinstance(processor, TimmWrapperImageProcessor) else processor,
        dataset=flags.dataset_name or flags.train_dir,
        pretrained=flags.pretrained or None,
        **lineage_options(flags),
    )


def main(flags: Arguments, training: BornAgainTrainingArguments) -> int:
    if flags.mixup:
        raise ValueError(
            f"mixup: got {flags.mixup}, expected 0: the labels of mixed images are soft, which the objectives do not "
            "read; a student has soft targets from its teacher anyway, and --label_smoothing_factor softens the "
            "labels of generation 0."
        )
    folders = {"train": flags.train_dir, "validation": flags.validation_dir, "test": flags.test_dir}
    return run_classification(
        flags, training, lambda splits: build(flags, training, splits), files=folders, builder="imagefolder"
    )


def start(command_line: list[str] | None = None) -> int:
    arguments = parse_arguments((Arguments, BornAgainTrainingArguments), recipe, command_line, description=__doc__)
    return run_for_each_seed(main, *arguments)


if __name__ == "__main__":
    launch(start)
