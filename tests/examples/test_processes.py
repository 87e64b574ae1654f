"""What the scripts make of the number of processes that a launcher has started."""

import pytest
from example_scripts import load_example


def parsed(monkeypatch, tmp_path, script, processes, *flags):
    """The recipe's values on the first of so many processes, which stops before it would join the others."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    example = load_example(script)
    seen = {}

    def recipe(args):
        seen.update(example.recipe(args))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        example.parse_arguments(
            (example.LineageArguments, example.BornAgainTrainingArguments),
            recipe,
            ["--output_dir", str(tmp_path), *flags],
        )
    return seen


@pytest.mark.parametrize("processes", [3, 256])
def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path, monkeypatch, processes):
    with pytest.raises(
        ValueError, match=f"recipe's batch of 128 cannot be .* to {processes} processes; start 1, 2, 4"
    ):
        parsed(monkeypatch, tmp_path, "run_cifar", processes)
    with pytest.raises(
        ValueError, match=f"recipe's batch of 20 cannot be shared out equally to {processes} processes"
    ):
        parsed(monkeypatch, tmp_path, "run_ptb", processes)
    own = parsed(monkeypatch, tmp_path, "run_cifar", processes, "--per_device_train_batch_size", "5")
    assert own["per_device_train_batch_size"] == 128  # the default that the flag replaces


def test_a_batch_is_that_of_all_processes(tmp_path, monkeypatch):
    values = parsed(monkeypatch, tmp_path, "run_cifar", 4)
    assert values["per_device_train_batch_size"] == 32 and values["ddp_timeout"] == 600
    assert values["ddp_find_unused_parameters"] is False
    other = parsed(monkeypatch, tmp_path, "run_cifar", 4, "--student_model", "resnet18")
    assert "ddp_find_unused_parameters" not in other
    values = parsed(monkeypatch, tmp_path, "run_ptb", 5)
    assert values["per_device_train_batch_size"] == 20 and values["per_device_eval_batch_size"] == 5
