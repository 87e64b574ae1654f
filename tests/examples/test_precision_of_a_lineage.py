"""Which precision a lineage is trained in, on this machine and another, by flags and by accelerate's launcher."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import EXAMPLES, load_example
from PIL import Image

from born_again import create_image_classifier
from born_again.lineage.manifest import LineageError, Manifest, file_sha256
from born_again.lineage.spec import spec_sha256
from born_again.models.image_classifier import save_image_classifier

BEGUN = Path(__file__).parents[1] / "lineage" / "begun_at_0_1_0"
IMAGES = "--smoke --num_train_epochs 1 --threads 1 --disable_tqdm True --max_train_samples 64 --max_eval_samples 32"
TEXT = (
    "--dataset grammar --model test-lstm --max_train_samples 480 --max_eval_samples 120 --window 10 "
    "--num_train_epochs 1 --per_device_train_batch_size 8 --threads 1 --disable_tqdm True"
)


@pytest.fixture
def machine(monkeypatch):
    """run_cifar on a machine that has, or has not, fast bf16; called with its further flags."""

    def start(folder, *words, fast_bf16, generations=0):
        script = load_example("run_cifar")
        monkeypatch.setattr(script, "has_fast_bf16", lambda: fast_bf16)
        return script.start([*IMAGES.split(), "--generations", str(generations), "--output_dir", str(folder), *words])

    return start


def computed_in(folder):
    return [record["computation"]["mixed_precision"] for record in Manifest.read(folder).generations]


@pytest.mark.parametrize("begun_with", [True, False])
def test_a_lineage_goes_on_in_the_precision_it_was_begun_in(machine, tmp_path, capsys, begun_with):
    words = {True: "bf16 autocast", False: "fp32"}
    assert machine(tmp_path / "out", fast_bf16=begun_with) == 0
    assert "Resumes in" not in capsys.readouterr().out
    assert machine(tmp_path / "out", fast_bf16=not begun_with, generations=1) == 0
    printed = capsys.readouterr().out
    assert printed.count("Resumes in") == 1
    assert f"Resumes in {words[begun_with]}, as the lineage in {tmp_path / 'out'} was begun; the default" in printed
    assert f"this machine is {words[not begun_with]}." in printed and f"Computed in {words[begun_with]}," in printed
    assert computed_in(tmp_path / "out") == ["bf16" if begun_with else "no"] * 2


def test_a_precision_that_was_given_is_refused_where_it_is_another(machine, tmp_path, monkeypatch, capsys):
    assert machine(tmp_path / "out", fast_bf16=False) == 0
    with pytest.raises(LineageError, match="training.bf16: True here, 'default' there"):
        machine(tmp_path / "out", "--bf16", "True", fast_bf16=False, generations=1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(LineageError, match="training.bf16: True here, 'default' there"):
        machine(tmp_path / "out", fast_bf16=False, generations=1)
    # A flag wins over the launcher.
    assert machine(tmp_path / "out", "--bf16", "False", fast_bf16=True, generations=1) == 0
    assert computed_in(tmp_path / "out") == ["no", "no"]


def test_a_precision_that_this_machine_has_not_is_refused_with_the_reason(machine, tmp_path):
    assert machine(tmp_path / "out", fast_bf16=False) == 0
    content = json.loads((tmp_path / "out" / "lineage.json").read_text())
    content["spec"]["training"]["fp16"] = True  # as a GPU would have begun it
    content["spec_sha256"] = spec_sha256(content["spec"])
    (tmp_path / "out" / "lineage.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fp16: the lineage in .* was begun in fp16 autocast, which accel"):
        machine(tmp_path / "out", fast_bf16=True, generations=1)


def test_the_name_of_a_lineage_does_not_hang_on_the_place_of_its_data(machine, tmp_path):
    """Nor does whether they are mirrored, which the name of the first folder decides."""
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "a" / "ocr-first" / split / label).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (32, 32), (number * 50, 40 if label == "cat" else 200, 90))
                image.save(tmp_path / "a" / "ocr-first" / split / label / f"{number}.png")
    folder = tmp_path / "out"
    small = ("--max_train_samples", "8", "--max_eval_samples", "4")
    assert machine(folder, *small, "--dataset", str(tmp_path / "a" / "ocr-first"), fast_bf16=False) == 0
    shutil.copytree(tmp_path / "a" / "ocr-first", tmp_path / "b" / "second")
    shutil.rmtree(tmp_path / "a")
    words = (*small, "--dataset", str(tmp_path / "b" / "second"))
    assert machine(folder, *words, fast_bf16=False, generations=1) == 0
    manifest = Manifest.read(folder)
    assert len(manifest.generations) == 2 and manifest.spec.data_args["flip"] is False
    assert manifest.spec.name.endswith("-ocr-first")
    Image.new("RGB", (32, 32)).save(tmp_path / "b" / "second" / "train" / "cat" / "0.png")
    with pytest.raises(LineageError, match="dataset: .*second' here, .*first' there"):
        machine(folder, *words, fast_bf16=False, generations=2)


# ---- Lineages that version 0.1.0 has begun, before any of this was recorded ----


@pytest.mark.parametrize("finished", [True, False])
def test_a_lineage_of_an_earlier_version_goes_on(machine, tmp_path, capsys, finished):
    """Its lineage.json is a real one; the weights, too large to be kept beside it, are of an untrained network."""
    content = json.loads((BEGUN / "images.json").read_text())
    record = content["generations"][0]
    if finished:
        names = [str(digit) for digit in range(10)]
        model = create_image_classifier("test_wide_resnet_cifar", names, (0.2,) * 3, (0.3,) * 3)
        (tmp_path / "out").mkdir()
        save_image_classifier(model, tmp_path / "out" / "gen0")
        record["weights_sha256"] = file_sha256(tmp_path / "out" / "gen0" / "model.safetensors")
        (tmp_path / "out" / "gen0" / "README.md").write_text("")
    else:
        record |= {"status": "training", "weights_sha256": None, "metrics": {}}
        (tmp_path / "out").mkdir()
    before = dict(record)
    (tmp_path / "out" / "lineage.json").write_text(json.dumps(content))
    assert machine(tmp_path / "out", fast_bf16=False, generations=1) == 0
    assert "Resumes in bf16 autocast" in capsys.readouterr().out
    first, second = Manifest.read(tmp_path / "out").generations
    assert second["status"] == "finished" and second["computation"]["mixed_precision"] == "bf16"
    if finished:
        assert first == before
    else:
        assert first["status"] == "finished" and "computation" not in first


def test_a_lineage_of_text_of_an_earlier_version_goes_on(tmp_path):
    content = json.loads((BEGUN / "text.json").read_text())
    content["generations"][0] |= {"status": "training", "weights_sha256": None, "metrics": {}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lineage.json").write_text(json.dumps(content))
    words = [*TEXT.split(), "--generations", "0", "--output_dir", str(tmp_path / "out")]
    assert load_example("run_ptb").start(words) == 0
    assert Manifest.read(tmp_path / "out").record(0)["status"] == "finished"


# ---- accelerate launch ----


def launched(folder, *words, launcher=()):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *launcher, str(EXAMPLES / "run_cifar.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder.parent)}
    done = subprocess.run(
        [*command, *IMAGES.split(), "--generations", "0", "--output_dir", str(folder), *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (record,) = Manifest.read(folder).generations
    return done, Manifest.read(folder).spec.training, record["computation"]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "precision"), [((), "bf16"), (("--bf16", "False"), "no")])
def test_accelerate_launch_says_what_it_computes(tmp_path, flags, precision):
    """`--mixed_precision bf16` and `--bf16 False` printed fp32 and computed in bf16."""
    folder = tmp_path / "out"
    done, training, computation = launched(folder, *flags, launcher=("--mixed_precision", "bf16"))
    assert f"Computed in {'bf16 autocast' if precision == 'bf16' else 'fp32'}, channels_last" in done.stdout
    assert training.get("bf16", False) == (precision == "bf16")
    assert computation["mixed_precision"] == precision
    warned = "--bf16 False takes precedence; the launcher's ACCELERATE_MIXED_PRECISION=bf16 is ignored."
    assert (warned in done.stderr) == (precision == "no")
    alone = tmp_path / "alone"
    assert (
        load_example("run_cifar").start(
            [*IMAGES.split(), "--generations", "0", "--output_dir", str(alone), "--bf16", str(precision == "bf16")]
        )
        == 0
    )
    assert Manifest.read(alone).record(0)["weights_sha256"] == Manifest.read(folder).record(0)["weights_sha256"]
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_accelerate_launch_says_what_it_compiles(tmp_path):
    launcher = ("--dynamo_backend", "eager", "--mixed_precision", "no")
    done, training, computation = launched(tmp_path / "out", "--bf16", "False", launcher=launcher)
    assert "compiled by eager (default)" in done.stdout
    assert (training["torch_compile"], training["torch_compile_backend"]) == (True, "eager")
    assert computation["dynamo_backend"] == "eager"
