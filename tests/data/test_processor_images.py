"""Pixels of an image processor of transformers, for evaluation and for training."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from born_again.data.processor_images import image_transforms, set_image_size

SQUARE = {"size": {"height": 24, "width": 24}}
SHORTEST = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}}
PROCESSORS = {
    "ViT": SQUARE,
    "DeiT": {"size": {"height": 28, "width": 28}, "crop_size": {"height": 24, "width": 24}},
    "Beit": SQUARE,
    "ConvNext": {"size": {"shortest_edge": 24}},
    "MobileViT": SHORTEST,
    "MobileNetV2": SHORTEST,
    "EfficientNet": SQUARE,
    "CLIP": SHORTEST,
    "Bit": SHORTEST,
    "Levit": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
    "Pvt": SQUARE,
}


def photo():
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((50, 37), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_evaluated_as_the_processor_does_and_trained_on_its_scale(kind):
    processor = getattr(transformers, f"{kind}ImageProcessor")(**PROCESSORS[kind])
    training, evaluation = image_transforms(processor, flip=True)
    own = processor(photo(), return_tensors="pt")["pixel_values"][0]
    assert evaluation(photo()).equal(torch.as_tensor(np.asarray(own))) and evaluation(photo()).shape == (3, 24, 24)
    # Of one colour a crop is the whole, so that both must be the same: channels in order, rescaled and normalised.
    plain = Image.new("RGB", (50, 37), (200, 100, 30))
    torch.testing.assert_close(training(plain), evaluation(plain), rtol=0, atol=1e-6)
    torch.manual_seed(0)
    assert not training(photo()).equal(training(photo()))
    assert repr(evaluation) == repr(image_transforms(processor, flip=True)[1])  # the data's fingerprint hangs on it


@pytest.mark.parametrize("kind", PROCESSORS)
def test_another_size(kind):
    processor = getattr(transformers, f"{kind}ImageProcessor")(**PROCESSORS[kind])
    before = repr(image_transforms(processor, flip=False)[1])
    set_image_size(processor, 48)
    training, evaluation = image_transforms(processor, flip=False)
    assert training(photo()).shape == evaluation(photo()).shape == (3, 48, 48)
    assert repr(evaluation) != before


def test_a_processor_without_a_fixed_size_is_refused():
    with pytest.raises(ValueError, match="image_processor_name: ViTImageProcessor makes pixel values of the shapes"):
        image_transforms(transformers.ViTImageProcessor(do_resize=False), flip=False)
