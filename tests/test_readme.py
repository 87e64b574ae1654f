"""The lineages in the README are run, with tiny networks in the place of the ones it names."""

import csv
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from born_again.data.text import word_tokenizer
from born_again.lineage.manifest import Manifest

README = Path(__file__).parents[1] / "README.md"
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def snippet(begin, network):
    """The block of Python that begins so, its network replaced by a folder, and trained for two steps."""
    (text,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if begin in block)
    assert network in text and "BornAgainTrainingArguments(" in text
    names = {name: getattr(transformers, name) for name in re.findall(r"Auto\w+", text)}
    text = text.replace(network, "tiny").replace(
        ', objective="', ', max_steps=2, use_cpu=True, report_to="none", objective="'
    )
    return text, {"load_dataset": datasets.load_dataset, **names}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_a_vit_on_a_folder_of_images(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("cat", "dog", "owl"):
            (folder := tmp_path / "photos" / split / kind).mkdir(parents=True)
            for index in range(2):
                Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4)).save_pretrained("tiny")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("tiny")
    text, names = snippet("make_vit", "google/vit-base-patch16-224-in21k")
    exec(text.replace("id2label=names", "id2label=names, ignore_mismatched_sizes=True"), names)
    manifest = Manifest.read(tmp_path / "outputs" / "photos")
    assert [record["status"] for record in manifest.generations] == ["finished"] * 4
    assert manifest.spec.starting_point == "tiny" and manifest.content["data"]["label_names"] == ["cat", "dog", "owl"]
    assert [own["members"] for own in manifest.content["ensembles"]] == [[2, 3], [1, 2, 3]]


def test_an_encoder_on_csv_files(tmp_path):
    for split in ("train", "test"):
        with open(f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *([["good film", 1], ["bad film", 0]] * 4)])
    words = word_tokenizer(["good", "bad", "film", "<unk>", "<eos>", "<pad>"])
    words.add_special_tokens({"pad_token": "<pad>"})
    words.save_pretrained("tiny")
    BertConfig(**TINY, vocab_size=6, max_position_embeddings=8, architectures=["BertModel"]).save_pretrained("tiny")
    text, names = snippet("make_encoder", "distilbert/distilbert-base-uncased")
    text = text.replace(
        "reviews = load_dataset", "from born_again import BornAgainTrainingArguments, Lineage\nreviews = load_dataset"
    )
    exec(text, names)
    manifest = Manifest.read(tmp_path / "outputs" / "reviews")
    assert [record["status"] for record in manifest.generations] == ["finished"] * 4
    assert manifest.spec.starting_point is None
    assert BertForSequenceClassification.from_pretrained("outputs/reviews/gen3").config.num_labels == 2
