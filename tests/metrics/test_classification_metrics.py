"""The compute_metrics of Trainer: all values at the end, from sums kept batch by batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

import born_again.metrics
from born_again.metrics import classification_metrics
from born_again.metrics.accuracy import Accuracy
from born_again.metrics.calibration import Calibration

CLASSES = 8


def some_items(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, CLASSES, generator=generator), torch.randint(0, CLASSES, (count,), generator=generator)


def expected_values(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    values = Accuracy().compute(predictions=logits, references=labels)
    return {**values, **Calibration().compute(predictions=logits, references=labels)}


def test_batches_then_values_then_anew():
    logits, labels = some_items(30)
    compute_metrics = classification_metrics()
    for _ in range(2):
        assert compute_metrics(EvalPrediction(logits[:16], labels[:16]), compute_result=False) == {}
        values = compute_metrics(EvalPrediction((logits[16:], None), (labels[16:],)), compute_result=True)
        assert values == pytest.approx(expected_values(logits, labels), rel=1e-12)
    assert set(values) == {"accuracy", "error", "top5_accuracy", "nll", "ece"}
    assert compute_metrics(EvalPrediction(logits.numpy(), labels.numpy())) == pytest.approx(values, rel=1e-12)


def test_an_evaluation_that_failed_leaves_nothing_behind():
    logits, labels = some_items(10)
    compute_metrics = classification_metrics()
    compute_metrics(EvalPrediction(logits, 0 * labels), compute_result=False)
    with pytest.raises(ValueError, match="NaN"):
        compute_metrics(EvalPrediction(logits * float("nan"), labels), compute_result=False)
    assert compute_metrics(EvalPrediction(logits, labels)) == pytest.approx(expected_values(logits, labels), rel=1e-12)
    compute_metrics(EvalPrediction(logits, 0 * labels), compute_result=False)
    compute_metrics.reset()
    assert compute_metrics(EvalPrediction(logits, labels)) == pytest.approx(expected_values(logits, labels), rel=1e-12)


class Passing(nn.Module):
    """Answers with its input, so that the logits of an evaluation are known."""

    def __init__(self, extra: bool):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.extra = extra

    def forward(self, scores, labels=None):
        outputs = {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}
        return {**outputs, "features": scores[:, :2]} if self.extra else outputs


@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_trainer_evaluates_with_a_ragged_last_batch(tmp_path, by_batch, extra):
    logits, labels = some_items(29)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=8,
        batch_eval_metrics=by_batch,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        Passing(extra),
        arguments,
        eval_dataset=[{"scores": score, "labels": label} for score, label in zip(logits, labels, strict=True)],
        compute_metrics=classification_metrics(),
    )
    for _ in range(2):
        metrics = trainer.evaluate()
        for name, value in expected_values(logits, labels).items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-12)
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_importing_the_package_does_not_import_evaluate():
    code = "import sys, born_again.metrics; print('evaluate' in sys.modules)"
    root = Path(born_again.metrics.__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert ran.stdout.split() == ["False"]
