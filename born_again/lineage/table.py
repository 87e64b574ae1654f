"""The table of a lineage, read from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COLUMNS = ("generation", "objective", "seed", "accuracy", "error", "NLL", "ECE", "seconds", "gain")


def results_table(manifest: Mapping[str, Any], split: str = "test") -> str:
    """A Markdown table, a line for each finished generation.

    Accuracy, error and calibration error are in percent, NLL in nats per item, seconds are of training, and the gain
    is in percentage points of accuracy over the generation's own teacher.

    Args:
        manifest: the content of lineage.json.
        split: whose metrics are shown.
    """
    rows = [_COLUMNS]
    accuracies: dict[int, float] = {}
    for record in manifest["generations"]:
        if record["status"] != "finished":
            continue
        metrics = record["metrics"][split]
        accuracies[record["index"]] = metrics["accuracy"]
        teacher = accuracies.get(record["parent"])
        rows.append(
            (
                f"{record['index']} (teacher)" if record["parent"] is None else str(record["index"]),
                record["objective"],
                str(record["seed"]),
                f"{100 * metrics['accuracy']:.2f}",
                f"{100 * metrics['error']:.2f}",
                f"{metrics['nll']:.4f}",
                f"{100 * metrics['ece']:.2f}",
                f"{record['seconds']:.0f}",
                "" if teacher is None else f"{100 * (metrics['accuracy'] - teacher):+.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
