"""Which images a run is of: their size, whether they are mirrored, and what a generation says of them."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from example_scripts import load_example
from PIL import Image
from transformers import pipeline

from born_again.data.image_dataset import ImageDataset
from born_again.lineage.manifest import LineageError
from born_again.lineage.reevaluation import reevaluate
from born_again.lineage.spec import DATA_SOURCE


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def script():
    return load_example("run_cifar")


def parsed(script, *words):
    arguments = (script.LineageArguments, script.BornAgainTrainingArguments)
    return script.parse_arguments(arguments, script.recipe, list(words))


def data_args(script, *words):
    return script.lineage_spec(*parsed(script, *words)).data_args


@pytest.mark.parametrize(
    ("words", "flip"),
    [
        ((), True),
        (("--dataset", "digits"), False),
        (("--dataset", "ylecun/mnist"), False),
        (("--dataset", "zalando-datasets/fashion_mnist"), True),
        (("--flip",), True),
        (("--no_flip",), False),
        (("--no-flip",), False),
        (("--flip", "False"), False),
        (("--flip=False",), False),
        (("--dataset", "mnist/mnist", "--flip"), True),
        (("--dataset", "digits", "--flip", "--generations", "1"), True),
        (("--dataset", "digits", "--flip", "True"), True),
    ],
)
def test_flip_on_the_command_line(script, words, flip):
    assert parsed(script, *words)[0].flip is flip


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_flip_in_a_file(script, tmp_path, dataset, value):
    (tmp_path / "flags.yaml").write_text(f"dataset: {dataset}\nflip: {str(value).lower()}\n")
    assert parsed(script, "--config", str(tmp_path / "flags.yaml"))[0].flip is value
    other = ["--no_flip"] if value else ["--flip"]
    assert parsed(script, "--config", str(tmp_path / "flags.yaml"), *other)[0].flip is not value


def test_what_is_decided_by_a_name_is_said_at_start(script):
    said = script.describe_input(*parsed(script, "--dataset", "digits"))
    assert said.endswith("not mirrored (--flip turns this on); 40 epochs in batches of 32")
    said = script.describe_input(*parsed(script, "--max_steps", "7", "--gradient_accumulation_steps", "2"))
    assert said.startswith("Images are 32 x 32, cropped at random from 4 pixels of padding, mirrored at random (")
    assert said.endswith("; 7 steps in batches of 256")
    said = script.describe_input(*parsed(script, "--no_crop"))
    assert said.startswith("Images are 32 x 32, not cropped (--crop), mirrored at random (")


def test_only_what_older_lineages_did_not_do_is_recorded(script):
    small = {"image_size": 16, "test_samples": 1197}
    assert data_args(script) == {} and data_args(script, "--dataset", "digits") == small
    assert data_args(script, "--image_size", "32", "--flip") == {}
    assert data_args(script, "--no_flip") == {"flip": False}
    assert data_args(script, "--dataset", "digits", "--flip") == {**small, "flip": True}
    assert data_args(script, "--dataset", "ylecun/mnist") == {"flip": False}  # was mirrored
    assert data_args(script, "--dataset", "ylecun/mnist", "--flip") == {}
    assert data_args(script, "--image_size", "64") == {"image_size": 64}
    assert data_args(script, "--no_crop") == {"crop": False} and data_args(script, "--crop") == {}
    plain, other = (
        script.lineage_spec(*parsed(script, *words)) for words in ((), ("--no_flip", "--image_size", "64"))
    )
    assert plain.differences(other, DATA_SOURCE) == [
        "data_args.flip: 'default' here, False there",
        "data_args.image_size: 'default' here, 64 there",
    ]


def marked(folder: Path, train: int, test: int) -> str:
    """Pictures of 96 x 48 of two classes: a bright mark near the left or right edge, or none."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in ("marked", "plain"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (48, 96, 3), dtype=np.uint8)
                if label == "marked":
                    left = 2 if number % 2 else 78
                    pixels[12:36, left : left + 16] = 255
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return str(folder)


def accuracy_of(classify, folder: str) -> float:
    paths = sorted(Path(folder, "test").glob("*/*.png"))
    return sum(classify(str(path))[0]["label"] == path.parent.name for path in paths) / len(paths)


@pytest.mark.slow
def test_a_deployed_generation_is_as_accurate_as_its_record(script, tmp_path, capsys):
    """Marks near the edges: whoever cuts the middle out of a picture does not see them."""
    data, out = marked(tmp_path / "marks", 48, 20), tmp_path / "out"
    words = ["--dataset", data, "--model", "test_wide_resnet_cifar", "--generations", "0", "--output_dir", str(out)]
    words += ["--num_train_epochs", "12", "--per_device_train_batch_size", "16", "--disable_tqdm", "True"]
    assert script.start([*words, "--image_size", "40", "--bf16", "False"]) == 0
    said = (
        "Images are 40 x 40, cropped at random from 5 pixels of padding, mirrored at random (--no_flip turns this off)"
    )
    assert said in capsys.readouterr().out
    content = json.loads((out / "lineage.json").read_text())
    assert content["spec"]["data_args"] == {"image_size": 40}
    folder = str(out / "gen0")
    recorded = content["generations"][0]["metrics"]["test"]["accuracy"]
    assert recorded >= 0.9
    assert accuracy_of(pipeline("image-classification", model=folder), data) == recorded
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)

    def classify(path):
        with torch.no_grad():
            label = network(transform(Image.open(path))[None]).argmax().item()
        return [{"label": network.pretrained_cfg["label_names"][label]}]

    assert accuracy_of(classify, data) == recorded
    measured = reevaluate(out / "gen0", device="cpu")
    assert measured["agrees"] and measured["data_args"] == {"image_size": 40}
    shutil.copytree(out / "gen0", tmp_path / "alone")
    alone = reevaluate(tmp_path / "alone", dataset=data, device="cpu")
    assert alone["data_args"] == {"image_size": 40} and alone["note"] == "there is no record to compare with"
    assert alone["splits"]["test"]["accuracy"]["measured"] == recorded
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_mode": "center", "crop_pct": 0.875}
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
    other = reevaluate(tmp_path / "alone", dataset=data, device="cpu", data_args={"image_size": 40})
    assert "config.json asks for crop_mode center, crop_pct 0.875 and bilinear interpolation, and" in other["note"]


def test_a_vision_transformer_of_the_images_size(script, tmp_path):
    words = ["--smoke", "--model", "test_vit", "--generations", "1", "--max_train_samples", "64", "--bf16", "False"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_eval_samples", "32", "--num_train_epochs", "1"]
    assert script.start([*words, "--disable_tqdm", "True", "--learning_rate", "0.001"]) == 0
    config = json.loads((tmp_path / "out" / "gen1" / "config.json").read_text())
    assert config["model_args"] == {"img_size": 32} and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert reevaluate(tmp_path / "out" / "gen1", device="cpu")["agrees"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "inception_v3"], "image_size=32: inception_v3 cannot read images of 32 x 32 pixels"),
        (
            ["--model", "test_vit", "--image_size", "40"],
            "test_vit cannot read images of 40 x 40 .*patches of 16",
        ),
        (["--image_size", "4"], "image_size is 4; expected at least 8"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_before_data_are_read(script, tmp_path, monkeypatch, words, message):
    if "--model" in words:
        monkeypatch.setattr(script, "load_images", None)
    with pytest.raises(ValueError, match=message):
        script.start(["--smoke", "--output_dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def shown_in_training(script, words, monkeypatch) -> list[ImageDataset]:
    """The training sets of a run that is stopped before it trains."""
    made = []

    def note(*args, **kwargs):
        made.append(kwargs["train_dataset"])
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "BornAgainTrainer", note)
    with pytest.raises(KeyboardInterrupt):
        script.start(words)
    return made


def test_mirroring_is_as_said_and_doubts_are_said_once(script, tmp_path, monkeypatch, capsys, caplog):
    for label in ("left", "right"):
        for split in ("train", "test"):
            (tmp_path / "arrows" / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "arrows" / split / label / f"{number}.png")
    words = ["--smoke", "--dataset", str(tmp_path / "arrows"), "--generations", "0"]
    (train,) = shown_in_training(script, [*words, "--output_dir", str(tmp_path / "a")], monkeypatch)
    assert train.flip is True
    doubt = "classes 'left' and 'right' may be mirror images of each other; --no_flip turns this off"
    assert caplog.text.count(doubt) == 1
    caplog.clear()
    (train,) = shown_in_training(script, [*words, "--no_flip", "--output_dir", str(tmp_path / "b")], monkeypatch)
    assert train.flip is False and not int(train.views(torch.arange(4)).max()) > 81
    assert doubt not in caplog.text and "not mirrored (--flip turns this on)" in capsys.readouterr().out


def test_images_that_are_not_cropped_are_the_images_themselves(script, tmp_path, monkeypatch):
    words = ["--smoke", "--dataset", "digits", "--generations", "0", "--output_dir", str(tmp_path / "out")]
    (train,) = shown_in_training(script, [*words, "--no_crop"], monkeypatch)
    assert train.padding == 0
    pixels, rows = train.pixels, torch.arange(16)
    shown = train.__getitems__(rows.tolist())["pixel_values"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (train.mean, train.std))
    exact = (pixels[rows].permute(0, 3, 1, 2).double() / 255 - mean) / std
    torch.testing.assert_close(shown.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_lineage_that_was_begun_without_crops_goes_on_without(script, tmp_path, monkeypatch):
    words = ["--smoke", "--dataset", "digits", "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert script.start([*words, "--generations", "0", "--no_crop"]) == 0
    with pytest.raises(LineageError, match="data_args.crop: 'default' here, False there"):
        script.main(*parsed(script, *words, "--generations", "1", "--crop"))
    (train,) = shown_in_training(script, [*words, "--generations", "1"], monkeypatch)
    assert train.padding == 0


def test_a_validation_split_is_reported_as_its_own_and_evaluated_again(script, tmp_path, capsys):
    words = ["--smoke", "--num_train_epochs", "1", "--threads", "1", "--disable_tqdm", "True", "--generations", "1"]
    words += ["--max_train_samples", "80", "--max_eval_samples", "48", "--validation_fraction", "0.25"]
    assert script.start([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert "(60 + 48 + 20 images, 10 classes)" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/lineage.json").read_text())
    assert content["data"]["rows"] == {"train": 60, "test": 48, "validation": 20}
    assert [list(record["metrics"]) for record in content["generations"]] == [["validation", "test"]] * 2
    result = reevaluate(tmp_path / "out/gen1")
    assert result["agrees"] is True and result["items"] == {"validation": 20, "test": 48}
    card = (tmp_path / "out/gen1/README.md").read_text()
    assert "validation accuracy" in card and "after the last step" in " ".join(card.split())
