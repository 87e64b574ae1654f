"""What is saved when, so that a training goes on as if it had never stopped."""

import json

import pytest
import torch
from helpers import arguments, sentences, sequence_classifier
from transformers import TrainerCallback

from born_again import BornAgainTrainer
from born_again.lineage import callbacks as lineage_callbacks
from born_again.lineage.callbacks import RecordProgress, SaveAfterEvaluation, SaveByTime, checkpoint_names

STEPS_OF_AN_EPOCH = 3  # 22 rows by 8


class CrashOnEvaluation(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


class CrashAfterSaving(CrashOnEvaluation):
    def on_evaluate(self, *args, **kwargs):
        pass

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def train(folder, *callbacks, resume=None, first=(), **changes):
    """Two epochs on labels; the learning rate falls where validation does not gain, which it never does here."""
    settings = {
        "max_steps": -1,
        "num_train_epochs": 3,
        "learning_rate": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": STEPS_OF_AN_EPOCH,
        "lr_plateau_factor": 0.5,
        "lr_plateau_gain": 100.0,
        "metric_for_best_model": "loss",
    }
    data = sentences("sequence")
    trainer = BornAgainTrainer(
        sequence_classifier(1),
        arguments(folder, **{**settings, **changes}),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[*first, SaveAfterEvaluation(), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def evaluated(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.slow_but_for("1-CrashOnEvaluation", "2-CrashAfterSaving")
@pytest.mark.parametrize("crash", [CrashOnEvaluation, CrashAfterSaving])
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_evaluation_at_the_end_of_an_epoch_is_never_left_out(tmp_path, crash, epoch):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", crash(epoch * STEPS_OF_AN_EPOCH))
    last = checkpoint_names(tmp_path / "cut")[-1:]
    assert last == ([f"checkpoint-{epoch * STEPS_OF_AN_EPOCH}"] if crash is CrashAfterSaving else last)
    again = train(tmp_path / "cut", resume=str(tmp_path / "cut" / last[0]) if last else None)
    assert torch.equal(weights(again), weights(whole))
    assert evaluated(again) == evaluated(whole) == [3, 6, 9]


def test_a_checkpoint_in_mid_epoch_is_not_put_off(tmp_path):
    train(tmp_path, save_steps=2, num_train_epochs=2)
    assert checkpoint_names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["log_history"][-1].get("eval_loss") is not None
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_a_training_that_is_cut_by_its_last_step_does_not_go_one_step_further(tmp_path):
    constant = {"lr_plateau_factor": None, "lr_plateau_gain": 0.0, "lr_scheduler_type": "constant"}
    whole = train(tmp_path, max_steps=4, **constant, save_steps=2)
    assert whole.state.global_step == 4
    again = train(tmp_path, resume=str(tmp_path / "checkpoint-4"), max_steps=4, **constant)
    assert again.state.global_step == 4
    assert torch.equal(weights(again), weights(whole))


def test_seconds_go_on_counting_and_checkpoints_are_told(tmp_path):
    told = []
    keeper = RecordProgress(tmp_path, 100.0, lambda **fields: told.append(fields))
    train(tmp_path, keeper, save_steps=4, num_train_epochs=3, save_total_limit=1)
    assert [fields["checkpoints"] for fields in told] == [["checkpoint-4"], ["checkpoint-8"], ["checkpoint-9"]]
    seconds = [fields["seconds"] for fields in told]
    assert 100 < seconds[0] < seconds[1] < seconds[2] <= keeper.seconds < 200


class MinuteSteps(TrainerCallback):
    """A clock by which every step takes a minute."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(lineage_callbacks.time, "monotonic", lambda: self.now)

    def on_step_begin(self, *args, **kwargs):
        self.now += 60


@pytest.mark.parametrize(("minutes", "saved"), [(2, [2, 4, 6, 8, 9]), (2.5, [3, 6, 9]), (4, [4, 8, 9]), (100, [9])])
def test_a_checkpoint_is_saved_when_the_time_has_passed_and_at_the_end(tmp_path, monkeypatch, minutes, saved):
    whole = train(tmp_path / "whole", save_strategy="no")
    clock = MinuteSteps(monkeypatch)
    train(tmp_path / "cut", clock, first=[SaveByTime(minutes)], save_strategy="no")
    assert checkpoint_names(tmp_path / "cut") == [f"checkpoint-{step}" for step in saved]
    again = train(tmp_path / "cut", resume=str(tmp_path / "cut" / f"checkpoint-{saved[0]}"), save_strategy="no")
    assert torch.equal(weights(again), weights(whole)) and evaluated(again) == [3, 6, 9]


def test_the_best_weights_are_saved_beside_those_by_time(tmp_path, monkeypatch):
    best = {"save_strategy": "best", "load_best_model_at_end": True, "lr_plateau_factor": None, "lr_plateau_gain": 0.0}
    losses = iter([3.0, 1.0, 2.0])

    class Loss(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = next(losses)

    clock = MinuteSteps(monkeypatch)
    trained = train(tmp_path, clock, Loss(), first=[SaveByTime(2)], **best)
    # At step 9 it is due, and no evaluation finds it the best: it would be saved after step 10.
    assert checkpoint_names(tmp_path) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-5",
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert trained.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf")])
def test_refused_minutes(minutes):
    with pytest.raises(ValueError, match="save_minutes: got .*, expected a finite number above 0; .*save_strategy"):
        SaveByTime(minutes)


def test_names_are_in_the_order_of_steps(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "other-3"):
        (tmp_path / name).mkdir()
    assert checkpoint_names(tmp_path) == ["checkpoint-9", "checkpoint-10"]
