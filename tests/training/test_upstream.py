"""What is left out of Trainer's step does not change what it reports."""

import pytest
import torch
from helpers import Network, arguments, language_model, sentences, vectors
from transformers import Trainer

from born_again.training.upstream import BaseTrainer


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_log_and_weights_are_those_of_trainer(tmp_path, clip):
    runs = []
    for kind in (Trainer, BaseTrainer):
        args = arguments(tmp_path / kind.__name__, max_grad_norm=clip, logging_steps=1)
        trainer = kind(language_model(0), args, train_dataset=sentences("next"))
        trainer.train()
        times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        runs.append(([{k: v for k, v in row.items() if k not in times} for row in trainer.state.log_history], trainer))
    (expected, reference), (found, ours) = runs
    assert found == expected
    assert "grad_norm" in found[0] and found[0]["grad_norm"] > 0
    assert ours.state.total_flos == reference.state.total_flos > 0
    for a, b in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b)


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
