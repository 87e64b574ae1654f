"""When the scripts save checkpoints."""

import pytest
from example_scripts import load_example

BEST = ["--load_best_model_at_end", "True", "--eval_strategy", "epoch", "--metric_for_best_model", "loss"]
STEPS = ["--eval_strategy", "steps", "--eval_steps", "7"]


@pytest.mark.parametrize(
    ("script", "flags", "strategy", "minutes"),
    [
        ("run_cifar", [], "no", 5.0),
        ("run_cifar", ["--save_minutes", "2"], "no", 2.0),
        ("run_cifar", BEST, "best", 5.0),
        ("run_cifar", ["--save_strategy", "epoch"], "epoch", None),
        ("run_cifar", ["--save_strategy", "epoch", "--save_minutes", "2"], "epoch", 2.0),
        ("run_cifar", ["--save_steps", "7"], "steps", None),
        ("run_ptb", [], "best", 5.0),
        ("run_ptb", ["--load_best_model_at_end", "False"], "no", 5.0),
        ("run_ptb", ["--save_strategy", "epoch"], "epoch", None),
        ("run_ptb", [*STEPS, "--save_steps", "7"], "steps", None),
    ],
)
def test_checkpoints_are_saved_by_time_unless_a_flag_says_when(tmp_path, script, flags, strategy, minutes):
    example = load_example(script)
    lineage, training = example.parse_arguments(
        (example.LineageArguments, example.BornAgainTrainingArguments),
        example.recipe,
        ["--output_dir", str(tmp_path), *flags],
    )
    assert (training.save_strategy.value, lineage.save_minutes) == (strategy, minutes)
    assert training.save_steps == (7 if "--save_steps" in flags else 500)
