"""The training curve: what is drawn of a log, the same bytes for the same log, and nothing that breaks it."""

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from born_again import curve
from born_again.curve import draw_curve

# As trainer.state.log_history holds them.
HISTORY = [
    {"loss": 2.3, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 1.0, "step": 10},
    {"eval_loss": 2.0, "eval_accuracy": 0.3, "eval_runtime": 1.0, "epoch": 1.0, "step": 10},
    {"loss": 1.1, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 2.0, "step": 20},
    {"eval_loss": 1.4, "eval_accuracy": 0.5, "epoch": 2.0, "step": 20},
    {"train_runtime": 3.0, "train_loss": 1.7, "total_flos": 0.0, "epoch": 2.0, "step": 20},
]
BLUE, ORANGE = (2, 0), (0, 2)  # of which two channels the first is far above the second; edges are mixed with white


def drawn(history, path) -> Image.Image:
    assert draw_curve(history, path)
    image = Image.open(path)
    image.load()
    assert (image.format, image.size, image.mode) == ("PNG", curve.SIZE, "RGB")
    return image


def columns(
    image: Image.Image, color: tuple[int, int], top: int = curve._TOP, bottom: int = curve.SIZE[1]
) -> list[int]:
    """Where below the legend a color is."""
    pixels, (more, less) = image.load(), color
    return [
        x for x in range(image.width) if any(pixels[x, y][more] - pixels[x, y][less] > 60 for y in range(top, bottom))
    ]


def test_both_losses_are_drawn_from_where_they_begin_to_where_they_end(tmp_path):
    image = drawn(HISTORY, tmp_path / "training.png")
    for color in (BLUE, ORANGE):
        found = columns(image, color)
        assert len(found) > 250 and found[-1] - found[0] > 300
    assert image.getpixel((2, 2)) == (255, 255, 255)


def test_the_values_are_those_of_the_log():
    assert curve._series(HISTORY) == {"training": [(10, 2.3), (20, 1.1)], "evaluation": [(10, 2.0), (20, 1.4)]}


def test_a_perplexity_stands_in_for_a_loss_that_is_not_there():
    history = [{"eval_perplexity": math.exp(4), "step": 1}, {"eval_loss": 3.0, "eval_perplexity": 99.0, "step": 2}]
    assert curve._series(history) == {"evaluation": [(1, pytest.approx(4.0)), (2, 3.0)]}


def test_several_evaluations_are_told_apart_by_their_split():
    history = [{"loss": 1.0, "eval_test_loss": 2.0, "eval_validation_perplexity": math.e, "step": 1}]
    assert list(curve._series(history)) == ["training", "evaluation: test", "evaluation: validation"]


def test_a_step_that_was_logged_twice_counts_once_and_order_does_not_matter():
    history = [{"loss": 3.0, "step": 20}, {"loss": 9.0, "step": 10}, {"loss": 2.0, "step": 10}]
    assert curve._series(history) == {"training": [(10, 2.0), (20, 3.0)]}


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
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_one_point_is_a_dot(tmp_path):
    assert 4 <= len(columns(drawn([{"loss": 1.5, "step": 7}], tmp_path / "one.png"), BLUE)) <= 12


def test_what_is_not_finite_is_a_gap(tmp_path):
    values = [3.0, 2.5, math.nan, -math.inf, 1.0, 0.9]
    history = [{"loss": value, "step": step} for step, value in enumerate(values, 1)]
    found = columns(drawn(history, tmp_path / "gap.png"), BLUE)
    assert max(b - a for a, b in zip(found, found[1:], strict=False)) > 200


def test_a_very_long_log_keeps_its_extremes_and_is_quick(tmp_path):
    history = [{"loss": 1 + (step % 2) / 10 + (step == 50_000), "step": step} for step in range(1, 100_001)]
    image = drawn(history, tmp_path / "long.png")
    spike = columns(image, BLUE, curve._TOP, curve._TOP + 150)
    assert 1 <= len(spike) <= 5 and abs(spike[0] - (curve._LEFT + 776) / 2) < 6
    assert (tmp_path / "long.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [5.0, 5.0 + 1e-15], [1e-300, 1e300], [-3.0, 4.0], [1e30, -1e30], [1e-12, 2e-12], [10**400]],
)
def test_any_range_has_ticks(values, tmp_path):
    history = [{"loss": value, "eval_loss": 1.0, "step": step} for step, value in enumerate(values)]
    drawn(history, tmp_path / "range.png")


@settings(max_examples=40, deadline=None)
@given(
    low=st.floats(-1e30, 1e30, allow_nan=False),
    width=st.floats(0, 1e30, allow_nan=False),
)
def test_ticks_are_few_and_hold_the_range(low, width):
    low, high = curve._widened(low, low + width)
    ticks = curve._ticks(low, high)
    assert 2 <= len(ticks) <= 12
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert len(set(curve._shown(ticks))) == len(ticks)


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "training.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        draw_curve(HISTORY, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_drawing_needs_no_network_library():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("curve", {curve.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert not {{"torch", "transformers", "matplotlib", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
