"""The command born-again, on lineages that the examples have trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import load_example
from lineage_folders import network
from safetensors.torch import load_file, save_file

from born_again.cli import main
from born_again.data.text import load_text
from born_again.lineage.lock import FolderLock
from born_again.lineage.reevaluation import evaluation_streams
from born_again.lineage.spec import spec_sha256

SHORT = ["--num_train_epochs", "1", "--threads", "1", "--disable_tqdm", "True", "--logging_steps", "999", "--smoke"]
IMAGES = ["--max_train_samples", "64", "--max_eval_samples", "48", "--generations", "2", "--learning_rate", "0.01"]
TEXT = ["--max_train_samples", "900", "--max_eval_samples", "301"]
GPT2 = ["--window", "6", "--per_device_train_batch_size", "4", "--generations", "0"]


def start(name: str, *words: str | Path) -> None:
    load_example(name).start([*SHORT, *map(str, words)])


@pytest.fixture(scope="session")
def image_lineage(tmp_path_factory) -> Path:
    """As an example leaves it; read only."""
    folder = tmp_path_factory.mktemp("image") / "out"
    start("run_cifar", *IMAGES, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def text_lineages(tmp_path_factory) -> Path:
    """Folders lstm and gpt2, likewise."""
    root = tmp_path_factory.mktemp("text")
    start("run_ptb", *TEXT, "--generations", 1, "--window", 20, "--output_dir", root / "lstm")
    network("gpt2", 0).save_pretrained(root / "config")
    start("run_ptb", *TEXT, *GPT2, "--model", root / "config", "--output_dir", root / "gpt2", "--name", "tiny")
    return root


@pytest.fixture
def images(image_lineage, tmp_path) -> Path:
    return Path(shutil.copytree(image_lineage, tmp_path / "image"))


@pytest.fixture
def run(capsys):
    """Runs the command; gives the exit status, what it printed (as JSON where asked for), and stderr."""

    def call(*words):
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        if status == 2:
            assert said.out == "" and len(said.err.splitlines()) == 1 and "Traceback" not in said.err
        return status, json.loads(said.out) if "--json" in words and said.out else said.out, said.err

    return call


def recorded(folder: Path, index: int) -> dict:
    return json.loads((folder / "lineage.json").read_text())["generations"][index]["metrics"]


def change(folder: Path, edit) -> None:
    content = json.loads((folder / "lineage.json").read_text())
    edit(content)
    (folder / "lineage.json").write_text(json.dumps(content))


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dim() > 1)
    save_file({**tensors, name: tensors[name] + 0.5}, folder / "model.safetensors", metadata={"format": "pt"})


# ---- status ----


def test_status_in_words(run, images):
    status, said, _ = run("status", images)
    lines = said.splitlines()
    assert status == 0
    assert lines[0].startswith(
        "test-wide-resnet-digits: test_wide_resnet_cifar on digits, teacher + 2 by ban, seed 42"
    )
    assert lines[1].split()[:5] == ["generation", "status", "objective", "seed", "accuracy"]
    assert lines[2].startswith("0 (teacher)  finished  label      42    ") and lines[4].split()[:2] == [
        "2",
        "finished",
    ]
    assert f"{100 * recorded(images, 2)['test']['accuracy']:.2f}" in lines[4].split()
    assert any(line.startswith("ensemble of 1, 2 (mean of probabilities): accuracy ") for line in lines)
    assert lines[-2:] == ["next: nothing: all 3 generations are trained", "unpublished: gen0, gen1, gen2"]


def test_status_of_a_text_shows_both_perplexities(run, text_lineages):
    _, said, _ = run("status", text_lineages / "lstm")
    perplexities = [
        f"{recorded(text_lineages / 'lstm', 1)[split]['perplexity']:.2f}" for split in ("validation", "test")
    ]
    assert said.splitlines()[3].split()[4:6] == perplexities


def test_status_as_json(run, images):
    (images / "gen1/model.safetensors").unlink()
    change(images, lambda content: content["generations"][0].update(hub={"status": "published"}))
    status, facts, _ = run("status", images, "--json")
    assert status == 0
    assert facts["generations"][2]["metrics"] == recorded(images, 2)
    assert (facts["missing_weights"], facts["unpublished"]) == ([1], [1, 2])
    assert facts["next"]["action"] == "refuse"
    assert [entry["members"] for entry in facts["ensembles"]] == [[1, 2]]


def test_status_while_a_run_goes_on(run, images):
    def unfinish(content):
        content.pop("ensembles")
        content["generations"][2].update(status="training", weights_sha256=None, metrics={})

    change(images, unfinish)
    with FolderLock(images):
        _, said, _ = run("status", images)
        assert "running: process " in said and " since 20" in said
        assert "next: wait for that run; after it, train generation 2 from its start" in said
        assert said.splitlines()[4].split()[:2] == ["2", "training"]
    _, said, _ = run("status", images)
    assert "running" not in said and said.splitlines()[4].split()[:2] == ["2", "interrupted"]


def test_status_of_what_is_no_lineage(run, tmp_path):
    status, _, error = run("status", tmp_path / "nowhere")
    assert status == 2 and "born-again: output_dir: " in error and "nowhere is no folder" in error
    (tmp_path / "lineage.json").write_text('{"format": "born_again.lineage", "version": 99}')
    status, _, error = run("status", tmp_path)
    assert status == 2 and "has version 99, this born_again reads up to 1" in error


def test_a_name_does_not_steer_the_terminal(run, images):
    (images / "gen1.replaced-1").mkdir()
    change(images, lambda content: content["generations"][1].update(objective="ban\x1b[31m"))
    _, said, _ = run("status", images)
    assert "\x1b" not in said and "ban?[31m" in said


# ---- evaluate ----


@pytest.mark.parametrize("index", [0, 2])
def test_a_classifier_measures_as_its_record_says(run, image_lineage, index):
    assert measured_as_recorded(run, image_lineage, index) == {"test": 48}


@pytest.mark.parametrize(("name", "index"), [("lstm", 0), ("lstm", 1), ("gpt2", 0)])
def test_a_language_model_measures_as_its_record_says(run, text_lineages, name, index):
    assert measured_as_recorded(run, text_lineages / name, index) == {"validation": 301, "test": 301}


def measured_as_recorded(run, folder: Path, index: int) -> dict[str, int]:
    """Returns how many items were measured."""
    status, result, _ = run("evaluate", folder / f"gen{index}", "--json")
    assert (status, result["agrees"], result["compared"], result["note"]) == (0, True, True, None)
    expected = recorded(folder, index)
    assert result["splits"].keys() == expected.keys()
    for split, metrics in expected.items():
        assert result["splits"][split].keys() == metrics.keys()
        for name, value in metrics.items():
            pair = result["splits"][split][name]
            assert pair["measured"] == pytest.approx(value, rel=1e-5, abs=1e-6) and pair["recorded"] == value
            assert pair["difference"] == pytest.approx(0, abs=1e-3) and pair["agrees"] is True
    assert [entry["agrees"] for entry in result["weights"]] == [True]
    return result["items"]


def test_an_ensemble_measures_as_its_record_says(run, images):
    status, result, _ = run("evaluate", images / "ensemble", "--json")
    (record,) = json.loads((images / "lineage.json").read_text())["ensembles"]
    assert (status, result["kind"], result["generations"], result["agrees"]) == (0, "ensemble", [1, 2], True)
    measured = {name: pair["measured"] for name, pair in result["splits"]["test"].items()}
    assert measured == pytest.approx(record["metrics"]["test"], rel=1e-5, abs=1e-6)
    assert measured["nll"] != pytest.approx(recorded(images, 2)["test"]["nll"], rel=1e-5)
    change(images, lambda content: content["ensembles"][0]["metrics"]["test"].update(nll=9.0))
    assert run("evaluate", images / "ensemble")[0] == 1
    change(images, lambda content: content.pop("ensembles"))
    status, said, _ = run("evaluate", images / "ensemble")
    assert status == 0 and said.splitlines()[-1] == "not compared: there is no record to compare with"


def test_a_record_that_differs(run, images):
    change(images, lambda content: content["generations"][1]["metrics"]["test"].update(nll=2.0))
    status, said, _ = run("evaluate", images / "gen1")
    assert status == 1 and said.splitlines()[-1] == "differs from the record, tolerance 0.0001"
    (line,) = [line for line in said.splitlines() if line.endswith("differs")]
    assert line.split()[:2] == ["test", "nll"] and line.split()[3] == "2.000000"
    status, said, _ = run("evaluate", images / "gen1", "--tolerance", "0.9")
    assert status == 0 and said.splitlines()[-1] == "agrees with the record, tolerance 0.9"


def test_a_record_that_is_not_finite(run, images):
    change(images, lambda content: content["generations"][1]["metrics"]["test"].update(nll=None))
    status, result, _ = run("evaluate", images / "gen1", "--json", "--tolerance", "10")
    assert status == 1 and result["splits"]["test"]["nll"]["agrees"] is False


def test_weights_that_were_changed(run, images):
    change_weights(images / "gen2")
    for path in ("gen2", "ensemble"):
        status, result, _ = run("evaluate", images / path, "--json")
        assert (status, result["agrees"], result["compared"]) == (1, False, False)
        assert result["note"].startswith("the weights do not match the recorded hash")
        assert [entry["file"] for entry in result["weights"] if not entry["agrees"]] == ["gen2/model.safetensors"]
    assert "gen2/model.safetensors: does not match the recorded hash" in run("evaluate", images / "gen2")[1]
    (images / "gen2/model.safetensors").write_bytes(b"short")
    status, said, _ = run("evaluate", images / "gen2")
    assert status == 1 and "and do not load" in said
    (images / "gen2/model.safetensors").unlink()
    status, said, _ = run("evaluate", images / "ensemble")
    assert status == 1 and "gen2/model.safetensors: is missing" in said


def test_other_data_is_measured_and_not_compared(run, images):
    status, said, _ = run("evaluate", images / "gen1", "--max_eval_samples", "40")
    assert status == 0 and "(40 in test, max_train_samples 64, max_eval_samples 40)" in said
    assert said.splitlines()[-1] == "not compared: the record is of other data"


def test_data_that_has_moved_is_asked_for_and_compared_by_its_hash(run, images):
    content = json.loads((images / "lineage.json").read_text())
    content["spec"]["dataset"] = content["data"]["source"] = "/home/someone/digits"
    content["spec_sha256"] = spec_sha256(content["spec"])
    (images / "lineage.json").write_text(json.dumps(content))
    status, _, error = run("evaluate", images / "gen1")
    assert status == 2 and "evaluated on '/home/someone/digits', which is not on this machine" in error
    assert "give --dataset" in error
    status, result, _ = run("evaluate", images / "gen1", "--dataset", "digits", "--json")
    assert (status, result["agrees"], result["compared"]) == (0, True, True)


def test_data_in_a_folder_named_from_elsewhere_is_asked_for(run, images):
    """ "photos/birds" may be a folder where the lineage was trained, or a repository of the Hub."""
    content = json.loads((images / "lineage.json").read_text())
    content["spec"]["dataset"] = content["data"]["source"] = "photos/birds"
    content["spec_sha256"] = spec_sha256(content["spec"])
    (images / "lineage.json").write_text(json.dumps(content))
    status, _, error = run("evaluate", images / "gen1")
    assert status == 2 and "evaluated on 'photos/birds', which cannot be read here" in error
    assert f"it is looked for from {os.getcwd()!r}" in error and "give --dataset" in error


def test_data_that_is_not_the_networks_is_refused(run, images, text_lineages, tmp_path):
    config = json.loads((images / "gen1/config.json").read_text())
    config["label_names"][3] = "three"
    (images / "gen1/config.json").write_text(json.dumps(config))
    status, _, error = run("evaluate", images / "gen1")
    assert status == 2 and "dataset: class 3 of 'digits' is '3', that of the network 'three'" in error
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat\nthe cat\n" * 100)
    status, _, error = run("evaluate", text_lineages / "lstm/gen0", "--dataset", tmp_path)
    assert status == 2 and "is not that of the network" in error
    status, _, error = run("evaluate", images / "gen2", "--text_column", "text")
    assert status == 2 and "text_column: got 'text', but this is an image classifier" in error


def test_the_mean_and_the_deviation_are_those_of_the_network(run, images):
    config = json.loads((images / "gen1/config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.9, 0.9, 0.9]
    (images / "gen1/config.json").write_text(json.dumps(config))
    status, result, _ = run("evaluate", images / "gen1", "--json")
    assert status == 1 and result["splits"]["test"]["nll"]["agrees"] is False


def test_without_a_lineage_the_dataset_must_be_given(run, images, tmp_path):
    alone = shutil.copytree(images / "gen2", tmp_path / "alone")
    status, _, error = run("evaluate", alone)
    assert status == 2 and "dataset: got none, and there is no lineage.json beside" in error
    status, result, _ = run("evaluate", alone, "--dataset", "digits", "--max_eval_samples", "48", "--json")
    assert (status, result["agrees"], result["note"]) == (0, None, "there is no record to compare with")
    nll = result["splits"]["test"]["nll"]
    assert nll["measured"] == pytest.approx(recorded(images, 2)["test"]["nll"], rel=1e-5) and nll["recorded"] is None


def test_a_generation_that_is_not_finished_has_no_record(run, images):
    def unfinish(content):
        content.pop("ensembles")
        content["generations"][2].update(status="training", metrics={})

    change(images, unfinish)
    status, said, _ = run("evaluate", images / "gen2")
    assert status == 0 and "not compared: generation 2 is not finished in lineage.json" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["statu"], "invalid choice: 'statu'"),
        (["status"], "arguments are required: OUTPUT_DIR"),
        (["evaluate", "{}", "--batch_size", "0"], "batch_size: got 0, expected 1 or more"),
        (["evaluate", "{}", "--tolerance", "nan"], "tolerance: got nan, expected a finite number of 0 or more"),
        (["evaluate", "{}", "--device", "cuba"], "device: got 'cuba', expected one that this machine has"),
        (["evaluate", "{}", "--revision", "main"], "revision: got 'main' for the folder"),
        (["evaluate", "{}", "--max_eval_samples", "0"], "--max_eval_samples is 0; expected at least 1"),
        (["evaluate", "{}", "--dataset", "digit"], "--dataset"),
        (["evaluate", "{}/.."], "is the folder of a lineage, expected one of its generations"),
        (["evaluate", "out/gen7"], "path: got 'out/gen7', which is no folder, expected that of a generation"),
        (["evaluate", "nobody/nothing"], "dataset: got none, and there is no lineage.json beside 'nobody/nothing'"),
        (
            ["evaluate", "nobody/nothing", "--dataset", "digits"],
            "'nobody/nothing', which is no folder here and cannot",
        ),
    ],
)
def test_arguments_that_are_wrong(run, image_lineage, words, message):
    status, _, error = run(*(word.format(image_lineage / "gen1") for word in words))
    assert status == 2 and message in error and error.startswith("born-again: ")


def test_the_streams_of_a_text():
    data = load_text("grammar", max_eval_samples=100)
    for carries, expected in ((True, (1, 100)), (False, (4, 20))):
        for streams in evaluation_streams(data, carries, 20, 4).values():
            assert (streams.streams, streams.window, streams.token_count) == (*expected, 100)
    first = evaluation_streams(data, True, 20, 4)["test"].__getitems__([0])
    assert first["input_ids"][0, 0] == data.tokenizer.eos_token_id and torch.equal(first["labels"][0], data.test[:100])


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "born_again.cli", "status", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["next"]["generation"] == 0, done.stderr
