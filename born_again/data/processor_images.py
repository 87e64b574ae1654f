"""Images by the processor of a vision model: exactly as it reads them, and augmented at random for training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from transformers import TimmWrapperImageProcessor

_PILLOW = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
    4: InterpolationMode.BOX,
    5: InterpolationMode.HAMMING,
}
_GEOMETRY = ("do_resize", "do_center_crop")  # what a random crop replaces


class ProcessedImage:
    """From a Pillow image to the pixel values that an image processor makes of it.

    Args:
        processor: of transformers.
        augment: from a Pillow image to one of the processor's output size, in place of its own resizing and cropping;
            None reads images as the processor does.

    Example:
        >>> from transformers import ViTImageProcessor
        >>> ProcessedImage(ViTImageProcessor(size={"height": 8, "width": 8}))(Image.new("RGB", (10, 12))).shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, processor: Any, augment: Any = None) -> None:
        self.processor, self.augment = processor, augment
        is_replaced = {} if augment is None else {name: False for name in _GEOMETRY if getattr(processor, name, None)}
        self._options = is_replaced

    def __call__(self, image: Image.Image) -> Tensor:
        """Float pixel values (channels, height, width)."""
        if self.augment is not None:
            image = self.augment(image)
        found = self.processor(image, return_tensors="pt", **self._options)["pixel_values"][0]
        return torch.as_tensor(np.asarray(found))

    def __repr__(self) -> str:
        settings = {
            name: value
            for name, value in sorted(self.processor.to_dict().items())
            if not name.startswith("_") and name not in ("image_processor_type", "processor_class", "data_format")
        }
        return f"{type(self).__name__}({settings}, {self.augment!r})"


def image_transforms(processor: Any, flip: bool) -> tuple[Any, Any]:
    """From an RGB image to pixel values: for training, at random, and for evaluation, exactly as the processor does.

    For training an image is cropped at random and resized to the processor's output size, with its interpolation,
    mirrored, and then rescaled, normalised and so on by the processor. Networks of timm have its own transforms.

    Args:
        processor: of the model, of transformers.
        flip: whether training images are mirrored at random.

    Returns:
        Two callables from a Pillow image to float pixel values (channels, height, width).

    Raises:
        ValueError: the processor makes something else of an image than one picture of a fixed size.
    """
    if isinstance(processor, TimmWrapperImageProcessor):
        if flip:
            return processor.train_transforms, processor.val_transforms
        own = create_transform(**processor.data_config, is_training=True, hflip=0.0)
        return own, processor.val_transforms
    evaluation = ProcessedImage(processor)
    shapes = {tuple(evaluation(Image.new("RGB", size)).shape) for size in ((300, 400), (450, 320))}
    height, width = next(iter(shapes))[-2:]
    resample = getattr(processor, "resample", None)
    interpolation = (
        _PILLOW[2 if resample is None else int(resample)] if not isinstance(resample, InterpolationMode) else resample
    )
    mirrored = [v2.RandomHorizontalFlip()] if flip else []
    training = ProcessedImage(
        processor, v2.Compose([v2.RandomResizedCrop((height, width), interpolation=interpolation), *mirrored])
    )
    shapes.add(tuple(training(Image.new("RGB", (300, 400))).shape))
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise ValueError(
            f"image_processor_name: {type(processor).__name__} makes pixel values of the shapes "
            f"{', '.join(map(str, sorted(shapes)))} of images of several sizes, expected one shape (channels, height, "
            "width) for all; give another processor, or one with a fixed size."
        )
    return training, evaluation


def set_image_size(processor: Any, size: int) -> None:
    """Has a processor make square pictures of a size, cropped from as much of an image as before.

    Args:
        processor: of transformers; its size and crop_size change.
        size: side, in pixels.
    """
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    before = dict(processor.size)
    if "shortest_edge" in before:
        share = before["shortest_edge"] / dict(crop).get("height", before["shortest_edge"]) if crop else 1.0
        processor.size = type(processor.size)(shortest_edge=round(size * share))
    else:
        processor.size = type(processor.size)(height=size, width=size)
    if crop is not None:
        processor.crop_size = type(crop)(height=size, width=size)
