"""The training curve: what is drawn of a log, the same bytes for the same log, and nothing that breaks it."""

import math
import os
import subprocess
import sys

import matplotlib
import pytest
from cycler import cycler
from matplotlib.colors import to_rgb
from PIL import Image, ImageColor

from born_again.report import figures
from born_again.report.figures import draw_curve

# As trainer.state.log_history holds them.
HISTORY = [
    {"loss": 2.3, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 1.0, "step": 10},
    {"eval_loss": 2.0, "eval_accuracy": 0.3, "eval_runtime": 1.0, "epoch": 1.0, "step": 10},
    {"loss": 1.1, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 2.0, "step": 20},
    {"eval_loss": 1.4, "eval_accuracy": 0.5, "epoch": 2.0, "step": 20},
    {"train_runtime": 3.0, "train_loss": 1.7, "total_flos": 0.0, "epoch": 2.0, "step": 20},
]
BACKGROUNDS = {"light": "#ffffff", "dark": "#0d1117"}  # of GitHub
BLUE, ORANGE = figures.COLORS[:2]


def drawn(history, path) -> Image.Image:
    assert draw_curve(history, path)
    image = Image.open(path)
    image.load()
    assert (image.format, image.size, image.mode) == ("PNG", (1200, 600), "RGBA")
    return image


def columns(image: Image.Image, color: str, bottom: int = 600) -> list[int]:
    """Where below the legend a color is."""
    pixels, (red, green, blue) = image.load(), ImageColor.getrgb(color)
    return [x for x in range(image.width) if any(pixels[x, y] == (red, green, blue, 255) for y in range(60, bottom))]


def luminance(color: str) -> float:
    """As WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_both_losses_are_drawn_from_where_they_begin_to_where_they_end(tmp_path):
    image = drawn(HISTORY, tmp_path / "training.png")
    for color in (BLUE, ORANGE):
        found = columns(image, color)
        assert len(found) > 400 and found[-1] - found[0] > 900


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_lines_and_text_stand_out_from_light_and_dark_pages(background, tmp_path):
    assert drawn(HISTORY, tmp_path / "training.png").getpixel((2, 2))[3] == 0  # the page shows through
    for color, enough in [(figures.INK, 4), *((color, 3) for color in figures.COLORS)]:
        lights = sorted((luminance(color), luminance(BACKGROUNDS[background])))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= enough, color


def test_the_values_are_those_of_the_log():
    assert figures._series(HISTORY) == {"training": [(10, 2.3), (20, 1.1)], "evaluation": [(10, 2.0), (20, 1.4)]}


def test_a_perplexity_stands_in_for_a_loss_that_is_not_there():
    history = [{"eval_perplexity": math.exp(4), "step": 1}, {"eval_loss": 3.0, "eval_perplexity": 99.0, "step": 2}]
    assert figures._series(history) == {"evaluation": [(1, pytest.approx(4.0)), (2, 3.0)]}


def test_several_evaluations_are_told_apart_by_their_split():
    history = [{"loss": 1.0, "eval_test_loss": 2.0, "eval_validation_perplexity": math.e, "step": 1}]
    assert list(figures._series(history)) == ["training", "evaluation: test", "evaluation: validation"]


def test_a_step_that_was_logged_twice_counts_once_and_order_does_not_matter():
    history = [{"loss": 3.0, "step": 20}, {"loss": 9.0, "step": 10}, {"loss": 2.0, "step": 10}]
    assert figures._series(history) == {"training": [(10, 2.0), (20, 3.0)]}


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{}],
        [{"step": 1}],
        [{"loss": 1.0}],
        [{"loss": "1.0", "step": 1}],
        [{"loss": True, "step": 1}],
        [{"loss": 1.0, "step": None}],
        [{"loss": math.nan, "step": 1}, {"eval_loss": math.inf, "step": 1}],
        [{"train_loss": 1.0, "eval_accuracy": 0.5, "step": 1}],
    ],
)
def test_without_anything_to_draw_nothing_is_written(history, tmp_path):
    assert draw_curve(history, tmp_path / "new" / "training.png") is False
    assert not list(tmp_path.iterdir())


def test_equal_logs_give_equal_bytes_and_other_logs_others(tmp_path):
    for name in ("a", "b"):
        drawn([dict(entry) for entry in HISTORY], tmp_path / name)
    drawn(HISTORY[:3], tmp_path / "c")
    with matplotlib.rc_context({"figure.figsize": (2, 2), "font.size": 30, "axes.prop_cycle": cycler(color="r")}):
        before = dict(matplotlib.rcParams)
        drawn(HISTORY, tmp_path / "d")  # a style of the process changes nothing, and is not changed
        assert dict(matplotlib.rcParams) == before
    a, b, c, d = ((tmp_path / name).read_bytes() for name in "abcd")
    assert a == b == d != c and b"oftware" not in a and b"tIME" not in a


def test_one_point_is_a_dot(tmp_path):
    assert 6 <= len(columns(drawn([{"loss": 1.5, "step": 7}], tmp_path / "one.png"), BLUE)) <= 16


def test_what_is_not_finite_is_a_gap(tmp_path):
    values = [3.0, 2.5, math.nan, -math.inf, 1.0, 0.9]
    history = [{"loss": value, "step": step} for step, value in enumerate(values, 1)]
    found = columns(drawn(history, tmp_path / "gap.png"), BLUE)
    assert max(b - a for a, b in zip(found, found[1:], strict=False)) > 400


def test_a_very_long_log_keeps_its_extremes_and_is_quick(tmp_path):
    history = [{"loss": 1 + (step % 2) / 10 + (step == 50_000), "step": step} for step in range(1, 100_001)]
    image = drawn(history, tmp_path / "long.png")
    whole, spike = columns(image, BLUE), columns(image, BLUE, bottom=300)
    assert 1 <= len(spike) <= 6 and abs(spike[0] - (whole[0] + whole[-1]) / 2) < 6
    assert (tmp_path / "long.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [5.0, 5.0 + 1e-15], [1e-300, 1e300], [-3.0, 4.0], [1e30, -1e30], [1e-12, 2e-12], [10**400]],
)
def test_any_range_has_ticks(values, tmp_path):
    history = [{"loss": value, "eval_loss": 1.0, "step": step} for step, value in enumerate(values)]
    drawn(history, tmp_path / "range.png")


@pytest.mark.filterwarnings("error")
def test_any_name_of_a_split_is_drawn_as_it_is(tmp_path):
    names = ["$x^", "\\frac{", "_hidden", "a\nb\ud800\N{CJK UNIFIED IDEOGRAPH-65E5}"]
    history = [{f"eval_{name}_loss": float(place), "step": 1} for place, name in enumerate(names)]
    image = drawn(history, tmp_path / "names.png")
    assert all(columns(image, color) for color in figures.COLORS[:4])


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "training.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        draw_curve(HISTORY, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_library_that_draws_is_loaded_when_something_is_drawn(tmp_path):
    code = f"""
import sys
from pathlib import Path
import born_again.lineage.runner
from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.report.figures import draw_curve
assert "matplotlib" not in sys.modules
draw_curve([{{"loss": 1.0, "step": 1}}], Path({str(tmp_path / "a.png")!r}))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
