"""Students that are clearly worse than their teacher: named, with the likely reason and a remedy.

Images: the test accuracy is lower by more than two standard errors of the test split, sqrt(p (1 - p) / n), the larger
of the two networks'. Text: the test perplexity is more than 1 % higher, about what another seed changes, and where the
predictions of both networks are kept, by more than two standard errors of the difference; without them more than 2 %.
torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from born_again.lineage.predictions import (
    PREDICTIONS_NAME,
    Predictions,
    are_of_same_split,
    predictions_by_split,
    read_predictions,
)

_ERRORS = 2
# Relative to the teacher's perplexity.
_MARGIN, _MARGIN_ALONE = 0.01, 0.02
# As in born_again.training.teacher_accuracy and born_again.objectives, which import torch.
_FITTED_ACCURACY = 0.98
_WITH_LABELS = ("ban+l", "cwtm")
_FIT_GAP = 0.02  # in training accuracy, from which a student is said to have learned less of it than its teacher


def nll_difference(student: Predictions, teacher: Predictions) -> dict[str, float] | None:
    """The mean difference in negative log-likelihood of two networks on the same text, and its standard error.

    Args:
        student: predictions of a text, nll_sum (nats) and tokens (blocks,) each.
        teacher: of the same blocks.

    Returns:
        {"mean", "standard_error"} in nats per token, above 0 where the student is worse; None for other blocks, or
        fewer than two.
    """
    if "tokens" not in student or not are_of_same_split(student, teacher):
        return None
    blocks, tokens = len(student["tokens"]), student["tokens"].astype(np.float64)
    if blocks < 2:
        return None
    differences = student["nll_sum"] - teacher["nll_sum"]
    mean = differences.sum() / tokens.sum()
    # Of a ratio of sums over blocks (Cochran 1977, Sampling Techniques, section 2.11).
    squares = np.square(differences - mean * tokens).sum() * blocks / (blocks - 1)
    found = {"mean": float(mean), "standard_error": float(math.sqrt(squares) / tokens.sum())}
    return found if all(map(math.isfinite, found.values())) else None


def nll_difference_from(
    teacher: Mapping[str, Any], output_dir: Path, metrics: Mapping[str, Mapping[str, float]]
) -> dict[str, float] | None:
    """`nll_difference` over a teacher on the test split; None where the predictions of one are not kept.

    Args:
        teacher: its record.
        output_dir: of the lineage.
        metrics: of the student by split, `SplitMetrics` where there are predictions.

    Raises:
        LineageError: the predictions of the teacher cannot be read.
    """
    path = output_dir / f"gen{teacher['index']}" / PREDICTIONS_NAME
    theirs = read_predictions(path, teacher["weights_sha256"]).get("test")
    ours = predictions_by_split(metrics).get("test")
    return None if ours is None or theirs is None else nll_difference(ours, theirs)


def is_clearly_worse(manifest: Mapping[str, Any], index: int) -> bool:
    """Whether a generation is clearly worse than its teacher, by the rule of this module."""
    return _drop(manifest, index) is not None


def worse_than_teacher(manifest: Mapping[str, Any], index: int) -> list[str]:
    """Sentences on a generation that is clearly worse than its teacher: by how much, the likely reason, a remedy.

    Args:
        manifest: the content of lineage.json.
        index: of a finished generation.

    Returns:
        Empty where it is not, where it has no teacher, or where that cannot be said of what was measured.
    """
    drop = _drop(manifest, index)
    return [] if drop is None else [drop, *_reasons(manifest, manifest["generations"][index])]


def _drop(manifest: Mapping[str, Any], index: int) -> str | None:
    record = manifest["generations"][index]
    if record.get("parent") is None:
        return None
    ours, theirs = (
        (own.get("metrics") or {}).get("test") or {} for own in (record, manifest["generations"][record["parent"]])
    )
    begin = f"Generation {index} is clearly worse than its teacher:"
    if "perplexity" in ours and "perplexity" in theirs:
        unit = "word" if "unit" not in (manifest.get("data") or {}) else "token"
        return _drop_of_text(begin, ours["perplexity"], theirs["perplexity"], record.get("nll_difference"), unit)
    data = manifest.get("data") or {}
    items = (data.get("rows") or {}).get("test")
    return _drop_of_accuracy(begin, ours.get("accuracy"), theirs.get("accuracy"), items, data.get("unit", "images"))


def _drop_of_accuracy(begin: str, ours: float | None, theirs: float | None, items: Any, unit: str) -> str | None:
    if ours is None or theirs is None or type(items) is not int or items < 1:
        return None
    error = max(math.sqrt(max(p * (1 - p), 0) / items) for p in (ours, theirs))
    if theirs - ours <= _ERRORS * error:
        return None
    return (
        f"{begin} test accuracy {ours:.2%} after {theirs:.2%}, and two standard errors of {items:,} test {unit} are "
        f"{100 * _ERRORS * error:.2f} points."
    )


def _drop_of_text(begin: str, ours: float | None, theirs: float | None, difference: Any, unit: str) -> str | None:
    ours, theirs = (math.inf if value is None else value for value in (ours, theirs))  # JSON has no infinity
    if not math.isfinite(theirs) or ours <= theirs * (1 + (_MARGIN if difference else _MARGIN_ALONE)):
        return None
    by_how_much = f"{begin} test perplexity {ours:.2f} after {theirs:.2f}"
    if not difference:
        return f"{by_how_much}, more than {_MARGIN_ALONE:.0%} higher."
    mean, error = difference["mean"], difference["standard_error"]
    if mean <= _ERRORS * error:
        return None
    return f"{by_how_much}, {mean:.4f} nats per {unit} more, of which two standard errors are {_ERRORS * error:.4f}."


def _reasons(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    objective, training = record["objective"], manifest["spec"].get("training") or {}
    reads_labels = objective in _WITH_LABELS or (objective == "ban" and bool(training.get("teacher_annealing")))
    is_built_in = objective in ("ban", "dkpp", *_WITH_LABELS)
    teacher, student = (record.get(name) or {} for name in ("teacher_fit", "train_fit"))
    theirs, ours, steps = teacher.get("accuracy"), student.get("accuracy"), record.get("steps")
    reasons = []
    if theirs is not None and theirs < _FITTED_ACCURACY and is_built_in and not reads_labels:
        reasons.append(
            f"the teacher is right on {theirs:.1%} of a sample of its training set, and objective "
            f"{objective!r} has no term with the labels to correct it; train the teacher longer (num_train_epochs), "
            "or use objective 'ban+l'."
        )
    if ours is not None and theirs is not None and ours < theirs - _FIT_GAP:
        reasons.append(
            f"after {steps or 'its'} steps the student is right on {ours:.1%} of a sample of the "
            f"training set, its teacher on {theirs:.1%}; train longer (num_train_epochs)"
            + ("." if reads_labels or not is_built_in else ", or use objective 'ban+l'.")
        )
    if "perplexity" in teacher and is_built_in and not reads_labels:
        reasons.append(
            f"objective {objective!r} has no term with the labels; in the paper only 'ban+l' worked "
            "for language models; use it."
        )
    if not reasons and objective == "dkpp":
        reasons.append(
            "'dkpp' permutes what the teacher knows of the other classes; it is an ablation of the "
            "paper; use objective 'ban' or 'ban+l'."
        )
    if reasons:
        return [f"{'And' if number else 'Likely reason'}: {reason}" for number, reason in enumerate(reasons)]
    return [
        f"What was recorded shows no reason ({steps or 'unknown'} steps, objective {objective!r}); another seed tells "
        "whether it is chance, and longer training or another objective whether it can be mended."
    ]
