"""Negative log-likelihood and calibration error: equal to a slow twin, however they are fed."""

import math
from pathlib import Path

import evaluate
import pytest
import torch

import born_again.metrics.calibration as module
from born_again.metrics.calibration import BINS, Calibration


@pytest.fixture
def calibration(tmp_path):
    return Calibration(cache_dir=str(tmp_path / "metrics"))


def slow_calibration(logits, labels) -> dict[str, float]:
    """Equations 2 and 3 of Guo et al. (2017), item by item and bin by bin."""
    losses, confidences, hits = [], [], []
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        largest = max(row)
        weights = [math.exp(value - largest) for value in row]
        losses.append(largest + math.log(math.fsum(weights)) - row[label])
        confidences.append(1 / math.fsum(weights))
        hits.append(row.index(largest) == label)
    count = len(losses)
    ece = 0.0
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = [index for index, value in enumerate(confidences) if low < value <= high]
        if inside:
            accuracy = sum(hits[index] for index in inside) / len(inside)
            confidence = math.fsum(confidences[index] for index in inside) / len(inside)
            ece += len(inside) / count * abs(accuracy - confidence)
    return {"nll": math.fsum(losses) / count, "ece": ece}


def some_items(count: int = 307, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Scales from flat to sharp, so that every bin is visited.
    scale = torch.logspace(-1, 1.2, count).unsqueeze(1)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64) * scale
    guess = torch.randint(0, classes, (count,), generator=generator)
    labels = torch.where(torch.rand(count, generator=generator) < 0.6, logits.argmax(1), guess)
    labels[5::23] = -100
    return logits, labels


def test_equals_slow_twin_in_one_go_and_by_ragged_batches(calibration):
    logits, labels = some_items()
    expected = pytest.approx(slow_calibration(logits.tolist(), labels.tolist()), rel=1e-12, abs=1e-14)
    assert calibration.compute(predictions=logits, references=labels) == expected
    for part in (slice(0, 100), slice(100, 101), slice(101, 300), slice(300, 307)):
        calibration.add_batch(predictions=logits[part], references=labels[part])
    assert calibration.compute() == expected


def test_every_bin_is_visited(calibration):
    logits, labels = some_items()
    calibration.add_batch(predictions=logits, references=labels)
    assert int((calibration.confidence_sums > 0).sum()) >= 12


def test_known_values(calibration):
    # Four classes at equal logits: confidence 1/4, a quarter right, nll log 4.
    values = calibration.compute(predictions=torch.zeros(4, 4), references=torch.arange(4))
    assert values == pytest.approx({"nll": math.log(4), "ece": 0.0}, abs=1e-15)
    # Sure and always wrong.
    logits = torch.tensor([[1000.0, 0.0]] * 3)
    assert calibration.compute(predictions=logits, references=torch.tensor([1, 1, 1])) == {"nll": 1000.0, "ece": 1.0}
    # Over- and under-confidence in different bins do not cancel: confidences 0.9 (wrong) and 0.6 (right).
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64).log()
    values = calibration.compute(predictions=logits, references=torch.tensor([1, 0]))
    assert values["ece"] == pytest.approx((0.9 + 0.4) / 2, rel=1e-12)


def test_bins_are_open_below_and_closed_above(calibration):
    # A confidence of exactly 1 belongs to the last bin, one just above 14/15 too.
    for confidence, number in ((1.0, 14), (14.01 / 15, 14), (13.99 / 15, 13), (0.5, 7)):
        logits = torch.tensor([[confidence, 1 - confidence]], dtype=torch.float64).log()
        calibration.add_batch(predictions=logits, references=torch.tensor([0]))
        assert calibration.correct_sums[number] == 1, confidence
        calibration.reset()


def test_compute_starts_anew(calibration):
    logits, labels = some_items(40)
    first = calibration.compute(predictions=logits, references=labels)
    assert calibration.compute(predictions=logits, references=labels) == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_widened_before_anything_else(calibration, dtype):
    logits, labels = some_items(50)
    rounded = logits.to(dtype)
    expected = pytest.approx(slow_calibration(rounded.double().tolist(), labels.tolist()), rel=1e-12)
    assert calibration.compute(predictions=rounded, references=labels) == expected
    if dtype != torch.bfloat16:
        assert calibration.compute(predictions=rounded.numpy(), references=labels.numpy()) == expected


def test_loads_from_its_path_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    loaded = evaluate.load(str(Path(module.__file__)), cache_dir=str(tmp_path / "cache"))
    logits, labels = some_items(20)
    expected = slow_calibration(logits.tolist(), labels.tolist())
    assert loaded.compute(predictions=logits, references=labels) == pytest.approx(expected, rel=1e-12)


def test_refused(calibration):
    with pytest.raises(ValueError, match="no item to compute calibration of"):
        calibration.compute()
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 counted rows"):
        calibration.compute(
            predictions=torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), references=torch.tensor([0, 1])
        )
    with pytest.raises(ValueError, match="references holds the label 2"):
        calibration.compute(predictions=torch.rand(1, 2), references=torch.tensor([2]))
