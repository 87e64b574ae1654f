"""Perplexity: equal to a slow twin, whichever way it is fed, with every token weighing the same."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EvalPrediction

import born_again.metrics.perplexity as module
from born_again.metrics import language_model_metrics
from born_again.metrics.perplexity import ROWS, Perplexity


@pytest.fixture
def perplexity(tmp_path):
    return Perplexity(cache_dir=str(tmp_path / "metrics"))


def slow_perplexity(logits, labels) -> dict[str, float]:
    """Token by token, in Python's float64."""
    losses = []
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        largest = max(row)
        losses.append(largest - row[label] + math.log(math.fsum(math.exp(value - largest) for value in row)))
    nll = math.fsum(losses) / len(losses)
    return {"nll": nll, "perplexity": math.exp(nll), "tokens": len(losses)}


def some_tokens(count: int = 600, classes: int = 13, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """More tokens than are widened at a time, easier ones first, so that a mean of means would differ."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(count), labels] += torch.linspace(6, -2, count, dtype=torch.float64)
    labels[3::19] = -100
    return logits, labels


def token_nlls(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def test_equals_slow_twin_in_one_go_and_by_ragged_batches(perplexity):
    logits, labels = some_tokens()
    assert len(labels) > 2 * ROWS
    slow = slow_perplexity(logits.tolist(), labels.tolist())
    expected = pytest.approx(slow, rel=1e-12)
    values = perplexity.compute(predictions=logits, references=labels)
    assert values == expected
    assert isinstance(values["tokens"], int)
    parts = [slice(0, 300), slice(300, 300), slice(300, 301), slice(301, 590), slice(590, 600)]
    for part in parts:
        perplexity.add_batch(predictions=logits[part], references=labels[part])
    assert len(perplexity) == slow["tokens"]
    assert perplexity.compute() == expected
    means = [slow_perplexity(logits[part].tolist(), labels[part].tolist())["nll"] for part in (parts[0], parts[4])]
    assert max(means) > 2 * slow["nll"]  # a mean of means could not pass


@pytest.mark.parametrize("count", [1, ROWS - 1, ROWS, ROWS + 1])
def test_chunks_of_every_size(perplexity, count):
    logits, labels = some_tokens(count)
    expected = pytest.approx(slow_perplexity(logits.tolist(), labels.tolist()), rel=1e-12)
    assert perplexity.compute(predictions=logits, references=labels) == expected


def test_both_forms_are_equal_and_mix(perplexity):
    logits, labels = some_tokens()
    expected = pytest.approx(slow_perplexity(logits.tolist(), labels.tolist()), rel=1e-12)
    nlls = token_nlls(logits, labels)
    assert perplexity.compute(predictions=nlls, references=labels) == expected
    assert perplexity.compute(predictions=nlls.view(20, 30), references=labels.view(20, 30)) == expected
    assert perplexity.compute(predictions=logits.view(20, 30, 13), references=labels.view(20, 30)) == expected
    perplexity.add_batch(predictions=logits[:100], references=labels[:100])
    perplexity.add_batch(predictions=nlls[100:400], references=labels[100:400])
    perplexity.add_batch(predictions=logits[400:], references=labels[400:])
    assert perplexity.compute() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_widened_before_anything_else(perplexity, dtype):
    logits, labels = some_tokens()
    logits = logits.to(dtype)
    expected = pytest.approx(slow_perplexity(logits.double().tolist(), labels.tolist()), rel=1e-6)
    assert perplexity.compute(predictions=logits.clone().requires_grad_(), references=labels.int()) == expected
    nlls = token_nlls(logits.float(), labels).to(dtype)
    values = perplexity.compute(predictions=nlls, references=labels)
    assert values["nll"] == pytest.approx(float(nlls.double()[labels != -100].mean()), rel=1e-12)


def test_numpy_and_lists(perplexity):
    logits, labels = some_tokens(50)
    nlls = token_nlls(logits, labels)
    expected = pytest.approx(slow_perplexity(logits.tolist(), labels.tolist()), rel=1e-12)
    for predictions in (logits, nlls):
        assert perplexity.compute(predictions=predictions.numpy(), references=labels.numpy()) == expected
        assert perplexity.compute(predictions=predictions.tolist(), references=labels.tolist()) == expected
    narrow = logits.numpy().astype(np.float16)
    expected = pytest.approx(slow_perplexity(narrow.tolist(), labels.tolist()), rel=1e-6)
    assert perplexity.compute(predictions=narrow, references=labels.numpy().astype(np.int16)) == expected


def test_known_values_and_one_token_at_a_time(perplexity):
    # A model that knows nothing has the vocabulary as its perplexity.
    values = perplexity.compute(predictions=torch.zeros(5, 7), references=torch.arange(5))
    assert values == pytest.approx({"nll": math.log(7), "perplexity": 7.0, "tokens": 5}, rel=1e-6)
    perplexity.add(prediction=math.log(2), reference=0)
    perplexity.add(prediction=[0.0] * 8, reference=7)
    assert perplexity.compute() == pytest.approx({"nll": math.log(4), "perplexity": 4.0, "tokens": 2}, rel=1e-6)
    # Rounding may take a sure token a little below 0.
    values = perplexity.compute(predictions=[-1e-7, 0.0], references=[0, 1])
    assert values["perplexity"] == pytest.approx(1.0, abs=1e-6)


def test_ignored_tokens_may_be_anything(perplexity):
    nan, inf = float("nan"), float("inf")
    labels = torch.tensor([-100, 1, -100, -100])
    values = perplexity.compute(predictions=torch.tensor([nan, 2.0, -inf, -100.0]), references=labels)
    assert values == {"nll": 2.0, "perplexity": math.exp(2), "tokens": 1}
    logits = torch.tensor([[nan, nan], [0.0, 0.0], [inf, 0.0], [-inf, -inf]])
    assert perplexity.compute(predictions=logits, references=labels)["perplexity"] == pytest.approx(2.0, rel=1e-6)


def test_infinite(perplexity):
    inf = float("inf")
    expected = {"nll": inf, "perplexity": inf, "tokens": 2}
    assert perplexity.compute(predictions=[1.0, inf], references=[0, 0]) == expected
    # A class at minus infinity has probability 0; that matters only where it is the target.
    logits = torch.tensor([[0.0, -inf], [0.0, -inf]])
    assert perplexity.compute(predictions=logits, references=torch.tensor([0, 1])) == expected
    assert perplexity.compute(predictions=logits, references=torch.tensor([0, 0]))["perplexity"] == 1.0
    # exp(800) is beyond float64.
    assert perplexity.compute(predictions=[800.0], references=[0]) == {"nll": 800.0, "perplexity": inf, "tokens": 1}


def test_compute_starts_anew(perplexity):
    first = perplexity.compute(predictions=[1.0, 3.0], references=[0, 1])
    perplexity.add_batch(predictions=[5.0], references=[0])
    perplexity.reset()
    assert perplexity.compute(predictions=[1.0, 3.0], references=[0, 1]) == first


class LargestWide(TorchDispatchMode):
    """Remembers the most elements that a float32 or float64 tensor had that an operation gave back."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.float64):
            self.largest = max(self.largest, result.numel())
        return result


def test_logits_are_widened_some_rows_at_a_time(perplexity):
    logits = torch.zeros(5 * ROWS, 50, dtype=torch.bfloat16)
    labels = torch.zeros(5 * ROWS).long()
    labels[7] = -100
    with LargestWide() as seen:
        perplexity.add_batch(predictions=logits, references=labels)
    # The second bound is that of the token negative log-likelihoods.
    assert 0 < seen.largest <= max(ROWS * 50, 5 * ROWS)
    assert perplexity.compute()["perplexity"] == pytest.approx(50, rel=1e-5)


def test_loads_from_its_path_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    loaded = evaluate.load(str(Path(module.__file__)), cache_dir=str(tmp_path / "cache"))
    logits, labels = some_tokens(20)
    expected = slow_perplexity(logits.tolist(), labels.tolist())
    assert loaded.compute(predictions=logits, references=labels) == pytest.approx(expected, rel=1e-12)
    assert [set(features) for features in loaded.features] == [{"predictions", "references"}] * 2


FRESH = """
import json, socket, sys

def refuse(*args):
    raise OSError("no network in this test")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate

metric = evaluate.load(sys.argv[1])
metric.add_batch(predictions=[[0.0, 0.0]], references=[1])
print(json.dumps(metric.compute(predictions=[0.0, 0.0], references=[1, 0])))
"""


@pytest.mark.slow
def test_loads_in_a_fresh_interpreter_without_network(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", FRESH, module.__file__],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    expected = {"nll": math.log(2) / 3, "perplexity": 2 ** (1 / 3), "tokens": 3}
    assert json.loads(ran.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-6)


def test_language_model_metrics_takes_both_forms_by_batch():
    logits, labels = some_tokens(60)
    expected = pytest.approx(slow_perplexity(logits.tolist(), labels.tolist()), rel=1e-12)
    compute_metrics = language_model_metrics()
    logits, labels = logits.view(6, 10, 13), labels.view(6, 10)
    nlls = token_nlls(logits.transpose(1, 2), labels)
    for predictions in (logits, nlls):
        assert compute_metrics(EvalPrediction(predictions[:4], labels[:4]), compute_result=False) == {}
        assert compute_metrics(EvalPrediction((predictions[4:], None), (labels[4:],))) == expected
    # One that broke off leaves nothing behind.
    compute_metrics(EvalPrediction(nlls + 1, labels), compute_result=False)
    with pytest.raises(ValueError, match="NaN"):
        compute_metrics(EvalPrediction(nlls * float("nan"), labels), compute_result=False)
    assert compute_metrics(EvalPrediction(nlls.numpy(), labels.numpy())) == expected


ZEROS = torch.zeros(3).long()
REFUSED = [
    (torch.rand(3, 4), None, "references is None; expected .*: give both"),
    (None, ZEROS, "predictions is None; expected .*: give both"),
    (ZEROS, ZEROS, r"predictions is \(3,\) torch.int64; expected float logits .* or token .*: pass what the model"),
    (torch.zeros(3, 4).long(), ZEROS, r"predictions is \(3, 4\) torch.int64; expected float logits"),
    (torch.zeros(3, 1), ZEROS, "expected float logits .* at least 2 classes"),
    (torch.rand(3, 4), ZEROS[:2], r"references is \(2,\) for predictions \(3, 4\); expected \(3,\)"),
    (torch.rand(3, 2, 4), ZEROS, r"references is \(3,\) for predictions \(3, 2, 4\); expected \(3, 2\)"),
    (torch.rand(2), ZEROS, r"predictions is \(2,\) for references \(3,\); expected .* \(3,\), or .*: give one value"),
    (torch.rand(6, 4), torch.zeros(2, 3).long(), r"predictions is \(6, 4\) for references \(2, 3\); .*reshape both"),
    (torch.tensor(2.0), ZEROS, r"predictions is \(\) for references \(3,\); .*reduction='none'"),
    (torch.rand(3, 4), torch.zeros(3), "references is torch.float32; expected integers"),
    (torch.rand(3), torch.zeros(3), "references is torch.float32; expected integers"),
    (torch.rand(3), ZEROS.bool(), "references is torch.bool; expected integers"),
    (torch.rand(3, 4), torch.tensor([0, 4, 1]), "references holds the label 4; expected 0 to 3 for 4 classes"),
    (torch.rand(3, 4), torch.tensor([0, -1, 1]), "references holds the label -1; expected 0 to 3"),
    (torch.rand(3), torch.tensor([0, -1, 1]), "references holds the label -1; expected 0 or more, or -100"),
    (torch.tensor([[0.0, float("nan"), 1.0]]), ZEROS[:1], "NaN or infinity in 1 of 1 counted rows; .*diverged"),
    (torch.tensor([[0.0, float("inf"), 1.0]]), ZEROS[:1], "NaN or infinity in 1 of 1"),
    (torch.tensor([[float("inf"), 0.0, 1.0]]), ZEROS[:1], "NaN or infinity in 1 of 1"),
    (torch.full((1, 2), float("-inf")), ZEROS[:1], "NaN or infinity in 1 of 1"),
    (torch.tensor([0.0, float("nan"), 1.0]), ZEROS, "NaN in 1 of 3 counted tokens; expected .*diverged"),
    (torch.tensor([1.0, -0.5, -2e-6]), ZEROS, r"predictions holds -0.5; expected .* in nats: pass -log p\(token\)"),
    (torch.tensor([1.0, 0.0, -2e-6]), ZEROS, "predictions holds -2e-06; expected"),
    (torch.tensor([1.0, float("-inf"), 1.0]), ZEROS, "predictions holds -inf; expected"),
]


@pytest.mark.parametrize(("predictions", "references", "message"), REFUSED)
def test_refused(perplexity, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        perplexity.add_batch(predictions=predictions, references=references)
    assert len(perplexity) == 0
    # Nothing of the batch is left in the sums either.
    assert perplexity.compute(predictions=[1.0], references=[0])["nll"] == 1.0


@pytest.mark.parametrize("classes", [2, 3, 17, 1000])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_broken_logits_are_seen_wherever_they_are(perplexity, classes, value, dtype):
    for place in {0, 1, classes // 2, classes - 1}:
        logits = torch.zeros(2 * ROWS, classes, dtype=dtype)
        logits[ROWS + 1, place] = value
        for label in (0, classes - 1):
            with pytest.raises(ValueError, match=f"NaN or infinity in 1 of {2 * ROWS} counted rows"):
                perplexity.add_batch(predictions=logits, references=torch.full((2 * ROWS,), label))


def test_refused_otherwise(perplexity):
    with pytest.raises(ValueError, match="no item to compute perplexity of: nothing was added"):
        perplexity.compute()
    for predictions in (torch.rand(2, 3), torch.rand(2)):
        with pytest.raises(ValueError, match="no item to compute .* every reference is -100"):
            perplexity.compute(predictions=predictions, references=torch.tensor([-100, -100]))
    with pytest.raises(ValueError, match="no item to compute"):
        perplexity.compute(predictions=torch.zeros(0, 3), references=ZEROS[:0])
    perplexity.reset()
    perplexity.add_batch(predictions=torch.rand(2, 3), references=torch.tensor([0, 1]))
    perplexity.add_batch(predictions=torch.rand(2), references=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="predictions have 4 classes and the batches before had 3"):
        perplexity.add_batch(predictions=torch.rand(2, 4), references=torch.tensor([0, 1]))
    assert len(perplexity) == 4
    with pytest.raises(ValueError, match=r"unexpected inputs \['model_id'\]; expected predictions and references"):
        perplexity.compute(predictions=torch.rand(2), references=torch.tensor([0, 1]), model_id="gpt2")
