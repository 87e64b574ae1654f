"""What a folder says of its input is what was done in training, whoever reads it: timm, transformers, born-again."""

import json

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from born_again.data.decode import to_rgb
from born_again.data.image_dataset import ImageDataset
from born_again.data.images import load_images
from born_again.lineage.reevaluation import evaluation_images
from born_again.models.image_classifier import (
    check_image_size,
    create_image_classifier,
    load_image_classifier,
    save_image_classifier,
)
from born_again.models.remote_code import remote_code

LABELS = ["cat", "dog"]
SIZES = [(32, 32), (96, 48), (48, 96), (20, 20), (7, 50), (33, 31), (200, 200)]  # width, height
KINDS = ["RGB", "L", "P", "CMYK", "turned", "transparent", "16 bits"]
# What transformers' pipelines read otherwise, which the data says when it is read.
NOT_BY_PIPELINES = ["transparent", "16 bits"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_image(kind: str, size: tuple[int, int], seed: int) -> tuple[Image.Image, dict]:
    """An image and how it is saved."""
    width, height = size
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return image, {"exif": exif}
    if kind == "transparent":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        return image, {}
    if kind == "16 bits":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16)), {}
    return image.convert(kind), {}


def write_images(folder, kind: str, size: tuple[int, int]) -> list[str]:
    """Four images of each split; the paths of the test images in the order of the rows."""
    suffix = "tif" if kind == "CMYK" else "png"
    for seed, (split, label, number) in enumerate(
        (split, label, number) for split in ("train", "test") for label in LABELS for number in range(2)
    ):
        path = folder / split / label / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, options = make_image(kind, size, seed)
        image.save(path, **options)
    return [str(folder / "test" / label / f"{number}.{suffix}") for label in LABELS for number in range(2)]


def save_network(data, folder, name="test_wide_resnet_cifar", **model_args):
    model = create_image_classifier(
        name,
        data.label_names,
        data.mean,
        data.std,
        image_size=data.image_size,
        interpolation=data.interpolation,
        **model_args,
    )
    save_image_classifier(model, folder)
    return model


def trained_on(data) -> torch.Tensor:
    """The test images (N, 3, H, W) float32 as they are read in training and measured."""
    test = evaluation_images(data.test, data.mean, data.std)
    return test.__getitems__(range(len(test)))["pixel_values"]


def timm_transform(folder):
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)


@pytest.mark.parametrize("kind", KINDS)
def test_timm_and_transformers_read_the_pixels_of_the_training(kind, tmp_path):
    transform = processor = classify = None
    for number, size in enumerate(SIZES):
        paths = write_images(tmp_path / f"data{number}", kind, size)
        data = load_images(str(tmp_path / f"data{number}"))
        expected = trained_on(data)
        save_network(data, tmp_path / f"model{number}")
        folder = str(tmp_path / f"model{number}")
        transform, processor = timm_transform(folder), AutoImageProcessor.from_pretrained(folder)
        images = [to_rgb(Image.open(path)) for path in paths]
        torch.testing.assert_close(torch.stack([transform(image) for image in images]), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(processor(images)["pixel_values"], expected, rtol=0, atol=1e-5)
        if kind not in NOT_BY_PIPELINES:
            classify = classify or pipeline("image-classification", model=folder)
            classify.image_processor = processor
            found = torch.cat([classify.preprocess(path)["pixel_values"] for path in paths])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "model_args"), [("resnet18", {}), ("vit_tiny_patch16_224", {"depth": 1}), ("test_densenet_cifar", {})]
)
def test_another_size_is_written_and_comes_back(name, model_args, tmp_path):
    paths = write_images(tmp_path / "data", "RGB", (96, 50))
    data = load_images(str(tmp_path / "data"), image_size=48)
    model = save_network(data, tmp_path / "model", name, **model_args).eval()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert config["model_args"] == ({**model_args, "img_size": 48} if "vit" in name else model_args)
    expected = trained_on(data)
    values = AutoImageProcessor.from_pretrained(tmp_path / "model")([Image.open(path) for path in paths])
    torch.testing.assert_close(values["pixel_values"], expected, rtol=0, atol=1e-5)
    transform = timm_transform(tmp_path / "model")
    torch.testing.assert_close(transform(Image.open(paths[1])), expected[1], rtol=0, atol=1e-5)
    network = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(expected).logits
        assert torch.equal(load_image_classifier(tmp_path / "model")(expected).logits, logits)
        assert torch.equal(network(expected), logits)


def test_digits_say_that_their_pixels_are_repeated(tmp_path):
    data = load_images("digits", max_train_samples=20, max_eval_samples=5)
    assert data.interpolation == "nearest"
    save_network(data, tmp_path)
    small = [Image.fromarray(image[::4, ::4].numpy()) for image in data.test.pixels]  # (8, 8), as they were published
    values = AutoImageProcessor.from_pretrained(tmp_path)(small)["pixel_values"]
    torch.testing.assert_close(values, trained_on(data), rtol=0, atol=1e-5)
    assert load_images("digits", image_size=20, max_train_samples=20).interpolation == "bilinear"


def test_a_network_of_one_channel(tmp_path):
    model = create_image_classifier("test_wide_resnet_cifar", LABELS, [0.4], [0.2], in_chans=1)
    save_image_classifier(model, tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80), dtype=np.uint8))
    squashed = np.array(image.resize((32, 32), Image.Resampling.BILINEAR))
    expected = (torch.from_numpy(squashed)[None] / 255 - 0.4) / 0.2
    torch.testing.assert_close(timm_transform(tmp_path)(image), expected, rtol=0, atol=1e-5)


def test_another_pipeline_is_written_as_given(tmp_path):
    given = {"image_size": 64, "interpolation": "bicubic", "crop_mode": "center", "crop_pct": 0.875}
    model = create_image_classifier("resnet18", LABELS, [0.5] * 3, [0.2] * 3, **given)
    cfg = model.config.pretrained_cfg
    assert cfg["input_size"] == [3, 64, 64]
    assert {name: cfg[name] for name in given if name != "image_size"} == {
        name: value for name, value in given.items() if name != "image_size"
    }
    save_image_classifier(model, tmp_path)
    center = timm.data.create_transform(
        64, interpolation="bicubic", crop_mode="center", crop_pct=0.875, mean=[0.5] * 3, std=[0.2] * 3
    )
    image = make_image("RGB", (100, 80), 0)[0]
    assert torch.equal(timm_transform(tmp_path)(image), center(image))


def test_published_code_reads_the_same(tmp_path):
    data = load_images("digits", max_train_samples=20, max_eval_samples=5)
    save_network(data, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    published, files = remote_code(settings)
    assert files and published["pretrained_cfg"] == settings["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    values = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)(image)["pixel_values"]
    squashed = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.NEAREST))).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    torch.testing.assert_close(values, (squashed / 255 - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation='cubic' is unknown to timm; give one of nearest, bilinear"),
        ({"crop_mode": "fit"}, "crop_mode='fit' is unknown to timm; give one of squash, center, border"),
        ({"crop_pct": 0.0}, "crop_pct=0.0 is a share of each side; give a number above 0, at most 1"),
        ({"crop_pct": 1.5}, "crop_pct=1.5 is a share of each side"),
        ({"image_size": 0}, "image_size=0 is the side of the images in pixels; give a whole number above 0"),
        ({"image_size": 32.0}, "image_size=32.0 is the side of the images in pixels"),
        ({"image_size": 32, "img_size": 48}, "'img_size': 48.* and image_size=32 differ; give the size"),
    ],
)
def test_create_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_image_classifier("test_wide_resnet_cifar", LABELS, [0.5] * 3, [0.2] * 3, **arguments)


@pytest.mark.parametrize(
    ("name", "size", "model_args", "message"),
    [
        ("inception_v3", 32, {}, "inception_v3 cannot read images of 32 x 32 pixels .*give --image_size 299, for"),
        (
            "vit_tiny_patch16_224",
            40,
            {},
            r"40 x 40 pixels \(ValueError: it reads patches of 16 x 16, so give a multiple",
        ),
        ("resnet18", 32, {"proj_drop_rate": 0.1}, "resnet18 does not take all of these .*proj_drop_rate is --dropout"),
        ("resnet1", 32, {}, "'resnet1' is not an architecture"),
    ],
)
def test_what_does_not_fit_is_refused(name, size, model_args, message):
    with pytest.raises(ValueError, match=message):
        check_image_size(name, size, **model_args)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "mixer_s16_224"])
def test_what_fits_is_found_out_without_drawing_a_number(name):
    before = torch.get_rng_state()
    check_image_size(name, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_of_other_sizes():
    """An eighth of the side is padded; the middle window is the image itself."""
    data = load_images("digits", image_size=64, max_train_samples=20)
    arguments = (data.train, data.mean, data.std)
    plain = ImageDataset(*arguments, augment=False, flip=False, seed=0, padding=8)
    same = ImageDataset(*arguments, augment=False, flip=False, seed=0)
    assert torch.equal(plain[3]["pixel_values"], same[3]["pixel_values"])
    assert plain.view_count == 20 * 17**2
    moved = ImageDataset(*arguments, augment=True, flip=False, seed=0, padding=8)
    assert int(moved.views(torch.arange(20)).max()) > 2 * 81
    assert moved.cache_fingerprint != ImageDataset(*arguments, augment=True, flip=False, seed=0).cache_fingerprint
