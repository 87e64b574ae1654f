"""What a training on several processes says and arranges, as far as one process can show it."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import Network, arguments, vectors
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from born_again import BornAgainTrainer, BornAgainTrainingArguments
from born_again.training.processes import ProcessesMixin


class Normalised(Network):
    def __init__(self, seed):
        super().__init__(seed)
        self.norm = nn.BatchNorm1d(12, dtype=torch.float64)


def test_how_batchnorm_is_computed_is_said_and_not_on_one_process(tmp_path, monkeypatch, caplog):
    trainer = BornAgainTrainer(Normalised(1), arguments(tmp_path, loss_normalization="step"), train_dataset=vectors())
    with caplog.at_level(logging.INFO):
        trainer.begin_training()
        assert "BatchNorm" not in caplog.text
        monkeypatch.setattr(BornAgainTrainingArguments, "world_size", 2)
        trainer.begin_training()
    assert "BatchNorm: 1 layers normalise by the rows of each process alone (sync_batchnorm=True" in caplog.text


def test_synchronised_batchnorm_is_refused_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(BornAgainTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="sync_batchnorm: got True on a CPU, where torch.nn.SyncBatchNorm does not"):
        BornAgainTrainer(
            Normalised(1), arguments(tmp_path, sync_batchnorm=True), train_dataset=vectors(), teacher=Normalised(2)
        )


def test_synchronised_batchnorm_keeps_names_and_what_timm_computes_in_the_layer():
    student = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), nn.BatchNorm2d(4))
    names, weight = list(student.state_dict()), student[0][1].weight
    gpus = SimpleNamespace(sync_batchnorm=True, device=torch.device("cuda"))
    ProcessesMixin._synchronize_batchnorm(SimpleNamespace(_is_one_of_many=True, args=gpus), student)
    assert isinstance(student[0][1], SyncBatchNormAct) and isinstance(student[1], nn.SyncBatchNorm)
    assert list(student.state_dict()) == names and student[0][1].weight is weight


def test_random_numbers_after_a_checkpoint_of_another_number_of_processes_are_new(tmp_path):
    """Trainer finds no state, and would go on with the dropout masks of the first steps."""
    args = arguments(tmp_path, loss_normalization="step", save_strategy="steps", save_steps=2)
    trainer = BornAgainTrainer(Network(1, dropout=0.5), args, train_dataset=vectors())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"

    def loaded():
        torch.manual_seed(args.seed)
        trainer._load_rng_state(str(checkpoint))
        return torch.rand(3)

    torch.manual_seed(args.seed)
    first, own = torch.rand(3), loaded()
    assert torch.equal(own, loaded()) and not torch.equal(own, first)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state_1.pth").write_bytes((checkpoint / "rng_state_0.pth").read_bytes())
    new = loaded()
    assert torch.equal(new, loaded()) and not torch.equal(new, first) and not torch.equal(new, own)
