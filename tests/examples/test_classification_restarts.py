"""The classification scripts killed, on two processes, and published, as a user runs them."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from example_scripts import EXAMPLES, load_example
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig

from born_again.lineage.manifest import Manifest

IMAGES = EXAMPLES / "run_image_classification.py"
TINY = [
    *"--model_name_or_path test_resnet --image_size 32 --dataset_name photos --generations 1 --threads 1".split(),
    *"--num_train_epochs 3 --per_device_train_batch_size 4 --save_steps 2 --disable_tqdm True".split(),
]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for kind in ("cat", "dog"):
            folder = tmp_path / "photos" / split / kind
            folder.mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(0, 256, (40, 34, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{index}.png")


def start(*words, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": "cache"}
    return subprocess.Popen(
        [sys.executable, *map(str, launcher), str(IMAGES), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    return output


def records(folder, *more):
    return [
        {name: record[name] for name in ("weights_sha256", "metrics", "teacher_fit", "steps", *more)}
        for record in Manifest.read(folder).generations
    ]


@pytest.mark.slow
def test_after_kill_9_the_same_command_reaches_the_same_weights(photos, tmp_path):
    """With workers, in the middle of an epoch: what an image is augmented by does not hang on who reads it when."""
    finish(start(*TINY, "--output_dir", "whole"))
    cut = start(*TINY, "--output_dir", "cut", "--dataloader_num_workers", "1")
    checkpoint, deadline = tmp_path / "cut" / "checkpoints" / "gen1" / "checkpoint-6", time.monotonic() + 300
    while not (checkpoint / "trainer_state.json").exists():
        assert cut.poll() is None and time.monotonic() < deadline, cut.communicate()[0][-3000:]
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    assert cut.wait() == -signal.SIGKILL
    cut.stdout.close()
    output = finish(start(*TINY, "--output_dir", "cut", "--dataloader_num_workers", "2"))
    assert "resumed from checkpoint-" in output
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_with_the_same_batch_train_the_same_lineage(photos, tmp_path):
    """Of a network without BatchNorm, which normalises by the rows of each process."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    config.save_pretrained(tmp_path / "vit")
    words = "--config_name vit --image_size 16 --bf16 False --optim sgd --learning_rate 0.1".split()
    words += [*TINY[4:], "--objective", "ban+l"]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / "cpu.yaml"]
    finish(start(*words, "--output_dir", "one"))
    two = ["--output_dir", "two", "--per_device_train_batch_size", "2"]
    finish(start(*words, *two, launcher=launcher))
    one, two = (Manifest.read(tmp_path / name).generations for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["computation"]["processes"] == 2 and ours["steps"] == theirs["steps"]
        assert ours["metrics"]["test"]["nll"] == pytest.approx(theirs["metrics"]["test"]["nll"], rel=1e-5)


@pytest.mark.slow
def test_a_lineage_goes_to_the_hub_and_comes_back(photos, logged_in_hub, tmp_path):
    hub, script = logged_in_hub, load_example("run_image_classification")
    words = [*TINY, "--max_steps", "1", "--push_to_hub", "--hub_namespace", "born-again", "--output_dir", "out"]
    assert script.start(words) == 0
    name = "born-again/test_resnet-photos-gen1"
    files = hub.store.repositories["model", name].at("main").files
    assert {"config.json", "model.safetensors", "README.md", "lineage.json"} <= set(files)
    card = ModelCard(files["README.md"].data.decode())
    assert card.data.pipeline_tag == "image-classification" and card.data.base_model.endswith("gen0")
    assert "A test\\_resnet trained from scratch on photos" in card.text
    assert AutoModelForImageClassification.from_pretrained(name).config.id2label == {0: "cat", 1: "dog"}
    before = records(tmp_path / "out", "seconds")
    shutil.rmtree(tmp_path / "out")
    assert script.start(words) == 0
    assert records(tmp_path / "out", "seconds") == before  # nothing was trained again
