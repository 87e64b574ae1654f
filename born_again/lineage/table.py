"""The table of a lineage, read from its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from born_again.lineage.spec import EXTERNAL

Metrics = Mapping[str, Mapping[str, float | None]]

# Column -> split, metric, factor and format of what it shows of a record's metrics; empty where it was not measured.
_IMAGES = {
    "accuracy": ("test", "accuracy", 100, ".2f"),
    "error": ("test", "error", 100, ".2f"),
    "NLL": ("test", "nll", 1, ".4f"),
    "ECE": ("test", "ece", 100, ".2f"),
}
_TEXT = {
    "valid. ppl": ("validation", "perplexity", 1, ".2f"),
    "test ppl": ("test", "perplexity", 1, ".2f"),
    "test NLL": ("test", "nll", 1, ".4f"),
}
_UNBOUNDED = ("nll", "perplexity")


def results_table(manifest: Mapping[str, Any]) -> str:
    """A Markdown table, a line for each finished generation.

    Images: accuracy, error and calibration error are in percent, NLL in nats per item, and the gain is in percentage
    points of accuracy over the generation's own teacher. Text: perplexities are per word, NLL in nats per word, and
    the gain is by how much the test perplexity fell below the teacher's. Seconds are of training. Measured ensembles
    follow, their gain being over the newest of their members. What was not measured is an empty cell.

    Args:
        manifest: the content of lineage.json.
    """
    finished = [record for record in manifest["generations"] if record["status"] == "finished"]
    is_text = any("perplexity" in values for record in finished for values in record["metrics"].values())
    columns = _TEXT if is_text else _IMAGES
    rows = [("generation", "objective", "seed", *columns, "seconds", "gain")]
    scores: dict[int | None, float | None] = {}
    for record in finished:
        score = scores[record["index"]] = _score(record["metrics"])
        rows.append(
            (
                f"{record['index']} (teacher)" if record["parent"] is None else str(record["index"]),
                record["objective"],
                "" if record["seed"] is None else str(record["seed"]),
                *_cells(record["metrics"], columns),
                "" if record["objective"] == EXTERNAL else f"{record['seconds']:.0f}",
                _gain(score, scores.get(record["parent"])),
            )
        )
    for ensemble in manifest.get("ensembles", []):
        if not ensemble["metrics"]:
            continue
        rows.append(
            (
                f"mean of {', '.join(map(str, ensemble['members']))}",
                "ensemble",
                "",
                *_cells(ensemble["metrics"], columns),
                "",
                _gain(_score(ensemble["metrics"]), scores.get(ensemble["members"][-1])),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cells(metrics: Metrics, columns: Mapping[str, tuple[str, str, int, str]]) -> list[str]:
    values = [(_number(metrics, split, name), factor, form) for split, name, factor, form in columns.values()]
    return ["" if value is None else f"{factor * value:{form}}" for value, factor, form in values]


def _number(metrics: Metrics, split: str, name: str) -> float | None:
    """None where it was not measured; JSON has no infinity: a manifest holds null for it."""
    values = metrics.get(split, {})
    value = values.get(name)
    return math.inf if value is None and name in values and name in _UNBOUNDED else value


def _score(metrics: Metrics) -> float | None:
    """What is higher for the better of two generations."""
    perplexity, accuracy = _number(metrics, "test", "perplexity"), _number(metrics, "test", "accuracy")
    if perplexity is not None:
        return -perplexity
    return None if accuracy is None else 100 * accuracy


def _gain(score: float | None, teacher: float | None) -> str:
    if score is None or teacher is None or math.isnan(score - teacher):  # nan: neither is finite
        return ""
    return f"{score - teacher:+.2f}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
