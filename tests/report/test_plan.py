"""The plan of a training step: its parts against formulas, its whole against processes that really trained."""

import json
import sys

import pytest
import timm
from planned_training import measured_peaks

from born_again.cli import main
from born_again.report.plan import PlannedStep, hours, plan

MIB = 2**20
LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def test_what_an_engine_keeps_and_sends():
    def llama(**changed):
        return plan(
            PlannedStep("llama", 8, model_args=LLAMA, vocabulary=1000, window=16, optimizer="adamw", **changed)
        )

    one, ddp, fsdp = llama(), llama(processes=4), llama(processes=4, engine="fsdp2", teacher_placement="sharded")
    size = one["parameters"]
    assert one["communication"]["total"] == 0 and one["memory"]["weights"] // 4 >= size
    assert one["memory"]["optimizer"] == 8 * size and one["memory"]["buckets"] == 0
    # A ring of 4 sends 3/4 of a tensor, twice. The teacher is there as it was loaded, and as a copy for inference.
    assert ddp["communication"]["gradients"] == 2 * 4 * size * 3 // 4
    assert ddp["memory"]["buckets"] == 4 * size and 6 * size <= ddp["memory"]["teacher"] < 6.1 * size
    assert fsdp["memory"]["optimizer"] == 8 * size // 4
    assert fsdp["communication"]["weights"] == 2 * 2 * size * 3 // 4
    assert fsdp["communication"]["teacher"] == 2 * size * 3 // 4
    assert all(sum(facts["memory"].values()) == 2 * facts["memory"]["peak"] for facts in (one, ddp, fsdp))


def test_activations_grow_with_the_rows_and_a_vocabulary_is_chunked():
    few, many = (
        plan(PlannedStep("wide_resnet16_1_cifar", rows, device="cpu"))["memory"]["activations"] for rows in (32, 128)
    )
    assert 3.8 < many / few < 4.2
    small = dict(model="llama", model_args=LLAMA, window=64, objective="label", device="cpu")
    full, chunked = (plan(PlannedStep(batch=rows, vocabulary=32000, **small)) for rows in (32, 64))
    assert (full["loss_implementation"], chunked["loss_implementation"]) == ("full", "chunked")
    assert chunked["memory"]["peak"] < full["memory"]["peak"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": "fsdp"}, "engine: got 'fsdp', expected one of ddp, fsdp2, zero2, zero3"),
        ({"processes": 3}, "batch: got 128 rows for 3 processes x 1 accumulated .* multiple of 3, such as 129"),
        ({"window": 0}, "window: got 0, expected a whole number of 1 or more"),
        ({"teacher_placement": "sharded"}, "teacher_placement: got 'sharded' with engine 'ddp', .* fsdp2, zero2 or"),
    ],
)
def test_a_step_that_there_is_none_of(changed, message):
    with pytest.raises(ValueError, match=message):
        PlannedStep("wide_resnet16_1_cifar", 128, **changed)


@pytest.mark.parametrize(
    ("model", "changed", "message"),
    [
        ("gpt2", {"window": 2048}, "window: got 2048, expected at most the 1024 positions of 'gpt2'"),
        ("gpt2-small", {"window": 2048}, "window: got 2048, expected at most the 1024 positions of 'gpt2-small'"),
        ("llama", {"model_args": {"hiden_size": 64}}, "model_args: got 'hiden_size', .* did you mean 'hidden_size'?"),
        ("gpt2", {"model_args": {"vocab_size": 9}}, "model_args: got 'vocab_size', which follows from the vocabulary"),
        ("bert_generation", {}, "model: got 'bert_generation'"),
    ],
)
def test_a_language_model_that_there_is_none_of(model, changed, message):
    with pytest.raises(ValueError, match=message):
        plan(PlannedStep(model, 8, **changed))


def test_more_positions_are_an_argument_of_the_model():
    small = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 2048}  # GPT-2's own names
    assert plan(PlannedStep("gpt2", 8, model_args=small, window=2048, vocabulary=16))["parameters"] > 2048 * 8


def test_hours():
    step = PlannedStep("wide_resnet16_1_cifar", 128)
    numbers = {"samples": 50000, "epochs": 2, "generations": 3}
    found = hours(step, step_seconds=3.6, label_step_seconds=1.8, **numbers)
    assert found == {"steps": 782, "teacher": 0.391, "student": 0.782, "lineage": pytest.approx(2.737)}
    with pytest.raises(ValueError, match="step_seconds: got 0, expected a number above 0"):
        hours(step, step_seconds=0, **numbers)


def test_the_command(capsys):
    words = ["plan", "--model", "wide_resnet16_1_cifar", "--batch", "128", "--processes", "2"]
    time = ["--step_seconds", "0.5", "--samples", "600", "--epochs", "40", "--generations", "1"]
    assert main([*words, *time, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["hours"]["steps"] == 200 and content["communication"]["gradients"] == 4 * content["parameters"]
    assert main([*words, *time]) == 0
    said = capsys.readouterr().out
    assert "2 x ddp, 128 rows a step" in said and "hours: 0.1" in said and "computed, not measured" in said
    vit = ["plan", "--model", "test_vit", "--image_size", "160", "--batch", "8", "--json"]  # reads numbers of tensors
    assert main(vit) == 0
    sizes = json.loads(capsys.readouterr().out)
    network = timm.create_model("test_vit", num_classes=10)
    assert sizes["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert main([*words, "--epochs", "2"]) == 2
    assert "samples: got none, expected it with epochs" in capsys.readouterr().err


# On one thread, in float32 unless said: peak of resident memory above what was there before the networks.
MEASURED = {
    "images": {"model": "wide_resnet28_1_cifar", "batch": 128, "precision": "float32"},
    "lstm": {"model": "lstm-large", "batch": 32, "precision": "float32", "optimizer": "sgd"},
    "gpt2 in bf16": {
        "model": "gpt2-small",
        "batch": 4,
        "window": 256,
        "precision": "bf16",
        "optimizer": "adamw",
    },
    "gpt2, DDP": {
        "model": "gpt2-small",
        "batch": 4,
        "window": 128,
        "precision": "float32",
        "optimizer": "adamw",
        "processes": 2,
    },
}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory")
@pytest.mark.parametrize("name", MEASURED)
def test_the_plan_against_processes_that_train(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    facts = MEASURED[name]
    planned = plan(PlannedStep(device="cpu", **facts))["memory"]["peak"]
    for peak in measured_peaks(facts, tmp_path):
        assert planned == pytest.approx(peak, rel=0.15), (planned // MIB, peak // MIB)
