"""The comparison of lineages as a Markdown table and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

# Differences of these are shown in the Markdown table; CSV and JSON have all.
_SHOWN_DIFFERENCES = 2


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """A Markdown table, a line for each row, and below it what the columns are and the notes.

    Args:
        comparison: as `born_again.report.comparison.compare_lineages` returns it.
    """
    metrics = comparison["metrics"]
    test = [metric for metric in metrics if metric["split"] == "test"][:_SHOWN_DIFFERENCES]
    header = ["trained by", "network", "runs", *(metric["title"] for metric in metrics), "seconds"]
    for metric in test:
        header += [f"{metric['title']} - reference", "95 % over runs", "95 % over items"]
    lines = [header]
    for row in comparison["rows"]:
        cells = [row["experiment"], row["network"], str(row["runs"])]
        cells += [_mean(row["metrics"][metric["title"]], metric) for metric in metrics]
        cells.append("" if row["seconds"] is None else f"{row['seconds']:.0f}")
        for metric in test:
            difference = row["metrics"][metric["title"]]["difference"] or {}
            cells.append("" if not difference else f"{_signed(difference['mean'], metric)}{_pairs(difference, row)}")
            cells += [_interval(difference.get(kind), metric) for kind in ("t", "items")]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*table, "", *legend(comparison)])


def legend(comparison: Mapping[str, Any]) -> list[str]:
    """What the columns are, and the notes, a sentence or two a line."""
    rows = comparison["data"]
    is_text = any(metric["name"] == "perplexity" for metric in comparison["metrics"])
    counts = ", ".join(f"{count:,} in {split}" for split, count in rows.items()) if isinstance(rows, dict) else ""
    counts = f"; {'tokens' if is_text else 'items'}: {counts}" if counts else ""
    resampled = "blocks of consecutive tokens" if is_text else "the items"
    percent = [metric["title"] for metric in comparison["metrics"] if metric["factor"] == 100]
    lines = [
        f"Mean ± sample standard deviation over runs{counts}. NLL is in nats, seconds "
        f"are of the training. The reference is {comparison['against']}; differences are paired by seed."
    ]
    if percent:
        lines.append(f"{', '.join(percent)} in percent, their differences in points.")
    lines.append(
        f"95 % over runs: Student's t of the paired differences. 95 % over items: bootstrap over {resampled} of the "
        "test split, for these networks; empty where their predictions were not kept."
    )
    return [*lines, *comparison["notes"]]


def comparison_csv(comparison: Mapping[str, Any]) -> str:
    """A CSV table: a line for each row, columns for every number of every metric, unscaled."""
    numbers = ("mean", "deviation", "difference", "pairs", "t_low", "t_high", "items_low", "items_high")
    titles = [metric["title"] for metric in comparison["metrics"]]
    columns = [f"{title} {number}" for title in titles for number in numbers]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trained by", "network", "runs", "seeds", "seconds", *columns])
    for row in comparison["rows"]:
        cells: list[Any] = []
        for title in titles:
            own = row["metrics"][title]
            difference = own["difference"] or {}
            cells += [own["mean"], own["deviation"], difference.get("mean"), difference.get("runs")]
            cells += [*(difference.get("t") or (None, None)), *(difference.get("items") or (None, None))]
        seeds = " ".join(map(str, row["seeds"]))
        writer.writerow([row["experiment"], row["network"], row["runs"], seeds, row["seconds"], *cells])
    return text.getvalue()


def _mean(values: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    if values["mean"] is None:
        return ""
    shown = f"{metric['factor'] * values['mean']:.{metric['decimals']}f}"
    if values["deviation"] is None:
        return shown
    return f"{shown} ± {metric['factor'] * values['deviation']:.{metric['decimals']}f}"


def _signed(value: float, metric: Mapping[str, Any]) -> str:
    return f"{metric['factor'] * value:+.{metric['decimals']}f}"


def _pairs(difference: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The number of pairs, where not every run has a reference."""
    count = difference["runs"]
    return "" if count == row["runs"] else f" ({count} pair{'s' if count > 1 else ''})"


def _interval(interval: Sequence[float] | None, metric: Mapping[str, Any]) -> str:
    return "" if interval is None else f"[{_signed(interval[0], metric)}, {_signed(interval[1], metric)}]"
