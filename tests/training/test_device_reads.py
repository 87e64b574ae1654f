"""What is logged is read from the device at once, and is what it would be."""

from helpers import Network, arguments, vectors

from born_again import BornAgainTrainer
from born_again.training import device_reads

SETTINGS = {"logging_steps": 2, "max_steps": 6, "max_grad_norm": 1.0}


def logged(folder):
    trainer = BornAgainTrainer(Network(1), arguments(folder, **SETTINGS), train_dataset=vectors(), teacher=Network(2))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_log_waits_once_and_says_the_same(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(device_reads.DeviceReadsMixin, "_read_together", lambda self, *args: args)
        expected = logged(tmp_path)
    reads, to_host = [], device_reads.to_host

    def counted(tensors):
        reads.append(len(tensors))
        return to_host(tensors)

    monkeypatch.setattr(device_reads, "to_host", counted)
    assert logged(tmp_path) == expected
    metrics = expected[0].keys() - {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    # Beside the metrics and their items: loss, norm, the first loss that is not finite; labels not on a CPU.
    assert len(expected) == 3 and reads == [len(metrics) + 1 + 3] * 3
