"""run_image_classification.py and run_text_classification.py, offline, on data made here."""

import csv
import json
import shutil

import datasets
import numpy as np
import pytest
import timm
import torch
from example_scripts import load_example
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from born_again.data.labelled import read_labelled
from born_again.data.text import word_tokenizer
from born_again.lineage.manifest import Manifest

RUN = "--generations 1 --max_steps 2 --per_device_train_batch_size 4 --threads 1 --disable_tqdm True".split()
WORDS = ["good", "bad", "film", "the", "<unk>", "<eos>", "<pad>"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path):
    """A folder of images in train/CLASS/ and validation/CLASS/, of other sizes than any network's."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for kind, level in (("day", 200), ("night", 40)):
            folder = tmp_path / "photos" / split / kind
            folder.mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(0, 40, (20, 26, 3)) + level
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def reviews(tmp_path):
    """CSV files with a text, a label and a number."""
    for split, count in (("train", 12), ("test", 6)):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["review", "label", "stars"])
            rows.writerows(
                [["the good film" if i % 2 else "the bad film", "yes" if i % 2 else "no", i] for i in range(count)]
            )
    return tmp_path


@pytest.fixture
def encoder(tmp_path):
    """A folder with the configuration and the tokenizer of a tiny BERT."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        pad_token_id=WORDS.index("<pad>"),
    )
    folder = tmp_path / "encoder"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def start(name, *words):
    return load_example(name).start([*RUN, *map(str, words)])


def test_a_network_of_timm_on_a_folder_of_images(photos, tmp_path, capsys):
    words = ["--model_name_or_path", "test_resnet", "--image_size", "32", "--dataset_name", photos]
    assert start("run_image_classification", *words, "--no_flip", "--curve_samples", "4") == 0
    folder = tmp_path / "outputs" / "test_resnet-photos"
    manifest = Manifest.read(folder)
    shown = capsys.readouterr().out
    assert "Curves: the same 4 rows of the validation split are evaluated 5 times a training, " in shown
    assert shown.count("eval_loss") == 4  # after each of two steps, of each generation
    assert "test_resnet from scratch on" in shown and "12 + 6 rows of train, validation, 2 classes" in shown
    assert len(table(shown)) == 4 and (folder / "gen1" / "README.md").is_file()
    assert manifest.content["data"]["test_split"] == "validation"  # which the data calls so
    assert manifest.spec.starting_point is None and "labels alone" not in shown
    network = timm.create_model(f"local-dir:{folder / 'gen1'}", pretrained=True)
    assert tuple(network.pretrained_cfg["input_size"]) == (3, 32, 32)
    model = AutoModelForImageClassification.from_pretrained(folder / "gen1")
    assert model.config.id2label == {0: "day", 1: "night"}
    assert start("run_image_classification", *words, "--no_flip") == 0
    assert "nothing is left to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mixup: got 0.2, expected 0: the labels of mixed images are soft"):
        start("run_image_classification", *words, "--mixup", "0.2")


@pytest.mark.slow
def test_a_pretrained_vit_on_two_folders_of_images(photos, tmp_path, capsys):
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    words = ["--train_dir", photos / "train", "--validation_dir", photos / "validation", "--output_dir", "own"]
    assert start("run_image_classification", *words, "--model_name_or_path", tmp_path / "vit") == 0
    manifest = Manifest.read(tmp_path / "own")
    assert manifest.spec.starting_point == str(tmp_path / "vit") and manifest.spec.training["max_steps"] == 2
    assert "from pretrained" in capsys.readouterr().out
    card = (tmp_path / "own" / "gen1" / "README.md").read_text()
    assert "fine-tuned from pretrained weights (vit" in " ".join(card.split()) and str(tmp_path) not in card
    assert AutoImageProcessor.from_pretrained(tmp_path / "own" / "gen1").size["height"] == 16
    classify = pipeline("image-classification", model=str(tmp_path / "own" / "gen1"))
    assert {one["label"] for one in classify(str(photos / "train" / "day" / "0.png"))} == {"day", "night"}


def test_what_a_row_is_augmented_by_is_the_same_whoever_reads_it(photos):
    script = load_example("run_image_classification")
    flags, training = script.parse_arguments(
        (script.Arguments, script.BornAgainTrainingArguments),
        script.recipe,
        ["--model_name_or_path", "test_resnet", "--image_size", "32", "--dataset_name", str(photos)],
    )
    splits = read_labelled(str(photos))
    data = script.build(flags, training, splits).train_dataset
    first = [data[3]["pixel_values"], data[3]["pixel_values"]]
    data.set_epoch(1)
    other = data[3]["pixel_values"]
    data.set_seed(1)
    assert first[0].equal(first[1]) and not first[0].equal(other) and not data[3]["pixel_values"].equal(first[0])
    data.set_seed(0)
    assert data[3]["pixel_values"].equal(first[0])


def test_an_encoder_on_csv_files(reviews, encoder, tmp_path, capsys):
    words = ["--config_name", encoder, "--train_file", "train.csv", "--test_file", "test.csv"]
    assert start("run_text_classification", *words) == 0
    folder = tmp_path / "outputs" / "encoder-train"
    manifest = Manifest.read(folder)
    shown = capsys.readouterr().out
    assert "12 + 6 rows of train, test, 2 classes" in shown and len(table(shown)) == 4
    assert manifest.spec.starting_point is None and manifest.content["data"]["label_names"] == ["no", "yes"]
    assert "test_split" not in manifest.content["data"]
    classify = pipeline("text-classification", model=str(folder / "gen1"))
    assert classify("the good film")[0]["label"] in ("no", "yes")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "gen0", num_labels=3, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "pretrained")  # of another task
    shutil.copytree(encoder, tmp_path / "pretrained", dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
    words = ["--model_name_or_path", tmp_path / "pretrained", *words[2:], "--output_dir", "own"]
    assert start("run_text_classification", *words) == 0
    assert Manifest.read(tmp_path / "own").spec.starting_point == str(tmp_path / "pretrained")


def test_the_best_weights_of_a_network_whose_configuration_is_in_bfloat16(reviews, encoder, tmp_path, capsys):
    config = BertConfig.from_pretrained(encoder)
    config.dtype = "bfloat16"
    config.save_pretrained(encoder)
    words = ["--config_name", encoder, "--train_file", "train.csv", "--output_dir", "own", "--eval_strategy", "epoch"]
    best = ["--load_best_model_at_end", "--metric_for_best_model", "accuracy"]
    assert start("run_text_classification", *words, *best) == 0
    assert "eval_accuracy" in capsys.readouterr().out
    weights = load_file(tmp_path / "own" / "gen1" / "model.safetensors").values()
    assert {value.dtype for value in weights} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--task_name", "stsb", "--config_name", "x"], "task_name: got 'stsb', expected one of cola"),
        (["--train_file", "train.csv"], "model_name_or_path: got none"),
        (["--dataset_name", "no/where/here", "--config_name", "encoder"], "--dataset_name 'no/where/here'"),
        (["--train_file", "no.csv", "--config_name", "encoder"], "no.csv cannot be read"),
        (
            ["--train_file", "train.csv", "--config_name", "encoder", "--text_column_names", "text"],
            "one or two of review",
        ),
        (
            ["--train_file", "train.csv", "--config_name", "encoder", "--label_column_name", "x"],
            "--label_column_name is",
        ),
    ],
)
def test_texts_that_are_refused(reviews, encoder, tmp_path, words, match):
    with pytest.raises(ValueError, match=match):
        start("run_text_classification", *words)
    assert not (tmp_path / "outputs").exists()


def test_a_part_is_held_out_where_only_the_training_rows_have_labels(reviews, tmp_path):
    parts = read_labelled(None, files={"train": "train.csv"}, builder="csv", validation_fraction=0.25)
    assert {split: len(rows) for split, rows in parts.splits().items()} == {"train": 9, "validation": 3}
    assert sorted([*parts.train["stars"], *parts.evaluation["validation"]["stars"]]) == list(range(12))
    rows = [{"text": "a", "label": index % 2} for index in range(4)]
    (tmp_path / "json").mkdir()
    for split, content in (("train", rows), ("test", [{"text": "a", "label": -1}])):  # as GLUE's
        (tmp_path / "json" / f"{split}.json").write_text("\n".join(map(json.dumps, content)))
    parts = read_labelled(
        None, files={s: f"json/{s}.json" for s in ("train", "test")}, builder="json", validation_fraction=0.5
    )
    assert list(parts.splits()) == ["train", "validation"] and parts.names == ("0", "1")
