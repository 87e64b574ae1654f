"""Pictures drawn by matplotlib: the training curve of a generation, and the comparison of lineages.

matplotlib is imported when something is drawn, and not before.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from born_again._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[int, float]]

# Distinguishable with red-green colour blindness (after Okabe and Ito), each with a contrast of at least 3 to white
# and to the dark background of GitHub; the ink has 4 to both. The background of the picture is transparent.
COLORS = ("#0a7ec2", "#d55e00", "#009e73", "#c26a9d", "#a37800")
INK = "#767c83"
STYLE = {
    "figure.figsize": (8, 4),  # inches
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "savefig.transparent": True,
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # names of splits may contain $
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "agg.path.chunksize": 20_000,
    "svg.hashsalt": "born-again",
}
# With what is left out of the file, so that equal figures have equal bytes.
_FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
_LARGEST = 1e30  # larger values would hide all others
_LOG_FROM = 50  # ratio of largest to smallest loss


@contextlib.contextmanager
def house_style(**settings: Any) -> Iterator[None]:
    """`STYLE` with some other settings, from matplotlib's defaults; the user's style is restored afterwards."""
    from matplotlib import style

    with style.context({**STYLE, **settings}, after_reset=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing glyphs
        yield


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws the training loss and the evaluation losses over the steps of a training.

    An evaluation with a perplexity but no loss is drawn as the logarithm of the perplexity, its loss in nats. Values
    that are not finite leave a gap; if a step was logged twice the last value counts. The same history gives the same
    bytes with the same version of matplotlib, whatever its style settings.

    Args:
        history: `trainer.state.log_history`: entries with "step" and "loss", "eval_loss", "eval_SPLIT_loss", and the
            same with perplexity.
        path: of the PNG; written atomically, its folder made if needed.

    Returns:
        Whether there was anything to draw; otherwise nothing is written.

    Raises:
        OSError: the file cannot be written; an older one is intact.
    """
    shown = {name: points for name, points in _series(history).items() if any(map(_is_finite, points))}
    if not shown:
        return False
    write_atomically(path, _png(shown))
    return True


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Values by step of the training loss and of each evaluation, in order of steps; nan if not finite."""
    found: dict[str, dict[int, float]] = {}
    for entry in history:
        step = entry.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            continue
        for key, value in entry.items():
            name = _name(key)
            if name is None or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if key.endswith("perplexity"):
                if key.removesuffix("perplexity") + "loss" in entry:
                    continue
                value = math.log(value) if 0 < value < math.inf else math.nan
            found.setdefault(name, {})[step] = float(value) if abs(value) <= _LARGEST else math.nan
    names = sorted(found, key=lambda name: (name != "training", name))[: len(COLORS)]
    return {name: sorted(found[name].items()) for name in names}


def _name(key: str) -> str | None:
    """loss -> training, eval_loss -> evaluation, eval_test_loss -> evaluation: test; None for what is not drawn."""
    if key == "loss":
        return "training"
    head, _, metric = key.rpartition("_")
    if metric not in ("loss", "perplexity") or not head.startswith("eval"):
        return None
    split = "".join(char if char.isprintable() else " " for char in head.removeprefix("eval").removeprefix("_"))
    return f"evaluation: {split[:20]}" if split else "evaluation"


def _is_finite(point: tuple[int, float]) -> bool:
    return math.isfinite(point[1])


def _png(series: Mapping[str, Points]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = BytesIO()
    with house_style():
        figure = Figure()
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for (name, points), color in zip(series.items(), COLORS, strict=False):
            _line(axes, name, points, color)
        _scales(axes, [value for points in series.values() for _, value in points if math.isfinite(value)])
        figure.legend(loc="outside upper left", ncols=3 if len(series) < 4 else 2)
        # Without the version of matplotlib.
        figure.savefig(content, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return content.getvalue()


def _line(axes: Axes, name: str, points: Points, color: str) -> None:
    finite = [False, *map(_is_finite, points), False]
    # A point between two gaps has no line, so it gets a marker.
    alone = [
        here and not (before or after) for before, here, after in zip(finite, finite[1:], finite[2:], strict=False)
    ]
    marked = [True] * len(points) if name != "training" and len(points) <= 40 else alone
    marker = "o" if any(marked) else ""
    axes.plot(*zip(*points, strict=True), label=name, color=color, marker=marker, markevery=marked)


def _scales(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    ratio = max(values) / min(values) if min(values) > 0 else 0
    axes.set_ylabel("loss (logarithmic)" if ratio >= _LOG_FROM else "loss")
    if ratio >= _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1e3 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")


# ---- The comparison of lineages ----


def draw_comparison(comparison: Mapping[str, Any], path: Path) -> bool:
    """Draws the differences of the first metric with their intervals, a line for each row; the means where none are.

    A small dot is a run. The thick line is the 95 % interval over runs, the thin one that over test items.

    Args:
        comparison: as `born_again.report.comparison.compare_lineages` returns it.
        path: ends in .png, .svg or .pdf, which is its format; written atomically.

    Returns:
        Whether there was anything to draw; otherwise nothing is written.

    Raises:
        ValueError: see `figure_format`.
        OSError: the file cannot be written; an older one is intact.
    """
    form = figure_format(path)
    if not comparison["metrics"]:
        return False
    metric = comparison["metrics"][0]
    rows = [(row, row["metrics"][metric["title"]]) for row in comparison["rows"]]
    is_difference = any(own["difference"] for _, own in rows)
    shown = [(row, own["difference"] if is_difference else own) for row, own in rows]
    shown = [(row, own) for row, own in shown if own and own["mean"] is not None]
    if not shown:
        return False
    unit = (
        " in points" if metric["factor"] == 100 and is_difference else " in percent" if metric["factor"] == 100 else ""
    )
    better = "higher" if metric["is_higher_better"] else "lower"
    title = f"{metric['title']}{unit}, {better} is better"
    if is_difference:
        title += f"; difference from {comparison['against']}"
    write_atomically(path, _comparison_figure(shown, metric["factor"], title, is_difference, form))
    return True


def figure_format(path: str | Path) -> str:
    """The format of a figure by the end of its path: "png", "svg" or "pdf".

    Raises:
        ValueError: another one.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in _FORMATS:
        raise ValueError(
            f"figure: got {str(path)!r}, expected a file that ends in {', '.join(f'.{own}' for own in _FORMATS)}; "
            "rename it."
        )
    return form


def _comparison_figure(
    shown: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    factor: float,
    title: str,
    is_difference: bool,
    form: str,
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = BytesIO()
    label = textwrap.wrap(title, 90)
    if is_difference:
        label.append("thick: 95 % over runs; thin: 95 % over test items; small dots: single runs")
    height = 1.0 + 0.35 * len(shown) + 0.2 * len(label)  # inches
    with house_style():
        figure = Figure(figsize=(8, height))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(False)
        axes.grid(axis="x")
        for place, (_, own) in enumerate(shown):
            for kind, width, below in (("items", 1, 0.2), ("t", 3, 0)):  # the narrower one would be hidden
                if own.get(kind):
                    ends = [factor * end for end in own[kind]]
                    axes.plot(ends, [place + below] * 2, color=COLORS[0], linewidth=width)
            values = [factor * value for value in own["values"] if value is not None]
            axes.plot(values, [place] * len(values), "o", color=INK, markersize=3)
            axes.plot([factor * own["mean"]], [place], "o", color=COLORS[0], markersize=8)
        if is_difference:
            axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(shown)), [f"{row['experiment']}: {row['network']}" for row, _ in shown])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(shown) - 0.5, -0.5)  # the first row on top
        axes.set_xlabel("\n".join(label))
        options: dict[str, Any] = {"pil_kwargs": {"optimize": True}} if form == "png" else {}
        figure.savefig(content, format=form, metadata=_FORMATS[form], **options)
    return content.getvalue()
