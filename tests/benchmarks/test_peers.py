"""The benchmark of peers: its tables, its check of a gradient, and its processes; no peer need be installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from tests.benchmarks import peers

    return peers


@pytest.fixture
def run(peers, tmp_path):
    return peers.Run(tmp_path, batch=8, warm_up=1, steps=2, checked=True, device=torch.device("cpu"))


def networks(run):
    torch.manual_seed(0)
    return tuple(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)) for _ in "st")


def logits(network, inputs):
    return network(inputs)


def variant(scale=1.0, teacher_mode=False, soften=1.0):
    def train(run, student, teacher, watch):
        generator = torch.Generator().manual_seed(1)
        teacher.train(teacher_mode)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        watch.attach(optimizer)
        for _ in range(run.all_steps):
            for _ in range(run.accumulate):
                inputs = torch.randn(run.batch, 5, generator=generator)
                with torch.no_grad():
                    p = (teacher(inputs) / soften).softmax(-1)
                (scale * F.cross_entropy(student(inputs), p) / run.accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def test_a_right_gradient_is_exact(peers, run):
    found = peers.check(run, variant(), networks, logits)
    run.accumulate = 2
    found["accumulated"] = peers.check(run, variant(), networks, logits)
    assert peers.verdict(found) == ("eval", "exact", "exact")


def test_a_scaled_gradient_is_told_by_its_factor(peers, run):
    found = peers.check(run, variant(scale=0.1), networks, logits)
    found["accumulated"] = {"failed": "it has none"}
    assert peers.verdict(found) == ("eval", "x 0.1", "none: it has none")


def test_another_loss_is_off(peers, run):
    found = peers.check(run, variant(soften=4.0), networks, logits)
    assert found["error"] > 0.01
    found["accumulated"] = found
    assert "off by" in peers.verdict(found)[1]


def test_a_teacher_in_training_mode_is_seen(peers, run):
    found = peers.check(run, variant(teacher_mode=True), networks, logits)
    found["accumulated"] = found
    assert peers.verdict(found)[0] == "IN TRAINING MODE, its statistics moved"
    assert found["error"] > 1e-3


def test_the_clock_runs_over_the_timed_steps(peers, run):
    run.checked = False
    found = peers.measure(run, variant(), networks)
    assert 0 < found["seconds"] < 60 and found["peak_mib"] > 0


def test_a_peer_that_fails_stands_in_the_table(peers):
    def figures(seconds, memory):
        return {"seconds": seconds, "cpu_seconds": seconds, "peak_mib": memory, "training_mib": 1}

    right = {"teacher_eval": True, "teacher_unchanged": True, "factor": 1.0, "error": 0.0}
    checks = {name: {**right, "accumulated": right} for name in ("born_again", "bare loop", "quick")}
    checks["KD_Lib"] = {"failed": "ModuleNotFoundError"}
    results = {
        ("bare loop", "equal"): [figures(1.0, 90), figures(1.0, 90)],
        ("quick", "equal"): [figures(4.0, 50), figures(8.0, 50)],
        ("KD_Lib", "equal"): [{"failed": "ModuleNotFoundError"}],
        ("born_again", "equal"): [figures(2.0, 100), figures(2.0, 100)],
    }
    lines = list(peers.table(results, checks, "equal", items=120))
    assert {line.count("|") for line in lines} == {12}
    assert "does not run: ModuleNotFoundError" in lines[4]
    assert lines[3].startswith("| quick | 22 | 15 | 30 | 0.375 | 0.375 | 50 | 1 | eval | exact | exact |")
    assert peers.goals(results, "equal") == (
        "at equal precision: born_again is 2.67 x the fastest peer (quick) "
        "and takes 2.00 x the memory of the smallest (quick)"
    )


@pytest.mark.slow
def test_the_benchmark_runs_without_peers(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.peers", "--only", "bare loop", "born_again"]
    command += "--tasks images --images 32 --batch 16 --warm-up 1 --repeats 1 --modes equal".split()
    command += ["--model", "test_wide_resnet_cifar", "--json", str(tmp_path / "figures.json")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "32 synthetic images" in printed
    record = json.loads((tmp_path / "figures.json").read_text())["images"]
    for name in ("bare loop", "born_again"):
        assert record["checks"][name]["teacher_eval"] and record["checks"][name]["error"] < 1e-6
        assert [figures["seconds"] > 0 for figures in record["results"][f"{name} / equal"]] == [True]
