"""The main job as a user runs it: from the command line, in new processes, without a network."""

import json
import os
import subprocess
import sys
import time

import pytest
import timm
import torch
from example_scripts import EXAMPLES, load_example
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, pipeline

from born_again import LineageEnsemble, load_generation
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import load_images
from born_again.lineage.machine import describe_computation, has_fast_bf16
from born_again.lineage.manifest import LineageError

SCRIPT = EXAMPLES / "run_cifar.py"
TINY = [
    "--smoke",
    "--dataset",
    "digits",
    "--max_train_samples",
    "128",
    "--max_eval_samples",
    "64",
    "--disable_tqdm",
    "True",
]


def run(*words, launcher=()):
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def lineage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    launcher = ("-m", "accelerate.commands.launch")
    done = run(*TINY, "--generations", 2, "--output_dir", folder, launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done


def test_one_command_trains_teacher_and_students_and_prints_the_table(lineage):
    folder, done = lineage
    assert sorted(path.name for path in folder.iterdir()) == [
        *("ensemble", "gen0", "gen1", "gen2", "lineage.json"),
        *("report.html", "report.png", "report_images.safetensors"),
    ]
    content = json.loads((folder / "lineage.json").read_text())
    assert [record["status"] for record in content["generations"]] == ["finished"] * 3
    for record in content["generations"]:
        metrics = record["metrics"]["test"]
        assert metrics["accuracy"] + metrics["error"] == pytest.approx(1)
        assert metrics.keys() == {"accuracy", "error", "top5_accuracy", "nll", "ece"}
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and rows[0].split()[1] == "generation"
    assert f"{100 * content['generations'][2]['metrics']['test']['accuracy']:.2f}" in rows[4]
    (ensemble,) = content["ensembles"]
    assert ensemble["members"] == [1, 2] and ensemble["average"] == "probabilities"
    assert rows[5].startswith("| mean of 1, 2") and f"{100 * ensemble['metrics']['test']['accuracy']:.2f}" in rows[5]


def test_the_ensemble_is_measured_as_the_mean_probability_of_the_last_two(lineage):
    folder, _ = lineage
    data = load_images("digits", max_train_samples=128, max_eval_samples=64)
    test = ImageDataset(data.test, data.mean, data.std, augment=False, flip=False, seed=0)
    pixels = next(iter(DataLoader(test, batch_size=64, collate_fn=collate_batch)))
    labels = pixels.pop("labels")
    with torch.no_grad():
        each = [load_generation(folder / f"gen{index}")(**pixels).logits.double().softmax(-1) for index in (1, 2)]
    mean = sum(each) / 2
    (record,) = json.loads((folder / "lineage.json").read_text())["ensembles"]
    assert record["metrics"]["test"]["accuracy"] == (mean.argmax(-1) == labels).double().mean().item()
    nll = -mean.log().gather(1, labels[:, None]).mean().item()
    assert record["metrics"]["test"]["nll"] == pytest.approx(nll, rel=1e-5)
    saved = LineageEnsemble.from_pretrained(folder / "ensemble")
    torch.testing.assert_close(saved(**pixels).logits.exp(), mean, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert f"test accuracy: {record['metrics']['test']['accuracy']:.4f}" in (folder / "ensemble/README.md").read_text()


def test_a_network_trained_elsewhere_is_the_teacher(lineage, tmp_path, capsys):
    folder, out = lineage[0], tmp_path / "out"
    load_example("run_cifar").start(
        [*TINY, "--generations", "1", "--output_dir", str(out), "--teacher", str(folder / "gen2")]
    )
    content = json.loads((out / "lineage.json").read_text())
    original = json.loads((folder / "lineage.json").read_text())["generations"][2]
    taught, student = content["generations"]
    assert taught["weights_sha256"] == original["weights_sha256"] and taught["metrics"] == original["metrics"]
    assert taught["objective"] == "external" and student["objective"] == "ban" and student["seed"] == 43
    assert "| 0 (teacher) | external  |      |" in capsys.readouterr().out
    card = (out / "gen0" / "README.md").read_text()
    assert "A copy of gen2, which was trained elsewhere" in card and str(folder) not in card
    assert "learning_rate" not in card and "learning\\_rate" not in card
    assert "taught by generation 0," in (out / "gen1" / "README.md").read_text()


def test_the_same_command_says_that_all_is_done(lineage, capsys):
    folder, first = lineage
    assert load_example("run_cifar").start([*TINY, "--generations", "2", "--output_dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "Every generation is trained already" in printed
    assert printed.splitlines()[-6:] == first.stdout.splitlines()[-6:]


def test_another_command_on_the_folder_is_refused(lineage):
    words = [*TINY, "--generations", "2", "--output_dir", str(lineage[0]), "--objective", "ban+l"]
    message = "objective: 'ban.l' here, 'ban' there; training.learning_rate: 0.05 here, 0.1 there"
    with pytest.raises(LineageError, match=message):
        load_example("run_cifar").start([*words, "--learning_rate", "0.05"])


@pytest.mark.slow
def test_an_error_is_one_line_without_a_traceback(tmp_path):
    done = run("--smoke", "--model", "densenet90_60_cifr", "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert "densenet90_60_cifar" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@torch.no_grad()
def test_a_folder_loads_by_timm_and_transformers(lineage):
    folder, pixels = str(lineage[0] / "gen2"), torch.randn(2, 3, 32, 32)
    expected = load_generation(folder)(pixels).logits
    assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(pixels).logits, expected)
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels), expected)
    image = Image.new("RGB", (32, 32), (200, 30, 30))
    (answer, *_) = pipeline("image-classification", model=folder)(image)
    assert answer["label"] in "0123456789"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "densenet90_60_cifr"], "densenet90_60_cifar"),
        (["--dataset", "cifar-10"], "cifar10"),
        (["--generations", "-1"], "generations: got -1, expected 0 or more students"),
        (["--objective", "bann"], "objective: got 'bann', expected one of .*; did you mean 'ban'"),
        (["--temperature", "0"], "temperature: got 0.0, expected a finite number above 0"),
        (["--generation", "1", "--num_epochs", "3"], "'--num_epochs' is no flag; did you mean '--num_train_epochs'"),
        (["--push_to_hub", "True"], "push_to_hub: got True without --hub_namespace"),
        (["--loss_normalization", "trainer"], "loss_normalization: got 'trainer', expected 'step', since every gen"),
    ],
)
def test_bad_input_is_answered_before_anything_is_made(tmp_path, words, message):
    script = load_example("run_cifar")
    with pytest.raises(ValueError, match=message):
        script.start(["--smoke", "--output_dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_what_computes_is_chosen_printed_and_recorded(lineage):
    """bf16 where the machine has it, channels_last and an inference copy of the teacher, by default."""
    folder, done = lineage
    line = next(line for line in done.stdout.splitlines()[:3] if line.startswith("Computed in "))
    precision = "bf16 autocast" if has_fast_bf16() else "fp32"
    assert line.startswith(
        f"Computed in {precision}, channels_last, teacher_precision inference, not compiled; device"
    )
    content = json.loads((folder / "lineage.json").read_text())
    assert content["generations"][0]["hardware"] in line
    training = content["spec"]["training"]
    assert (training.get("bf16", False), training["channels_last"]) == (has_fast_bf16(), True)
    assert training["teacher_precision"] == "inference"


def test_one_argument_turns_each_off(tmp_path):
    script = load_example("run_cifar")
    arguments = script.LineageArguments, script.BornAgainTrainingArguments
    words = ["--dataset", "digits", "--bf16", "False", "--channels_last", "False", "--teacher_precision", "autocast"]
    lineage, training = script.parse_arguments(arguments, script.recipe, words)
    assert not {"bf16", "channels_last", "teacher_precision"} & training.weight_affecting().keys()
    line = describe_computation(training)
    assert line.startswith("fp32, contiguous, teacher_precision autocast, not compiled; device cpu, 1 process: CPU")
    training.torch_compile, training.torch_compile_backend = True, "inductor"
    assert "compiled by inductor (default)" in describe_computation(training)


def test_recipes():
    script = load_example("run_cifar")

    def parsed(*words):
        arguments = (script.LineageArguments, script.BornAgainTrainingArguments)
        return script.parse_arguments(arguments, script.recipe, list(words))

    lineage, training = parsed()
    assert (lineage.dataset, lineage.name) == ("cifar100", "densenet-cifar100")
    assert (training.learning_rate, training.lr_milestones, training.lr_gamma) == (0.1, [0.3, 0.6, 0.8], 0.2)
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (200.0, 128)
    assert (training.weight_decay, training.decay_all_parameters, training.max_grad_norm) == (5e-4, True, 0.0)
    assert training.optim_args == "momentum=0.9,nesterov=True" and training.output_dir == "outputs/densenet-cifar100"
    lineage, training = parsed("--model", "wide_resnet28_10_cifar", "--dataset", "cifar10", "--learning_rate", "0.2")
    assert (lineage.dropout, lineage.name, training.learning_rate) == (0.3, "wide-resnet-cifar10", 0.2)
    lineage, training = parsed("--dataset", "digits", "--name", "mine")
    assert (lineage.model, training.num_train_epochs) == ("wide_resnet16_1_cifar", 40.0)
    assert training.output_dir == "outputs/mine"
    lineage, training = parsed("--smoke", "--model", "test_densenet_cifar")
    assert (lineage.model, lineage.dataset, training.num_train_epochs) == ("test_densenet_cifar", "digits", 2.0)


@pytest.mark.slow
def test_densenet_on_a_folder_of_images_on_two_processes(tmp_path):
    for split, count in (("train", 24), ("test", 8)):
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                shade = (number * 7 % 255, 40 if label == "cat" else 200, 90)
                Image.new("RGB", (32, 32), shade).save(tmp_path / "data" / split / label / f"{number}.png")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run(
        "--dataset", tmp_path / "data", "--model", "test_densenet_cifar", "--generations", 1, "--num_train_epochs", 1,
        "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "out", "--disable_tqdm", "True",
        launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert content["spec"]["training"]["world_size"] == 2
    assert [record["steps"] for record in content["generations"]] == [3, 3]
    assert json.loads((tmp_path / "out" / "gen1" / "config.json").read_text())["label_names"] == ["cat", "dog"]


# Augmented images, bf16 where the machine has it, momentum: all of it must come back from disk.
RESUMED = [*TINY, "--generations", "1", "--per_device_train_batch_size", "16", "--num_train_epochs", "4"]
RESUMED += ["--threads", "1", "--save_strategy", "steps", "--save_steps", "5"]  # an epoch has 8 steps


def hashes(folder):
    return [record["weights_sha256"] for record in json.loads((folder / "lineage.json").read_text())["generations"]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Hashes of the weights of RESUMED, trained in this process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert load_example("run_cifar").start([*RESUMED, "--output_dir", str(folder)]) == 0
    return hashes(folder)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [(), ("--teacher_cache", "disk")])
def test_kill_in_the_middle_of_an_epoch_and_the_same_command_give_the_same_weights(uninterrupted, tmp_path, cached):
    words, cut = [*RESUMED, *cached], tmp_path / "cut"
    command = [sys.executable, str(SCRIPT), *map(str, [*words, "--output_dir", cut])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = cut / "checkpoints" / "gen1" / "checkpoint-15" / "trainer_state.json"
    while not marker.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert json.loads((cut / "lineage.json").read_text())["generations"][1]["status"] == "training"
    done = run(*words, "--output_dir", cut)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed from checkpoint-" in done.stderr
    assert hashes(cut) == uninterrupted
    assert not (cut / "teacher_cache").exists()


@pytest.mark.slow
def test_sigterm_and_the_same_command_give_the_same_weights(uninterrupted, tmp_path):
    words, cut = [*RESUMED, "--keep_checkpoints", "True"], tmp_path / "cut"
    command = [sys.executable, str(SCRIPT), *map(str, [*words, "--output_dir", cut])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    marker = cut / "checkpoints" / "gen1" / "checkpoint-5" / "trainer_state.json"
    while not marker.exists():
        assert process.poll() is None, "the run ended before it was asked to stop"
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors[-4000:]
    assert "SIGTERM after step" in errors and "the same command resumes from there" in errors
    assert "Traceback" not in errors
    done = run(*words, "--output_dir", cut)
    assert done.returncode == 0, done.stderr[-4000:]
    assert hashes(cut) == uninterrupted


@pytest.mark.slow
def test_the_teacher_of_the_digits_lineage_reaches_97_percent(tmp_path):
    words = ["--dataset", "digits", "--generations", 0, "--output_dir", tmp_path / "out", "--disable_tqdm", "True"]
    done = run(*words, "--threads", 1)  # two would wait for each other while other tests use the cores
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert content["generations"][0]["metrics"]["test"]["accuracy"] >= 0.97
