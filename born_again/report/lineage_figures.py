"""The figures of a lineage's report: as SVG for its page, in one picture as PNG.

They have the style of `born_again.report.figures`. In the SVG texts stay texts, and what has the colour of the ink has
that of the page's text, so that it is legible on light and dark pages. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from born_again.lineage.plain_text import local_name, one_line
from born_again.report.figures import COLORS, INK, house_style
from born_again.report.lineage import LineageFacts, Network, changes, class_scores, right, shown_classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches; a phone shows a narrow figure at about its own size.
NARROW, WIDE = 4.4, 9.2
_SMALL = {"font.size": 9, "lines.linewidth": 1.6, "lines.markersize": 4, "axes.linewidth": 0.8}
_LINES = ("-", "--", ":", "-.")
MOST_CURVES, MOST_PANELS, MOST_CLASSES = 10, 8, 20
_BINS = 10
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def svg(draw: Callable[[], Figure | None], name: str) -> str | None:
    """A figure as an SVG element for a page of HTML.

    Args:
        draw: makes the figure, or None where there is nothing to draw.
        name: letters that begin every id in it, another one for each figure of a page.

    Returns:
        The element, without a prolog, metadata or size; the page gives it its role and label.
    """
    with house_style(**_SMALL, **{"svg.fonttype": "none", "figure.constrained_layout.use": False}):
        figure = draw()
        if figure is None:
            return None
        content = StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return _inlined(content.getvalue(), name)


def _inlined(content: str, name: str) -> str:
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(content)
    for element in list(root):
        if element.tag == f"{{{_SVG}}}metadata":
            root.remove(element)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            value = value.replace("url(#", f"url(#{name}-")
            # The page's font: nothing is measured after drawing, and its own may not be there.
            value = re.sub(r"'DejaVu Sans'[^;]*", "system-ui, sans-serif", value) if key == "style" else value
            element.set(key, value.replace(INK, "currentColor"))
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    return ElementTree.tostring(root, encoding="unicode")


def picture(facts: LineageFacts) -> bytes | None:
    """The family tree, with the training curves and the calibration beside it, as PNG; None where nothing is known.

    The same lineage gives the same bytes with the same version of matplotlib.
    """
    with house_style(**_SMALL, **{"figure.constrained_layout.use": False}):
        figure = _draw_picture(facts)
        if figure is None:
            return None
        content = BytesIO()
        figure.savefig(content, format="png", dpi=140, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return content.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _place(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes at distances from the edges of the figure, in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )


def _look(place: int) -> dict[str, Any]:
    """Colour and line style of the place-th of several networks."""
    return {"color": COLORS[place % len(COLORS)], "linestyle": _LINES[place // len(COLORS) % len(_LINES)]}


def _some(networks: Sequence[Network], most: int) -> list[Network]:
    """The first and the last ones of too many."""
    return list(networks) if len(networks) <= most else [networks[0], *networks[1 - most :]]


def _by_rows(entries: Sequence[Any], columns: int) -> list[Any]:
    """In the order in which a legend of so many columns, which it fills one by one, reads row by row."""
    return [entry for column in range(columns) for entry in entries[column::columns]]


# ---- The family tree ----


def draw_tree(facts: LineageFacts, width: float) -> Figure | None:
    """A row for each generation and ensemble: who taught whom, the score with its standard error, and the gain."""
    if not facts.measured:
        return None
    height = 0.95 + 0.44 * len(facts.networks)
    figure = _figure(width, height)
    _draw_tree(facts, figure, 0, width, 0, height)
    return figure


def _draw_tree(facts: LineageFacts, figure: Figure, left: float, right: float, bottom: float, top: float) -> None:
    """Between these distances from the left and the lower edge of the figure, in inches."""
    score = facts.score
    assert score is not None
    width, height = figure.get_size_inches()
    is_wide = right - left > 6
    rows = len(facts.networks)
    tree_width = 1.75 + 0.16 * min(len(facts.ensembles), 6)
    numbers_width = 3.1 if is_wide else 0.0
    below, above = (0.5, 0.4) if is_wide else (0.62, 0.2)
    rest = width - right
    tree = _place(figure, left, bottom + below, width - left - tree_width, height - top + above)
    forest = _place(figure, left + tree_width, bottom + below, rest + numbers_width + 0.15, height - top + above)
    for axes in (tree, forest):
        axes.set_ylim(rows - 0.5, -0.5)  # the first row on top
    _draw_family(facts, tree, tree_width)
    _draw_scores(facts, forest, is_wide)
    if is_wide:
        numbers = _place(figure, right - numbers_width, bottom + below, rest, height - top + above)
        numbers.set_ylim(rows - 0.5, -0.5)
        _draw_numbers(facts, numbers)


def _draw_family(facts: LineageFacts, axes: Axes, width: float) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, width)
    trunk = 0.14
    row_of = {own.index: row for row, own in enumerate(facts.networks) if own.index is not None}
    text_at = trunk + 0.2 + 0.16 * min(len(facts.ensembles), 6)
    for place, own in enumerate(facts.ensembles):
        x, row = trunk + 0.16 * (place % 6 + 1), len(facts.generations) + place
        members = [row_of[index] for index in own.members]
        axes.plot([x, x], [min(members), row], color=INK, linewidth=0.9, zorder=1)
        for member in members:
            axes.plot([trunk, x], [member, member], color=INK, linewidth=0.9, zorder=1)
        axes.plot([x], [row], "D", color=COLORS[1], markersize=7, zorder=3)
    for row, own in enumerate(facts.networks):
        color = COLORS[1] if own.index is None else COLORS[0]
        if own.index is not None:
            if own.parent is not None:
                begin = row_of[own.parent.index or 0]
                arrow = {"arrowstyle": "-|>", "color": COLORS[0], "linewidth": 1.6, "shrinkA": 5, "shrinkB": 5}
                axes.annotate("", (trunk, row), (trunk, begin), arrowprops=arrow, zorder=2)
            axes.plot([trunk], [row], "o", color=color, markersize=8, zorder=3, fillstyle=_fill(own))
        first, second = _labels(facts, own)
        axes.text(text_at, row, first, va="bottom", fontsize=9.5, fontweight="bold")
        axes.text(text_at, row + 0.06, second, va="top", fontsize=8)


def _fill(network: Network) -> str:
    return "full" if network.is_finished else "none"


def _labels(facts: LineageFacts, network: Network) -> tuple[str, str]:
    record, is_control = network.record, facts.content["spec"].get("control")
    if network.index is None:
        return f"mean of {','.join(map(str, network.members))}", f"of {record['average']}"[:22]
    role = "" if is_control or network.index else ", teacher"
    seed = "" if record["seed"] is None else f", seed {record['seed']}"
    if not network.is_finished:
        return f"{network.name}{role}", "in training"
    objective = "elsewhere" if record["objective"] == "external" else str(record["objective"])
    return f"{network.name}{role}", f"{objective[:14]}{seed}"


def _draw_scores(facts: LineageFacts, axes: Axes, is_wide: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    score, first = facts.score, facts.networks[0]
    assert score is not None
    axes.grid(False)
    axes.grid(axis="x", alpha=0.2)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    is_control = facts.content["spec"].get("control") is not None
    if first.score is not None and first.error is not None and not is_control:
        for times, alpha in ((2, 0.10), (1, 0.14)):
            axes.axvspan(
                first.score - times * first.error,
                first.score + times * first.error,
                color=COLORS[0],
                alpha=alpha,
                lw=0,
            )
        axes.axvline(first.score, color=COLORS[0], linewidth=0.8, linestyle=":")
    for row, own in enumerate(facts.networks):
        if own.score is None or not math.isfinite(own.score):
            continue
        color = COLORS[1] if own.index is None else COLORS[0]
        if own.error is not None:
            for times, width in ((2, 1), (1, 3)):
                ends = [own.score - times * own.error, own.score + times * own.error]
                axes.plot(ends, [row, row], color=color, linewidth=width, solid_capstyle="butt")
        axes.plot([own.score], [row], "D" if own.index is None else "o", color=color, markersize=6)
    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    title = f"{facts.split} {score.title}{', ' + score.unit if score.unit else ''}"
    if any(own.error is not None for own in facts.networks):
        between = "; " if is_wide else "\n"
        title += f"{between}bars: ± 1 and ± 2 standard errors (s.e.)"
    axes.set_xlabel(title, fontsize=8.5)


def _draw_numbers(facts: LineageFacts, axes: Axes) -> None:
    score = facts.score
    assert score is not None
    axes.set_axis_off()
    axes.set_xlim(0, 3.1)
    columns = [(0.95, f"{score.title} ± s.e."), (1.75, "NLL"), (3.05, "gain ± s.e.")]
    if score.name == "nll":
        columns.pop(1)
    for x, title in columns:
        axes.text(x, -0.55, title, ha="right", va="bottom", fontsize=8)
    for row, own in enumerate(facts.networks):
        cells = [
            with_error(own.score, own.error),
            number(_nll(facts, own), 4),
            with_error(own.gain, own.gain_error, "+"),
        ]
        if score.name == "nll":
            cells.pop(1)
        for (x, _), cell in zip(columns, cells, strict=True):
            axes.text(x, row, cell, ha="right", va="center")


def _nll(facts: LineageFacts, network: Network) -> float | None:
    return network.record["metrics"].get(facts.split, {}).get("nll") if network.is_finished else None


def number(value: float | None, decimals: int = 2, sign: str = "") -> str:
    """A number, empty where there is none."""
    if value is None:
        return ""
    return f"{value:{sign}.{decimals}f}".replace("-", "\u2212") if math.isfinite(value) else "not finite"


def with_error(value: float | None, error: float | None, sign: str = "") -> str:
    """A number and its standard error."""
    return number(value, 2, sign) + ("" if value is None or error is None else f" ± {number(error)}")


# ---- Curves ----


def draw_curves(facts: LineageFacts) -> Figure | None:
    """Training and evaluation losses of all generations over the epochs."""
    series = _loss_series(facts)
    if not series:
        return None
    names = len({own.name for own, _, _, _ in series}) + 2 * any(is_evaluation for _, is_evaluation, _, _ in series)
    legend = 0.1 + 0.2 * math.ceil(names / 5)
    height = 2.9 + legend
    figure = _figure(NARROW, height)
    _draw_curves(series, _unit(facts), _place(figure, 0.6, 0.45, 0.12, legend + 0.1), figure, 1 - 0.05 / height)
    return figure


def _loss_series(facts: LineageFacts) -> list[tuple[Network, bool, list[float], list[float]]]:
    """(network, is_evaluation, epochs or steps, losses) of some generations."""
    unit = _unit(facts)
    found = []
    with_history = [own for own in facts.generations if own.history]
    for own in _some(with_history, MOST_CURVES):
        names = {name for entry in own.history for name in entry if name.startswith("eval") and name.endswith("loss")}
        best = [name for name in ("eval_loss", "eval_validation_loss", "eval_test_loss") if name in names]
        evaluated = (best or sorted(names))[:1]
        for name in ("loss", *evaluated):
            points = [(entry[unit], entry[name]) for entry in own.history if _has(entry, unit, name)]
            if points:
                x, y = zip(*points, strict=True)
                found.append((own, name != "loss", list(x), list(y)))
    return found


def _unit(facts: LineageFacts) -> str:
    entries = [entry for own in facts.generations for entry in own.history]
    return "epoch" if entries and all(entry.get("epoch") is not None for entry in entries) else "step"


def _has(entry: dict[str, Any], *names: str) -> bool:
    return all(entry.get(name) is not None for name in names)


def _draw_curves(series: Sequence[Any], unit: str, axes: Axes, figure: Figure, legend_top: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    networks = list({own.name: own for own, _, _, _ in series}.values())
    looks = {own.name: _look(place) for place, own in enumerate(networks)}
    any_evaluation = any(is_evaluation for _, is_evaluation, _, _ in series)
    for own, is_evaluation, x, y in series:
        faint = any_evaluation and not is_evaluation
        shown: dict[str, Any] = {"alpha": 0.6, "linewidth": 0.9} if faint else {}
        marker = "o" if len(x) < 25 and (is_evaluation or len(x) == 1) else ""
        axes.plot(x, y, **looks[own.name], **shown, marker=marker)
    values = [value for _, _, _, y in series for value in y]
    if min(values) > 0 and max(values) / min(values) >= 4:
        axes.set_yscale("log")
        ratio = max(values) / min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if ratio > 1e3 else (1, 3) if ratio > 20 else (1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("loss, nats per item" if any_evaluation else "training loss, nats per item")
    axes.set_xlabel(unit)
    handles = [Line2D([], [], **looks[own.name]) for own in networks]
    labels = [own.name for own in networks]
    if any_evaluation:
        handles += [Line2D([], [], color=INK, linewidth=1.6), Line2D([], [], color=INK, linewidth=0.9, alpha=0.6)]
        labels += ["evaluation", "training"]
    box = axes.get_position()
    columns = min(len(labels), 5)
    figure.legend(
        _by_rows(handles, columns),
        _by_rows(labels, columns),
        loc="upper left",
        bbox_to_anchor=(box.x0 - 0.02, legend_top),
        fontsize=8,
        borderaxespad=0,
        ncols=columns,
        columnspacing=1.0,
        handlelength=1.6,
        handletextpad=0.5,
    )


def draw_norms(facts: LineageFacts) -> Figure | None:
    """The norms of the two parts of the gradient of equation 7 over the training of every student."""
    unit = _unit(facts)
    students = [own for own in facts.generations if any(_has(entry, "dark_knowledge_norm") for entry in own.history)]
    if not students:
        return None
    shown = _some(students, MOST_CURVES)
    figure = _figure(NARROW, 3.9)
    looks = {own.name: _look(own.index or 0) for own in shown}
    for place, (name, title) in enumerate(
        (("dark_knowledge_norm", "dark knowledge"), ("importance_weight_norm", "importance weight"))
    ):
        axes = _place(figure, 0.6, 0.45 + (1 - place) * 1.7, 0.12, 0.5 + place * 1.7)
        for own in shown:
            points = [(entry[unit], entry[name]) for entry in own.history if _has(entry, unit, name)]
            if points:
                axes.plot(*zip(*points, strict=True), **looks[own.name], label=own.name)
        axes.set_ylim(bottom=0)
        axes.set_title(f"norm of the {title} part", fontsize=9, loc="left", color=INK)
        if place:
            axes.set_xlabel(unit)
        else:
            axes.tick_params(labelbottom=False)
            figure.legend(
                loc="upper right", ncols=5, fontsize=8, borderaxespad=0.2, columnspacing=1.0, handlelength=1.6
            )
    return figure


# ---- Calibration and confidence ----


def _with_items(facts: LineageFacts) -> list[Network]:
    return [own for own in facts.networks if own.predictions is not None and "label" in own.predictions]


def draw_reliability(facts: LineageFacts) -> Figure | None:
    """A reliability diagram (Guo et al. 2017) of each network."""
    shown = _some(_with_items(facts), MOST_PANELS)
    if not shown:
        return None
    rows = math.ceil(len(shown) / 2)
    side, gap = 1.72, 0.42
    height = rows * (side + gap) + 0.4
    figure = _figure(NARROW, height)
    for place, own in enumerate(shown):
        row, column = divmod(place, 2)
        left = 0.5 + column * (side + 0.25)
        bottom = height - (row + 1) * (side + gap) + 0.1
        axes = _place(figure, left, bottom, NARROW - left - side, height - bottom - side)
        _draw_reliability(own, axes)
        is_last = place + 2 >= len(shown)
        axes.tick_params(labelbottom=is_last, labelleft=not column)
        if is_last:
            axes.set_xlabel("confidence")
        if not column:
            axes.set_ylabel("accuracy")
    return figure


def _draw_reliability(network: Network, axes: Axes) -> None:
    assert network.predictions is not None
    confidence, correct = network.predictions["confidence"].astype(np.float64), right(network.predictions)
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
    color = COLORS[1] if network.index is None else COLORS[0]
    for number_of_bin in np.unique(bins):
        own = bins == number_of_bin
        mean, accuracy, count = float(confidence[own].mean()), float(correct[own].mean()), int(own.sum())
        left = number_of_bin / _BINS
        axes.bar(left + 0.5 / _BINS, accuracy, 0.9 / _BINS, color=color, alpha=0.35, linewidth=0)
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        axes.plot([mean, mean], [max(accuracy - error, 0), min(accuracy + error, 1)], color=color, linewidth=1.6)
        axes.plot([mean], [accuracy], "o", color=color, markersize=3.5 if count >= 10 else 2)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_title(f"{network.name[:26]}: ECE {100 * ece(network):.2f}", fontsize=8.5, loc="left", color=INK)


def ece(network: Network, bins: int = 15) -> float:
    """The expected calibration error of a network's predictions, as `born_again.metrics` computes it."""
    assert network.predictions is not None
    confidence, correct = network.predictions["confidence"].astype(np.float64), right(network.predictions)
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(places, correct - confidence, bins)).sum() / len(correct))


def draw_confidence(facts: LineageFacts) -> Figure | None:
    """A histogram of the confidence of each network."""
    shown = _some(_with_items(facts), MOST_CURVES)
    if not shown:
        return None
    legend = 0.1 + 0.2 * math.ceil(len(shown) / 3)
    figure = _figure(NARROW, 2.9 + legend)
    axes = _place(figure, 0.6, 0.45, 0.12, legend + 0.1)
    edges = np.linspace(0, 1, 21)
    lowest = 100.0
    for place, own in enumerate(shown):
        assert own.predictions is not None
        counts, _ = np.histogram(own.predictions["confidence"], edges)
        share = 100 * counts / counts.sum()
        lowest = min([lowest, *share[share > 0]])
        axes.stairs(np.where(share > 0, share, np.nan), edges, **_look(place), label=own.name[:26], linewidth=1.4)
    axes.set_yscale("log")
    axes.set_ylim(lowest / 2, 150)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("confidence (probability of the prediction)")
    axes.set_ylabel("share, % (logarithmic)")
    columns = min(len(shown), 3)
    handles, labels = (_by_rows(own, columns) for own in axes.get_legend_handles_labels())
    figure.legend(
        handles,
        labels,
        loc="upper left",
        ncols=columns,
        fontsize=8,
        borderaxespad=0.3,
        columnspacing=1.0,
        handlelength=1.6,
    )
    return figure


# ---- What changed ----


def draw_changes(facts: LineageFacts) -> Figure | None:
    """For each student: the share of items that only it, or only its teacher, predicts rightly."""
    pairs = facts.pairs[-MOST_CURVES:]
    if not pairs:
        return None
    figure = _figure(NARROW, 0.95 + 0.4 * len(pairs))
    axes = _place(figure, 0.6, 0.45, 0.15, 0.35)
    axes.grid(False)
    axes.grid(axis="x", alpha=0.2)
    largest = 0.0
    for row, (student, teacher) in enumerate(pairs):
        assert student.predictions is not None and teacher.predictions is not None
        found = changes(student.predictions, teacher.predictions)
        won, lost = 100 * found.won / found.items, 100 * found.lost / found.items
        largest = max(largest, won, lost)
        axes.barh(row, won, 0.6, color=COLORS[2], linewidth=0)
        axes.barh(row, -lost, 0.6, color=COLORS[1], linewidth=0)
        for x, count, side in ((won, found.won, 1), (-lost, found.lost, -1)):
            aligned = "left" if side > 0 else "right"
            axes.annotate(
                f"{count:,}", (x, row), (4 * side, 0), textcoords="offset points", va="center", ha=aligned, fontsize=8
            )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(-1.25 * (largest or 1), 1.25 * (largest or 1))
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_yticks(range(len(pairs)), [student.name for student, _ in pairs])
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_xlabel(f"% of the {'tokens' if facts.is_text else 'items'} of the {facts.split} split")
    axes.set_title("only the teacher is right", fontsize=8.5, loc="left", color=INK)
    axes.set_title("only the student is right", fontsize=8.5, loc="right", color=INK)
    return figure


def class_pair(facts: LineageFacts) -> tuple[Network, Network] | None:
    """The first and the last generation with predictions of the same items."""
    known = [own for own in facts.generations if own.predictions is not None and "label" in own.predictions]
    if len(known) < 2 or not np.array_equal(known[0].predictions["label"], known[-1].predictions["label"]):  # type: ignore[index]
        return None
    return known[0], known[-1]


def draw_classes(facts: LineageFacts) -> Figure | None:
    """The accuracy in each class, or the loss of each word, of the first and the last generation."""
    pair = class_pair(facts)
    if pair is None:
        return None
    first, last = pair
    assert first.predictions is not None and last.predictions is not None
    numbers = shown_classes(first.predictions, last.predictions, facts.is_text, MOST_CLASSES)
    figure = _figure(NARROW, 1.05 + 0.26 * len(numbers))
    axes = _place(figure, 1.15, 0.45, 0.15, 0.4)
    axes.grid(False)
    axes.grid(axis="x", alpha=0.2)
    for place, own, shift, marker in ((0, first, -0.13, "o"), (1, last, 0.13, "D")):
        assert own.predictions is not None
        scores = class_scores(own.predictions, facts.is_text)
        for row, of_class in enumerate(numbers):
            value, error, _ = scores[of_class]
            if error is not None:
                axes.plot([value - error, value + error], [row + shift] * 2, color=COLORS[place], linewidth=1.6)
            axes.plot(
                [value], [row + shift], marker, color=COLORS[place], markersize=4, label=None if row else own.name
            )
    axes.set_ylim(len(numbers) - 0.5, -0.5)
    axes.set_yticks(range(len(numbers)), [facts.class_name(of_class)[:16] for of_class in numbers])
    axes.set_xlabel("mean NLL of the token, nats" if facts.is_text else f"{facts.split} accuracy in the class, %")
    figure.legend(loc="upper right", ncols=2, fontsize=8, borderaxespad=0.3)
    return figure


# ---- The picture ----


def _draw_picture(facts: LineageFacts) -> Figure | None:
    """The tree above; below it the curves, and the calibration of the first, the last and the largest ensemble."""
    if not facts.measured:
        return None
    tree_height = 0.95 + 0.44 * len(facts.networks)
    series = _loss_series(facts)
    known = _with_items(facts)
    trained = [own for own in known if own.index is not None]
    panels = [*trained[:1], *trained[1:][-1:], *[own for own in known if own.index is None][-1:]]
    panels = panels if series else _some(known, 4)
    lower = 2.75 if series or panels else 0.0
    title = 0.3
    height = tree_height + lower + title
    figure = _figure(WIDE, height)
    name, spec = facts.content["name"], facts.content["spec"]
    # Without local folders: the picture may be published.
    heading = one_line(f"{name}: {local_name(spec['model'])} on {local_name(spec['dataset'])}", 90)
    figure.text(0.012, 1 - 0.12 / height, heading, va="top", fontsize=12, fontweight="bold")
    _draw_tree(facts, figure, 0.05, WIDE - 0.1, lower, lower + tree_height)
    if series:
        right_edge = WIDE - 4.1 if panels else 0.15
        _draw_curves(
            series,
            _unit(facts),
            _place(figure, 0.6, 0.45, right_edge, height - lower + 0.55),
            figure,
            (lower - 0.1) / height,
        )
    side = 1.15 if series and len(panels) > 2 else 1.7
    for place, own in enumerate(panels):
        left_over = len(panels) - place  # panels from here to the right edge
        begin = WIDE - 0.15 - left_over * (side + 0.17) if series else 0.6 + place * (side + 0.3)
        bottom = 0.45 + (1.7 - side) / 2
        axes = _place(figure, begin, bottom, WIDE - begin - side, height - bottom - side)
        _draw_reliability(own, axes)
        axes.set_title(f"{own.name[:18]}\nECE {100 * ece(own):.2f}", fontsize=8, loc="left", color=INK)
        axes.tick_params(labelleft=not place, labelsize=8)
        axes.set_xlabel("confidence", fontsize=8)
        if not place:
            axes.set_ylabel("accuracy", fontsize=8)
    return figure
