"""The training curve of a generation as a picture, drawn with Pillow alone: losses over steps."""

from __future__ import annotations

import math
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Points = list[tuple[int, float]]

SIZE = (800, 400)
_SCALE = 2  # drawn larger and reduced, which smooths the lines
_LEFT, _TOP, _RIGHT, _BOTTOM = 78, 46, 24, 56
_FONT_SIZE = 14
_INK, _GREY, _GRID, _PAPER = "#24292f", "#57606a", "#e3e7eb", "#ffffff"
# Told apart also where red and green are not (Okabe and Ito).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
# Beyond these a drawing would be of one value alone, and exponents leave the range of a float.
_LARGEST, _SMALLEST = 1e30, 1e-30
_LOG_FROM = 50  # ratio of largest to smallest loss


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws the training loss and the evaluation losses over the steps of a training.

    An evaluation that has a perplexity and no loss is drawn by the perplexity's logarithm, which is its loss in nats.
    Values that are not finite leave a gap; of a step that was logged twice the last value counts. The same history
    gives the same bytes with the same version of Pillow.

    Args:
        history: `trainer.state.log_history`: entries with "step" and "loss", "eval_loss", "eval_SPLIT_loss", and the
            same with perplexity.
        path: of the PNG; written atomically, its folder made if needed.

    Returns:
        Whether there was anything to draw; if not, nothing is written.

    Raises:
        OSError: the file cannot be written; an older one is intact.
    """
    series = _series(history)
    shown = {name: points for name, points in series.items() if any(math.isfinite(value) for _, value in points)}
    if not shown:
        return False
    content = BytesIO()
    _draw(shown).save(content, format="PNG", optimize=True)
    _write(path, content.getvalue())
    return True


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Values by step of the training loss and of each evaluation, in order of steps; nan where one was not finite."""
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
    names = sorted(found, key=lambda name: (name != "training", name))[: len(_COLORS)]
    return {name: sorted(found[name].items()) for name in names}


def _name(key: str) -> str | None:
    """loss -> training, eval_loss -> evaluation, eval_test_loss -> evaluation: test; None for what is not drawn."""
    if key == "loss":
        return "training"
    head, _, metric = key.rpartition("_")
    if metric not in ("loss", "perplexity") or not head.startswith("eval"):
        return None
    split = head.removeprefix("eval").removeprefix("_")
    return f"evaluation: {split[:20]}" if split else "evaluation"


def _draw(series: Mapping[str, Points]) -> Image.Image:
    width, height = (side * _SCALE for side in SIZE)
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT_SIZE * _SCALE)
    box = (_LEFT * _SCALE, _TOP * _SCALE, width - _RIGHT * _SCALE, height - _BOTTOM * _SCALE)
    steps = [step for points in series.values() for step, value in points if math.isfinite(value)]
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    is_log = min(values) > _SMALLEST and max(values) / min(values) >= _LOG_FROM
    x_ticks = _ticks(*_widened(0 if min(steps) < 0.1 * max(steps) else min(steps), max(steps)), whole=True)
    y_ticks = _log_ticks(min(values), max(values)) if is_log else _ticks(*_widened(min(values), max(values)))
    scale = math.log if is_log else float
    to_x = _mapping(x_ticks[0], x_ticks[-1], box[0], box[2])
    low, high = scale(min(y_ticks[0], *values)), scale(max(y_ticks[-1], *values))
    to_y = _mapping(low, high, box[3], box[1])
    shown = [f"{tick:g}" for tick in y_ticks] if is_log else _shown(y_ticks)
    rows = [(to_y(scale(tick)), text) for tick, text in zip(y_ticks, shown, strict=True)]
    _axes(draw, font, box, [(to_x(tick), f"{tick:,.0f}") for tick in x_ticks], rows)
    _labels(image, draw, font, box, "loss (logarithmic)" if is_log else "loss")
    for (name, points), color in zip(series.items(), _COLORS, strict=False):
        places = [(to_x(step), to_y(scale(value)) if math.isfinite(value) else None) for step, value in points]
        _line(draw, places, color, is_marked=name != "training" and len(points) <= 40)
    _legend(draw, font, box, list(series))
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def _axes(
    draw: ImageDraw.ImageDraw,
    font: Any,
    box: tuple[int, int, int, int],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> None:
    left, top, right, bottom = box
    gap = 8 * _SCALE
    for y, tick in y_ticks:
        draw.line([(left, y), (right, y)], fill=_GRID, width=_SCALE)
        draw.text((left - gap, y), tick, fill=_GREY, font=font, anchor="rm")
    for x, tick in x_ticks:
        draw.line([(x, bottom), (x, bottom + gap // 2)], fill=_GREY, width=_SCALE)
        # The last one ends with the axis, so that a long number is not cut by the edge.
        anchor = "ra" if x > right - gap else "ma"
        draw.text((x if anchor == "ma" else right + gap, bottom + gap), tick, _GREY, font, anchor)
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_GREY, width=_SCALE)


def _labels(image: Image.Image, draw: ImageDraw.ImageDraw, font: Any, box: tuple[int, ...], loss: str) -> None:
    left, top, right, bottom = box
    draw.text(((left + right) / 2, image.height - 8 * _SCALE), "step", fill=_INK, font=font, anchor="md")
    length = int(draw.textlength(loss, font=font)) + 2 * _SCALE
    label = Image.new("RGB", (length, 22 * _SCALE), _PAPER)
    ImageDraw.Draw(label).text((length // 2, label.height // 2), loss, fill=_INK, font=font, anchor="mm")
    upright = label.rotate(90, expand=True)
    image.paste(upright, (4 * _SCALE, (top + bottom - upright.height) // 2))


def _line(
    draw: ImageDraw.ImageDraw, places: Sequence[tuple[float, float | None]], color: str, is_marked: bool
) -> None:
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in places:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))
    for part in parts:
        if len(part) > 1:
            draw.line(_thinned(part), fill=color, width=2 * _SCALE, joint="curve")
        # A point with gaps on both sides has no line.
        for x, y in part if is_marked or len(part) == 1 else ():
            radius = 3.5 * _SCALE
            draw.ellipse([(x - radius, y - radius), (x + radius, y + radius)], fill=color)


def _thinned(part: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """First, lowest, highest and last of the points in one column of pixels: what a line through all would cover."""
    kept: list[tuple[float, float]] = []
    start = 0
    while start < len(part):
        end = bisect_left(part, int(part[start][0]) + 1, lo=start, key=lambda place: place[0])
        column = part[start:end]
        if len(column) > 4:
            extremes = {0, len(column) - 1}
            extremes |= {f(range(len(column)), key=lambda place: column[place][1]) for f in (min, max)}
            column = [column[place] for place in sorted(extremes)]
        kept += column
        start = end
    return kept


def _legend(draw: ImageDraw.ImageDraw, font: Any, box: tuple[int, int, int, int], names: Sequence[str]) -> None:
    x, y, sample, gap = float(box[0]), box[1] / 2, 22 * _SCALE, 8 * _SCALE
    for name, color in zip(names, _COLORS, strict=False):
        draw.line([(x, y), (x + sample, y)], fill=color, width=3 * _SCALE)
        draw.text((x + sample + gap, y), name, fill=_INK, font=font, anchor="lm")
        x += sample + 3 * gap + draw.textlength(name, font=font)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range wide enough for its ticks to be told apart."""
    if high - low > max(_SMALLEST, 0.01 * max(abs(low), abs(high))):
        return low, high
    margin = 0.1 * abs(low) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers, about five steps apart, from at most low to at least high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    if whole:
        step = max(1.0, step)
        low = max(0.0, low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 6)
    return [10.0**power for power in range(first, last + every, every)]


def _mapping(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _shown(ticks: Sequence[float]) -> list[str]:
    """With as many decimals as tell them apart."""
    apart = ticks[1] - ticks[0]
    if max(map(abs, ticks)) >= 1e5 or apart < 1e-4:
        return [f"{tick:.4g}" for tick in ticks]
    decimals = max(0, math.ceil(-math.log10(apart) - 1e-9))
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
