"""Checkpoints written in the background are those that Trainer writes, of the step at which they were due."""

import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import Network, arguments, sentences, sequence_classifier, vectors
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from born_again import BornAgainTrainer
from born_again.training.background_save import Writer


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=16, n_embd=8, n_layer=1, n_head=2))  # tied


STUDENTS = {
    "plain": (lambda: Network(1), vectors),
    "transformers": (lambda: sequence_classifier(1), lambda: sentences("sequence")),
    "tied": (gpt2, lambda: [{"input_ids": torch.arange(9), "labels": torch.arange(9)} for _ in range(24)]),
}
SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "optim_args": "momentum=0.9"}
SAVING |= {"loss_normalization": "step"}  # a plain network has no loss


def trained(folder, kind="plain", writer=None, callbacks=(), resume=None, **changes):
    student, data = STUDENTS[kind]
    trainer = BornAgainTrainer(
        student(), arguments(folder, **{**SAVING, **changes}), train_dataset=data(), callbacks=[*callbacks]
    )
    trainer.checkpoint_writer = writer
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


def content(path: Path):
    """What resuming reads of a file."""
    if path.suffix in (".pt", ".pth"):
        return str(torch.load(path, weights_only=False))
    return path.read_bytes()


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_files_are_those_that_trainer_writes(tmp_path, kind):
    expected = trained(tmp_path / "plain", kind, save_total_limit=2)
    with Writer() as writer:
        trainer = trained(tmp_path / "background", kind, writer, save_total_limit=2)
    assert torch.equal(weights(trainer), weights(expected))
    for step in (2, 4):
        folders = [tmp_path / way / f"checkpoint-{step}" for way in ("plain", "background")]
        names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert names[0] == names[1] and {"optimizer.pt", "rng_state.pth", "trainer_state.json"} < {*names[0]}
        assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
        for name in names[0]:
            if name != "training_args.bin":  # has the folder's name
                assert content(folders[0] / name) == content(folders[1] / name), name
    again = trained(tmp_path / "background", kind, resume=str(tmp_path / "background" / "checkpoint-2"))
    assert torch.equal(weights(again), weights(expected))


class Late(Writer):
    """Writes nothing before it is told to."""

    def __init__(self):
        super().__init__()
        self.told = threading.Event()

    def submit(self, job):
        def wait_and_run():
            assert self.told.wait(60)
            job()

        super().submit(wait_and_run)


class Steps(TrainerCallback):
    """Keeps the weights of every step; tells the writer at one of them."""

    def __init__(self, writer, step):
        self.writer, self.step, self.seen = writer, step, {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}
        if state.global_step == self.step:
            assert not (Path(args.output_dir) / "checkpoint-2" / "model.safetensors").exists()
            self.writer.told.set()


def test_training_goes_on_while_the_weights_of_the_step_are_written(tmp_path):
    with Late() as writer:
        steps = Steps(writer, 4)
        trained(tmp_path, writer=writer, callbacks=[steps], save_total_limit=2)
    for step in (2, 4):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in steps.seen[step].items())
    assert not torch.equal(steps.seen[2]["out.weight"], steps.seen[3]["out.weight"])


def test_the_best_checkpoint_is_whole_before_it_is_loaded(tmp_path):
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    best |= {"load_best_model_at_end": True}
    for name, writer in (("plain", None), ("background", Writer())):
        student, data = STUDENTS["plain"]
        args = arguments(tmp_path / name, **{**SAVING, **best})
        trainer = BornAgainTrainer(student(), args, train_dataset=data(), eval_dataset=data(), teacher=Network(2))
        trainer.checkpoint_writer = writer
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / name / "checkpoint-2")
        assert [path.name for path in (tmp_path / name).iterdir()] == ["checkpoint-2"]


class Stops(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize("limit", [1, 2])
def test_a_training_that_a_callback_stops_waits_for_the_best_checkpoint(tmp_path, monkeypatch, limit):
    save = torch.save

    def slow(*args, **kwargs):
        time.sleep(0.2)
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", slow)
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": limit}
    student, data = STUDENTS["plain"]
    args = arguments(tmp_path, **{**SAVING, **best})
    options = {"train_dataset": data(), "eval_dataset": data(), "callbacks": [Stops()]}
    trainer = BornAgainTrainer(student(), args, teacher=Network(2), **options)
    with Writer() as writer:
        trainer.checkpoint_writer = writer
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    assert trainer.state.global_step == 2 < args.max_steps


def test_jobs_run_in_order_and_an_error_is_raised_once_by_the_next_call():
    done = []

    def fail():
        raise OSError(28, "No space left on device")

    writer = Writer()
    writer.submit(lambda: done.append(1))
    writer.wait()
    writer.submit(fail)
    writer._pending[0].exception()  # has ended
    with pytest.raises(OSError, match="No space left"):
        writer.check()
    writer.submit(lambda: done.append(2))  # would record a checkpoint that was not written
    writer.wait()
    assert done == [1]
    with pytest.raises(OSError, match="No space left"), Writer() as writer:
        writer.submit(fail)
    inline = Writer(in_background=False)
    inline.submit(lambda: done.append(3))
    assert done == [1, 3]


def test_an_error_of_the_training_is_not_hidden_by_that_of_a_job(caplog):
    def fail():
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.ERROR), pytest.raises(FloatingPointError), Writer() as writer:
        writer.submit(fail)
        raise FloatingPointError
    assert "A checkpoint was not written: OSError: [Errno 28] No space left on device" in caplog.text
