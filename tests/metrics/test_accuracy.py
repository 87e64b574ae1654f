"""Accuracy: equal to a slow twin, however it is fed, and nothing kept but sums."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import born_again.metrics.accuracy as module
from born_again.metrics.accuracy import Accuracy


@pytest.fixture
def accuracy(tmp_path):
    return Accuracy(cache_dir=str(tmp_path / "metrics"))


def slow_accuracy(logits, labels) -> dict[str, float]:
    """Sort the classes of each item by falling logit, equal ones by number, and look for the label."""
    first = top = count = 0
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        ranking = sorted(range(len(row)), key=lambda number: (-row[number], number))
        count += 1
        first += ranking[0] == label
        top += label in ranking[:5]
    return {"accuracy": first / count, "error": (count - first) / count, "top5_accuracy": top / count}


def some_items(count: int = 203, classes: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse logits, so that ties are common, labels that are often right, and some ignored items."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (count, classes), generator=generator).float()
    labels = torch.where(
        torch.rand(count, generator=generator) < 0.5,
        logits.argmax(1),
        torch.randint(0, classes, (count,), generator=generator),
    )
    labels[::17] = -100
    return logits, labels


def test_equals_slow_twin_in_one_go_and_by_ragged_batches(accuracy):
    logits, labels = some_items()
    expected = slow_accuracy(logits.tolist(), labels.tolist())
    assert accuracy.compute(predictions=logits, references=labels) == expected
    for part in (slice(0, 64), slice(64, 64), slice(64, 65), slice(65, 203)):
        accuracy.add_batch(predictions=logits[part], references=labels[part])
    assert len(accuracy) == int((labels != -100).sum())
    assert accuracy.compute() == expected


def test_compute_starts_anew(accuracy):
    right = {"predictions": torch.eye(3), "references": torch.arange(3)}
    wrong = {"predictions": torch.eye(3), "references": torch.tensor([1, 2, 0])}
    assert accuracy.compute(**right) == {"accuracy": 1.0, "error": 0.0}
    assert accuracy.compute(**wrong) == {"accuracy": 0.0, "error": 1.0}
    accuracy.add_batch(**wrong)
    accuracy.reset()
    assert accuracy.compute(**right)["accuracy"] == 1.0


def test_top5_is_left_out_where_it_is_always_one(accuracy):
    for classes in (2, 5):
        assert "top5_accuracy" not in accuracy.compute(
            predictions=torch.rand(4, classes), references=torch.zeros(4).long()
        )
    logits = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]] * 2)
    assert accuracy.compute(predictions=logits, references=torch.tensor([4, 5]))["top5_accuracy"] == 0.5


def test_a_constant_answer_does_not_score(accuracy):
    values = accuracy.compute(predictions=torch.zeros(10, 10), references=torch.arange(10))
    assert values == {"accuracy": 0.1, "error": 0.9, "top5_accuracy": 0.5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_dtypes_and_numpy(accuracy, dtype):
    logits, labels = some_items(50)
    expected = slow_accuracy(logits.tolist(), labels.tolist())
    assert (
        accuracy.compute(predictions=logits.to(dtype, copy=True).requires_grad_(), references=labels.int()) == expected
    )
    assert accuracy.compute(predictions=logits.numpy().astype(np.float16), references=labels.numpy()) == expected
    assert accuracy.compute(predictions=logits.tolist(), references=labels.tolist()) == expected


def test_more_dimensions_are_items(accuracy):
    logits, labels = some_items(60)
    expected = accuracy.compute(predictions=logits, references=labels)
    assert accuracy.compute(predictions=logits.view(12, 5, 11), references=labels.view(12, 5)) == expected


def test_add_takes_one_item(accuracy):
    accuracy.add(prediction=[0.0, 1.0], reference=1)
    accuracy.add(prediction=torch.tensor([0.0, 1.0]), reference=torch.tensor(0))
    assert accuracy.compute() == {"accuracy": 0.5, "error": 0.5}
    with pytest.raises(ValueError, match="prediction or reference is None"):
        accuracy.add(prediction=[0.0, 1.0])


def test_loads_from_its_path_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    loaded = evaluate.load(str(Path(module.__file__)), cache_dir=str(tmp_path / "cache"))
    logits, labels = some_items(20)
    assert loaded.compute(predictions=logits, references=labels) == slow_accuracy(logits.tolist(), labels.tolist())
    assert set(loaded.features) == {"predictions", "references"}


def test_nothing_is_written(accuracy, tmp_path):
    logits, labels = some_items()
    accuracy.add_batch(predictions=logits, references=labels)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    kept = [value for value in vars(accuracy).values() if isinstance(value, torch.Tensor | np.ndarray)]
    assert sum(value.size if isinstance(value, np.ndarray) else value.numel() for value in kept) < 100


REFUSED = [
    (torch.rand(3, 4), None, "references is None; expected"),
    (None, torch.zeros(3).long(), "predictions is None; expected"),
    (torch.zeros(3).long(), torch.zeros(3).long(), r"predictions is \(3,\) torch.int64; expected float logits"),
    (torch.zeros(3, 1), torch.zeros(3).long(), "expected float logits .* at least 2 classes"),
    (torch.rand(3, 4), torch.zeros(2).long(), r"references is \(2,\) for predictions \(3, 4\); expected \(3,\)"),
    (torch.rand(3, 4), torch.zeros(3), "references is torch.float32; expected integers"),
    (torch.rand(3, 4), torch.tensor([0, 4, 1]), "references holds the label 4; expected 0 to 3 for 4 classes"),
    (torch.rand(3, 4), torch.tensor([0, -1, 1]), "references holds the label -1"),
    (torch.tensor([[0.0, float("nan")]]), torch.tensor([0]), "NaN or infinity in 1 of 1 counted rows; .*diverged"),
    (torch.tensor([[0.0, float("inf")]]), torch.tensor([0]), "NaN or infinity in 1 of 1"),
    (torch.full((1, 2), float("-inf")), torch.tensor([0]), "NaN or infinity in 1 of 1"),
]


@pytest.mark.parametrize(("predictions", "references", "message"), REFUSED)
def test_refused(accuracy, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        accuracy.add_batch(predictions=predictions, references=references)
    assert len(accuracy) == 0


def test_refused_otherwise(accuracy, tmp_path):
    with pytest.raises(ValueError, match="no item to compute accuracy of: nothing was added"):
        accuracy.compute()
    with pytest.raises(ValueError, match="no item to compute .* every reference is -100"):
        accuracy.compute(predictions=torch.rand(2, 3), references=torch.tensor([-100, -100]))
    accuracy.reset()
    accuracy.add_batch(predictions=torch.rand(2, 3), references=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="predictions have 4 classes and the batches before had 3"):
        accuracy.add_batch(predictions=torch.rand(2, 4), references=torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"unexpected inputs \['normalize'\]; expected predictions and references only"
    ):
        accuracy.compute(predictions=torch.rand(2, 3), references=torch.tensor([0, 1]), normalize=True)
    with pytest.raises(ValueError, match="num_process is 2; expected 1.*gather"):
        Accuracy(num_process=2, process_id=0, cache_dir=str(tmp_path))


def test_nan_of_an_ignored_item_does_not_matter(accuracy):
    logits = torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])
    assert accuracy.compute(predictions=logits, references=torch.tensor([-100, 1]))["accuracy"] == 1.0
