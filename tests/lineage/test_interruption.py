"""A signal costs a lineage no step: it saves, leaves, and goes on to the same weights."""

import logging
import os
import signal
import threading

import pytest
import torch
from tiny_lineage import STEPS, Crash, hashes, runner, spec
from transformers import TrainerCallback

from born_again.lineage import callbacks
from born_again.lineage.callbacks import Interrupted, StopSignals
from born_again.lineage.folders import last_checkpoint
from born_again.lineage.lock import FolderLock
from born_again.lineage.manifest import LineageError, Manifest

EPOCH = 3  # steps; the training has two epochs


class Signal(TrainerCallback):
    """Sends a signal to this process before a step, as a scheduler would."""

    def __init__(self, generation, step, signum=signal.SIGTERM):
        self.generation, self.step, self.signum = generation, step, signum

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and args.output_dir.endswith(f"gen{self.generation}"):
            signal.raise_signal(self.signum)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("whole") / "out"
    runner(folder, spec=spec(generations=1)).run()
    return hashes(folder)


def handlers():
    return [signal.getsignal(signum) for signum in callbacks.SIGNALS]


@pytest.mark.slow_but_for("1-5-15-143")
@pytest.mark.parametrize(
    ("generation", "step", "signum", "code"),
    [(0, 1, signal.SIGINT, 130), (1, 5, signal.SIGTERM, 143), (1, EPOCH, signal.SIGTERM, 143)],
)
def test_a_signal_saves_the_step_and_the_same_command_gives_the_same_weights(
    whole, tmp_path, caplog, generation, step, signum, code
):
    folder, before = tmp_path / "out", handlers()
    with pytest.raises(Interrupted, match=f"after step {step}: everything is saved in .*out; the same") as left:
        runner(folder, spec=spec(generations=1), crash=Signal(generation, step, signum)).run()
    assert left.value.code == code and handlers() == before
    assert f"{signal.Signals(signum).name} after step {step}" in caplog.text
    assert last_checkpoint(folder / "checkpoints" / f"gen{generation}").name == f"checkpoint-{step}"
    assert Manifest.read(folder).record(generation)["status"] == "training"
    assert not (folder / ".lineage.lock").exists()
    runner(folder, spec=spec(generations=1)).run()
    assert hashes(folder) == whole


def test_the_last_checkpoint_is_kept_where_only_the_best_one_would_be(whole, tmp_path):
    """What Trainer does at the end of a training is not done to one that goes on."""
    folder = tmp_path / "out"
    best = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_test_loss",
        "save_total_limit": 1,
    }
    with pytest.raises(Interrupted):
        runner(folder, spec=spec(generations=0), crash=Signal(0, EPOCH + 1), changes=best).run()
    assert last_checkpoint(folder / "checkpoints" / "gen0").name == f"checkpoint-{EPOCH + 1}"


def test_a_signal_in_the_last_step_lets_the_generation_finish(whole, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(Interrupted, match="before generation 1: everything is saved"):
        runner(folder, spec=spec(generations=1), crash=Signal(0, STEPS)).run()
    assert [record["status"] for record in Manifest.read(folder).generations] == ["finished"]
    done = runner(folder, spec=spec(generations=1), crash=Signal(1, STEPS)).run()
    assert hashes(folder) == whole and done.record(1)["status"] == "finished"


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    class Twice(Signal):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control)
            super().on_step_begin(args, state, control)

    monkeypatch.setattr(callbacks, "SIGNAL_REPEAT_SECONDS", 0.0)
    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path / "out", spec=spec(generations=0), crash=Twice(0, 1)).run()
    assert handlers() == before and last_checkpoint(tmp_path / "out" / "checkpoints" / "gen0") is None


def test_a_signal_that_a_launcher_repeats_is_one_request():
    with StopSignals() as noted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert noted.on_any_process() == signal.SIGINT


def test_the_first_signal_is_answered_at_once(capfd):
    with StopSignals():
        signal.raise_signal(signal.SIGTERM)
    assert "SIGTERM: finishing the step and saving; once more to stop at once." in capfd.readouterr().err


def test_another_thread_installs_nothing():
    before, found = handlers(), []

    def work():
        with StopSignals() as noted:
            found.extend([handlers(), noted.on_any_process()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, None]


def test_a_folder_in_use_is_refused_and_the_second_run_reads_what_the_first_one_wrote(whole, tmp_path):
    folder = tmp_path / "out"
    late = runner(folder, spec=spec(generations=1), built=(built := []))
    with FolderLock(folder), pytest.raises(LineageError, match=f"is in use by process {os.getpid()} on"):
        late.run()
    runner(folder, spec=spec(generations=0)).run()
    late.run()
    assert [generation.index for generation in built] == [1] and hashes(folder) == whole


def test_a_crash_lets_go_of_the_folder(tmp_path, caplog):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, crash=Crash(0, 1)).run()
    with caplog.at_level(logging.WARNING), FolderLock(folder):
        pass


def test_a_lineage_that_is_finished_is_read_without_the_lock(tmp_path):
    folder = tmp_path / "out"
    runner(folder, spec=spec(generations=0)).run()
    with FolderLock(folder):
        assert runner(folder, spec=spec(generations=0)).run().record(0)["status"] == "finished"


def test_a_signal_that_arrives_while_the_processes_agree_is_not_lost(monkeypatch):
    def agree(value):
        if value == 0:
            signal.raise_signal(signal.SIGTERM)
        return value

    monkeypatch.setattr(callbacks, "_highest", agree)
    with StopSignals() as noted:
        assert noted.on_any_process() is None and noted.on_any_process() == signal.SIGTERM


def test_another_signal_can_stop_a_run_too():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals(["SIGUSR1"]) as noted:
        signal.raise_signal(signal.SIGUSR1)
        assert noted.on_any_process() == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("name", ["SIGNONE", "SIGKILL", "signal"])
def test_a_stop_signal_that_is_none(tmp_path, name):
    with pytest.raises(ValueError, match=f"stop_signals: got '{name}', expected signals that a program can handle"):
        runner(tmp_path, stop_signals=[name])


def test_processes_that_are_not_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="training arguments: the launcher started 2 processes, which are not joined"):
        runner(tmp_path)
