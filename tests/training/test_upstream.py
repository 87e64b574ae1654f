"""What is left out of Trainer's step does not change what it reports."""

import gc
import weakref

import accelerate.optimizer
import pytest
import torch
from helpers import Network, arguments, language_model, sentences, vectors
from torch import nn
from transformers import Trainer, TrainerCallback

from born_again import BornAgainTrainer
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.training.checks import DivergenceGuard
from born_again.training.upstream import BaseTrainer


class LogsWhenItLikes(TrainerCallback):
    """Asks for a log at a step that no argument tells, and at the end of an epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == 3

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = True


class EvaluatesTheStudent(TrainerCallback):
    """Leaves the student in eval mode, from which Trainer takes it back at every step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.transformer.h[0].eval()


class ClampsGradients(torch.optim.SGD):
    """Changes the gradients that it is given, as some optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.clamp_(-1e-3, 1e-3)
        return super().step(closure)


class WritesWithoutATrace(torch.optim.SGD):
    """From the second step on, as optimizers with kernels of their own do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"] if self.state else ():
                parameter.grad.data.mul_(0.5)
        return super().step(closure)


class ScalesGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.grad.numpy()[...] *= 0.5


class KeepsEvalMode(nn.Dropout):
    def train(self, mode=True):
        return super().train(False)


class AddsParts(TrainerCallback):
    """In eval mode, as from_pretrained returns them, from which Trainer takes them at every step."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            torch.manual_seed(3)
            head = nn.Linear(model.config.n_embd, model.config.vocab_size, dtype=torch.float64)
            model.lm_head = nn.Sequential(head, nn.Dropout()).eval()
            optimizer.param_groups[0]["params"].extend(model.lm_head.parameters())


def keeping_eval_mode(model):
    model.transformer.drop = KeepsEvalMode(0.5)


TRAININGS = {
    "clipped": {"max_grad_norm": 0.5, "logging_steps": 1},
    "logged at every step": {"logging_steps": 1},
    "logged at some steps": {"logging_steps": 2},
    "logged at some steps, accumulated": {"logging_steps": 2, "gradient_accumulation_steps": 3, "max_steps": 5},
    "logged by epoch": {"logging_strategy": "epoch"},
    "logged by a callback": {"logging_strategy": "no", "callbacks": [LogsWhenItLikes()]},
    "evaluated": {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": sentences("next")},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3, "logging_steps": 2},
    "an optimizer that changes gradients": {"logging_steps": 1, "optimizer": ClampsGradients},
    "an optimizer that leaves no trace": {"logging_steps": 1, "optimizer": WritesWithoutATrace},
    "a callback that leaves no trace": {"logging_steps": 1, "callbacks": [ScalesGradients()]},
    "a train() of its own": {"logging_steps": 1, "change": keeping_eval_mode},
    "parts added": {"logging_steps": 1, "callbacks": [AddsParts()]},
    "nesterov": {"logging_steps": 1, "optim_args": "momentum=0.9,nesterov=True,foreach=True"},
    "eval mode": {"logging_steps": 1, "callbacks": [EvaluatesTheStudent()]},
    "frozen": {"logging_steps": 1, "frozen": "transformer.wte.weight"},
    "smoothed labels": {"logging_steps": 2, "label_smoothing_factor": 0.1},
    "caches emptied": {"logging_steps": 2, "torch_empty_cache_steps": 1},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_log_and_weights_are_those_of_trainer(tmp_path, name):
    runs = []
    for kind in (Trainer, BaseTrainer):
        changes = dict(TRAININGS[name])
        others = {key: changes.pop(key) for key in ("callbacks", "eval_dataset") if key in changes}
        optimizer, frozen, change = (changes.pop(key, None) for key in ("optimizer", "frozen", "change"))
        args = arguments(tmp_path / kind.__name__, **changes)
        model = language_model(0)
        if change is not None:
            change(model)
        if frozen is not None:
            model.get_parameter(frozen).requires_grad_(False)
        if optimizer is not None:
            others["optimizers"] = optimizer(model.parameters(), lr=0.5), None
        trainer = kind(model, args, train_dataset=sentences("next"), **others)
        trainer.train()
        times = ("runtime", "samples_per_second", "steps_per_second")
        log = [{k: v for k, v in row.items() if not k.endswith(times)} for row in trainer.state.log_history]
        runs.append((log, trainer))
    (expected, reference), (found, ours) = runs
    assert found == expected
    assert any(row.get("grad_norm", 0) > 0 for row in found)
    assert ours.state.total_flos == reference.state.total_flos > 0
    for a, b in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_let_go_before_the_next_forward_and_before_an_evaluation(tmp_path):
    alive = []

    class Watching(BaseTrainer):
        def compute_loss(self, model, *args, **kwargs):
            alive.append(sum(reference() is not None for reference in gradients))
            return super().compute_loss(model, *args, **kwargs)

    class Collects(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients[:] = [weakref.ref(parameter.grad) for parameter in model.parameters()]

    gradients = []
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    data = sentences("next")
    trainer = Watching(language_model(0), args, train_dataset=data, eval_dataset=data, callbacks=[Collects()])
    trainer.train()
    gc.collect()
    assert len(alive) > args.max_steps  # an evaluation was among them
    assert not any(alive) and not any(reference() is not None for reference in gradients)


def test_callbacks_are_heard_whenever_they_come(tmp_path):
    heard = []

    class Late(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            heard.append(("late", state.global_step))

    class Plain:
        def __getattr__(self, name):
            return (lambda *args, **kwargs: heard.append(("plain", name))) if name.startswith("on_") else None

    class Adds(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.add_callback(Late())

    trainer = BaseTrainer(language_model(0), arguments(tmp_path), train_dataset=sentences("next"), callbacks=[Adds()])
    trainer.callback_handler.callbacks.append(Plain())
    trainer.train()
    assert [step for kind, step in heard if kind == "late"] == [2, 3]
    for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
        assert heard.count(("plain", event)) == 4


def test_packages_are_searched_as_before_after_a_training(tmp_path):
    before = accelerate.optimizer.is_lomo_available
    inside = []

    class Looks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            inside.append(accelerate.optimizer.is_lomo_available.cache_info().misses)

    BaseTrainer(language_model(0), arguments(tmp_path), train_dataset=sentences("next"), callbacks=[Looks()]).train()
    assert inside == [1, 1, 1, 1]
    assert accelerate.optimizer.is_lomo_available is before


def test_parameters_are_counted_once_a_training(tmp_path, monkeypatch):
    model = language_model(0)
    calls = []
    count = model.num_parameters
    monkeypatch.setattr(model, "num_parameters", lambda **kwargs: calls.append(kwargs) or count(**kwargs))
    trainer = BaseTrainer(model, arguments(tmp_path), train_dataset=sentences("next"))
    trainer.train()
    during = calls.count({"exclude_embeddings": True})
    assert during == 1
    trainer.train()
    assert calls.count({"exclude_embeddings": True}) == 2  # parameters may have been added in between


def test_a_network_that_counts_nothing(tmp_path):
    trainer = BaseTrainer(Network(0), arguments(tmp_path), train_dataset=vectors())
    assert trainer.floating_point_ops({"x": torch.zeros(2, 5)}) == 0


@pytest.mark.parametrize("bad", [1, 64, 65, 130], ids=lambda step: f"step {step}")
def test_the_first_of_many_losses_that_is_not_finite_is_named(bad):
    guard = DivergenceGuard()
    for step in range(1, 201):
        guard.see(torch.tensor(torch.nan if step >= bad else 1.0), step)
    assert len(guard._losses) < 64  # whatever the number of steps between two checks
    with pytest.raises(FloatingPointError, match=f"not finite at step {bad} of 200"):
        guard.check_loss(200)
    guard.check_loss(200)  # said once


@pytest.mark.parametrize("collator", [collate_batch, lambda batch: batch], ids=["ours", "another"])
def test_labels_on_a_device_are_known_from_the_dataset_alone(tmp_path, collator):
    def dataset(*labels):
        pixels = torch.randint(256, (len(labels), 32, 32, 3), dtype=torch.uint8)
        split = ImageSplit(pixels, torch.tensor(labels))
        return ImageDataset(split, (0.5,) * 3, (0.25,) * 3, augment=False, flip=False, seed=0)

    def known(data, labels):
        args = arguments(tmp_path, remove_unused_columns=False)
        trainer = BornAgainTrainer(Network(0), args, train_dataset=data, data_collator=collator)
        return trainer._range_on_host(labels)

    away = torch.empty(2, dtype=torch.int64, device="meta")  # no value can be read from it
    assert known(dataset(3, 1, 2), away) == ((1, 3) if collator is collate_batch else None)
    assert known(dataset(3, -100, 2), away) is None
    assert known(dataset(3, 1, 2), torch.tensor([2, 0])) == (0, 2)  # here they are read
    assert known(dataset(3, 1, 2), torch.tensor([2, -100])) is None
