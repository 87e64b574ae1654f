"""Evaluations for a curve: cheap, said, and without a trace in the weights."""

import json

import pytest
from example_scripts import load_example

from born_again.lineage.curve import SHARE, plan_curve

SHORT = ["--smoke", "--threads", "1", "--max_train_samples", "64", "--max_eval_samples", "48", "--dropout", "0.3"]
SHORT += ["--generations", "1", "--bf16", "False", "--num_train_epochs", "5", "--per_device_train_batch_size", "32"]


@pytest.mark.parametrize(
    ("items", "rows", "asked", "chosen"),
    [
        (40 * 600, 1197, None, (144, 5)),  # the digits
        (200 * 50_000, 10_000, None, (1024, 20)),  # the paper's CIFAR
        (10 * 5_000, 1_000, None, (300, 5)),
        (2 * 512, 256, None, (0, 0)),  # too short
        (200 * 50_000, 10_000, 0, (0, 0)),
        (2 * 512, 256, 300, (256, 5)),
    ],
)
def test_a_curve_costs_little(items, rows, asked, chosen):
    count, evaluations = plan_curve(items, rows, asked)
    assert (count, evaluations) == chosen
    assert asked or count * evaluations <= SHARE * 3 * items


def test_the_weights_are_the_same_with_and_without_a_curve(tmp_path, capsys):
    lineages = {}
    for samples in ("0", "32"):
        words = [*SHORT, "--curve_samples", samples, "--output_dir", str(tmp_path / samples)]
        assert load_example("run_cifar").start(words) == 0
        lineages[samples] = json.loads((tmp_path / samples / "lineage.json").read_text())
        said = capsys.readouterr().out.splitlines()
        curves = [line for line in said if line.startswith("Curves: ")]
        evaluations = [line for line in said if "eval_loss" in line]
        if samples == "0":
            assert not curves and not evaluations
        else:
            (text,) = curves
            assert text.startswith("Curves: the same 32 images of the test split are evaluated 5 times a training, ")
            assert "selects nothing (--curve_samples 0 turns this off)" in text
            assert [line.split(" (")[0] for line in evaluations] == [
                f"generation {index} of 1, step {step} of 10" for index in (0, 1) for step in (2, 4, 6, 8, 10)
            ]
    without, with_curve = ([own["weights_sha256"] for own in one["generations"]] for one in lineages.values())
    assert without == with_curve and lineages["0"]["spec"] == lineages["32"]["spec"]


@pytest.mark.parametrize(
    ("words", "split", "rows"),
    [
        (["--validation_fraction", "0.5"], "validation", 32),
        ([], "test", 48),  # no more than there are
        (["--eval_strategy", "epoch"], None, 48),
    ],
)
def test_which_images_a_curve_is_of(tmp_path, words, split, rows):
    script = load_example("run_cifar")
    words = [*SHORT, *words, "--curve_samples", "100", "--output_dir", str(tmp_path)]
    lineage, training = script.parse_arguments(
        (script.LineageArguments, script.BornAgainTrainingArguments), script.recipe, words
    )
    data = script.load_images(
        "digits", max_train_samples=64, max_eval_samples=48, validation_fraction=lineage.validation_fraction
    )
    before = training.eval_strategy
    part, said = script.curve_split(data, lineage, training)
    assert len(part) == rows
    assert f"of the {split} split" in said if split else (said == "" and training.eval_strategy == before)


def test_a_curve_of_fewer_than_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="curve_samples: got -1, expected 0 .* or more rows"):
        load_example("run_cifar").start([*SHORT, "--curve_samples", "-1", "--output_dir", str(tmp_path)])
