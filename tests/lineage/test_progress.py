"""A terminal shows two bars, a log lines."""

import io
import sys

import pytest
from tiny_lineage import Crash, runner, spec
from tqdm import tqdm

from born_again import BornAgainTrainer

LOGGED = {"logging_steps": 3, "disable_tqdm": False}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_a_line_for_what_is_logged_and_no_bar(tmp_path, capsys):
    runner(tmp_path, changes=LOGGED).run()
    said = capsys.readouterr()
    assert "it/s" not in said.err and "\r" not in said.err + said.out
    lines = [line for line in said.out.splitlines() if "loss" in line]
    assert len(lines) == 3 * 4  # two of the loss, the summary, the evaluation
    assert lines[0].startswith("generation 0 of 2, step 3 of 6 (epoch 1): loss ")
    assert lines[-1].startswith("generation 2 of 2, step 6 of 6 (epoch 2): eval_test_loss ")


@pytest.mark.parametrize("disable", [False, True])
def test_a_terminal_has_a_bar_for_the_lineage_and_one_for_the_training(tmp_path, capsys, monkeypatch, disable):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    runner(tmp_path, changes={**LOGGED, "disable_tqdm": disable}).run()
    shown, lines = terminal.getvalue(), capsys.readouterr().out
    assert "generation 2 of 2, step 6 of 6" in lines
    if disable:
        assert "\r" not in shown
        return
    assert "tiny-words, generation 0 of 2:   0%" in shown
    assert "tiny-words, generation 2 of 2: 100%" in shown and "3/3 [" in shown
    assert "epoch 1 of 2:" in shown and "6/6 [" in shown


def test_other_processes_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(BornAgainTrainer, "is_world_process_zero", lambda self: False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    runner(tmp_path, changes=LOGGED, spec=spec(generations=0)).run()
    assert capsys.readouterr().out == terminal.getvalue() == ""


def test_a_training_that_breaks_off_leaves_no_bar_behind_and_is_resumed_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, changes=LOGGED, crash=Crash(1, 5)).run()
    assert not tqdm._instances
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    runner(tmp_path, changes=LOGGED).run()
    assert "tiny-words, generation 1 of 2:  33%" in terminal.getvalue()
    assert "4/6 [" in terminal.getvalue() and "1/6 [" not in terminal.getvalue().split("generation 2 of 2")[0]
