"""The table of a lineage, read from its manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Metrics = Mapping[str, Mapping[str, float]]


def _number(values: Mapping[str, float | None], name: str) -> float:
    """JSON has no infinity: a manifest holds null for it."""
    return math.inf if values[name] is None else values[name]


# Column -> what it shows of a record's metrics by split.
_IMAGES: dict[str, Callable[[Metrics], str]] = {
    "accuracy": lambda metrics: f"{100 * metrics['test']['accuracy']:.2f}",
    "error": lambda metrics: f"{100 * metrics['test']['error']:.2f}",
    "NLL": lambda metrics: f"{metrics['test']['nll']:.4f}",
    "ECE": lambda metrics: f"{100 * metrics['test']['ece']:.2f}",
}
_TEXT: dict[str, Callable[[Metrics], str]] = {
    "valid. ppl": lambda metrics: f"{_number(metrics['validation'], 'perplexity'):.2f}",
    "test ppl": lambda metrics: f"{_number(metrics['test'], 'perplexity'):.2f}",
    "test NLL": lambda metrics: f"{_number(metrics['test'], 'nll'):.4f}",
}


def results_table(manifest: Mapping[str, Any]) -> str:
    """A Markdown table, a line for each finished generation.

    Images: accuracy, error and calibration error are in percent, NLL in nats per item, and the gain is in percentage
    points of accuracy over the generation's own teacher. Text: perplexities are per word, NLL in nats per word, and
    the gain is by how much the test perplexity fell below the teacher's. Seconds are of training.

    Args:
        manifest: the content of lineage.json.
    """
    finished = [record for record in manifest["generations"] if record["status"] == "finished"]
    is_text = any("perplexity" in values for record in finished for values in record["metrics"].values())
    columns = _TEXT if is_text else _IMAGES
    rows = [("generation", "objective", "seed", *columns, "seconds", "gain")]
    scores: dict[int, float] = {}
    for record in finished:
        test = record["metrics"]["test"]
        scores[record["index"]] = -_number(test, "perplexity") if is_text else 100 * test["accuracy"]
        teacher = scores.get(record["parent"])
        rows.append(
            (
                f"{record['index']} (teacher)" if record["parent"] is None else str(record["index"]),
                record["objective"],
                str(record["seed"]),
                *(show(record["metrics"]) for show in columns.values()),
                f"{record['seconds']:.0f}",
                "" if teacher is None else f"{scores[record['index']] - teacher:+.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
