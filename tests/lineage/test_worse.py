"""Students that are clearly worse than their teacher: the rule, the reason, and the lineage that ends there."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from card_manifests import manifest, record
from helpers import Network, arguments, vectors
from tiny_lineage import hashes, runner

from born_again import BornAgainTrainer
from born_again.hub.model_card import image_classifier_card, language_model_card
from born_again.lineage import worse
from born_again.lineage.manifest import Manifest
from born_again.lineage.status import lineage_status, results_table
from born_again.lineage.worse import is_clearly_worse, nll_difference, worse_than_teacher
from born_again.objectives import OBJECTIVES_WITH_LABELS
from born_again.training.teacher_accuracy import FITTED_ACCURACY


def images(theirs, ours, **changes):
    """Of 1,000 test images, so that two standard errors at 90 % are 1.9 points."""
    accuracies = [{"metrics": {"test": {"accuracy": value}}} for value in (theirs, ours)]
    spec = {"objective": changes.pop("objective", "ban"), "generations": 1, "training": changes.pop("training", {})}
    records = [record(0, **accuracies[0]), record(1, **{**accuracies[1], "objective": spec["objective"], **changes})]
    return manifest(*records, data={"rows": {"train": 300, "test": 1000}}, **spec)


def texts(theirs, ours, **changes):
    records = []
    for index, value in enumerate((theirs, ours)):
        metrics = {"test": {"perplexity": value, "nll": value and math.log(value), "tokens": 900}}
        records.append(record(index, "text", **{"metrics": metrics, **(changes if index else {})}))
    return manifest(*records, kind="text", generations=1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (images(0.900, 0.880), False),  # two standard errors at 88 % are 2.06 points
        (images(0.900, 0.879), True),
        (images(0.900, 0.950), False),
        (images(1.000, 0.995), True),
        (images(1.000, 1.000), False),
        (texts(100.0, 101.9), False),
        (texts(100.0, 102.1), True),
        (texts(100.0, 90.0), False),
        (texts(100.0, 101.5, nll_difference={"mean": 0.0149, "standard_error": 0.002}), True),
        (texts(100.0, 101.5, nll_difference={"mean": 0.0149, "standard_error": 0.008}), False),
        (texts(100.0, 100.9, nll_difference={"mean": 0.0090, "standard_error": 0.001}), False),
        (texts(100.0, None), True),  # infinite
        (texts(None, 100.0), False),
    ],
)
def test_the_rule(content, expected):
    assert is_clearly_worse(content, 1) == expected and not is_clearly_worse(content, 0)
    assert bool(worse_than_teacher(content, 1)) == expected
    assert results_table(content).count("*") == expected


def test_what_was_not_measured_is_not_worse():
    unknown = images(0.9, 0.1)
    unknown["data"] = {}
    assert not is_clearly_worse(unknown, 1) and not is_clearly_worse(images(0.9, None), 1)


def test_the_difference_of_texts_is_that_of_paired_blocks():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 30, 4000).astype(np.int32)
    teacher = {"nll_sum": generator.normal(4 * tokens, 3 * np.sqrt(tokens)), "tokens": tokens}
    student = {**teacher, "nll_sum": teacher["nll_sum"] + generator.normal(0.05 * tokens, 0.4 * np.sqrt(tokens))}
    found = nll_difference(student, teacher)
    draws = generator.integers(0, len(tokens), (400, len(tokens)))
    change = student["nll_sum"] - teacher["nll_sum"]
    means = change[draws].sum(1) / tokens[draws].sum(1)
    assert found["mean"] == pytest.approx(change.sum() / tokens.sum())
    assert found["standard_error"] == pytest.approx(means.std(), rel=0.1)  # the bootstrap's
    assert nll_difference(student, {**teacher, "tokens": tokens[::-1]}) is None
    assert nll_difference({"nll": change}, {"nll": change}) is None


FITTED, UNFITTED = {"accuracy": 1.0, "samples": 9}, {"accuracy": 0.9, "samples": 9}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_fit": UNFITTED}, "the teacher is right on 90.0% .* objective 'ban' has no term .*'ban+l'"),
        ({"teacher_fit": FITTED, "train_fit": UNFITTED, "steps": 200},
         "after 200 steps the student is right on 90.0% .* its teacher on 100.0%; train longer.*, or use .*'ban+l'"),
        ({"teacher_fit": FITTED, "train_fit": UNFITTED, "objective": "ban+l"}, "teacher on 100.0%; train longer .*.$"),
        ({"teacher_fit": UNFITTED, "objective": "ban+l"}, "What was recorded shows no reason"),
        ({"teacher_fit": UNFITTED, "training": {"teacher_annealing": True}}, "What was recorded shows no reason"),
        ({"teacher_fit": FITTED, "train_fit": FITTED, "objective": "dkpp"}, "'dkpp' permutes what the teacher knows"),
        ({"teacher_fit": UNFITTED, "objective": "custom: a.b"}, "no reason .460 steps, objective 'custom: a.b'"),
    ],
)  # fmt: skip
def test_the_likely_reason_and_the_remedy(changes, words):
    drop, *reasons = worse_than_teacher(images(0.94, 0.862, **changes), 1)
    assert drop == (
        "Generation 1 is clearly worse than its teacher: test accuracy 86.20% after 94.00%, and two standard errors "
        "of 1,000 test images are 2.18 points."
    )
    assert re.search(words.replace("'ban+l'", r"'ban\+l'"), " ".join(reasons))


def test_the_constants_are_those_of_the_modules_that_import_torch():
    assert worse._FITTED_ACCURACY == FITTED_ACCURACY and worse._WITH_LABELS == OBJECTIVES_WITH_LABELS


def test_the_card_says_it():
    content = images(0.94, 0.862, teacher_fit=UNFITTED)
    card = image_classifier_card(content, 1)
    plain = card.replace("\\", "")
    assert all(sentence in plain for sentence in worse_than_teacher(content, 1))
    assert "-7.80 *" in card and "A star beside the gain means clearly worse" in card
    assert "worse" not in image_classifier_card(images(0.9, 0.9), 1) and "worse" not in image_classifier_card(
        content, 0
    )
    assert "objective 'ban+l' has no term" not in language_model_card(texts(80.0, 90.0), 1)
    assert "test perplexity 90.00 after 80.00, more than 2% higher" in language_model_card(texts(80.0, 90.0), 1)


def test_the_training_accuracy_of_a_student(tmp_path):
    data = vectors(24, ignored=(3,))
    trainer = BornAgainTrainer(Network(1), arguments(tmp_path), train_dataset=data, teacher=Network(2))
    trainer.train()
    batch = {name: torch.stack([row[name] for row in data]) for name in ("x", "labels")}
    counted = batch["labels"] != -100
    right = trainer.model(batch["x"])["logits"].argmax(-1) == batch["labels"]
    trainer.model.train()
    assert trainer.evaluate_student() == {"accuracy": right[counted].double().mean().item(), "samples": 24}
    assert trainer.model.training


def measured(accuracies):
    """An `evaluate` by which generation k has the k-th accuracy."""
    values = iter(accuracies)
    return lambda model: {"test": {"accuracy": next(values)}}


DATA = {"sha256": "a", "rows": {"train": 22, "test": 1000}}


def lineage(folder, accuracies, **options):
    return runner(folder, evaluate=measured(accuracies), data=DATA, ensembles=(), **options)


def test_a_lineage_ends_after_a_student_that_is_clearly_worse_and_goes_on_without_the_flag(tmp_path, caplog):
    folder = tmp_path / "out"
    caplog.set_level(logging.WARNING)
    stopped = lineage(folder, [0.9, 0.5], stop_when_worse=True)
    stopped.run()
    assert "Generation 1 is clearly worse than its teacher: test accuracy 50.00% after 90.00%" in caplog.text
    read = Manifest.read(folder)
    assert len(read.generations) == 2 and read.spec.generations == 1
    fit = read.record(1)["train_fit"]
    assert fit["samples"] == 22 and 0 <= fit["accuracy"] <= 1 and read.record(0).get("train_fit") is None
    status = lineage_status(folder)
    assert status["next"]["action"] == "nothing" and status["stopped_when_worse"] == {"generations": 2}
    assert "stopped after generation 1 of 2" in status["next"]["text"]
    assert "clearly worse" in status["generations"][1]["worse"] and status["generations"][0]["worse"] is None
    again = lineage(folder, [], stop_when_worse=True, built=(built := []))
    assert again.is_finished()
    again.run()
    assert built == []
    lineage(folder, [0.6]).run()
    assert len(hashes(folder)) == 3 and Manifest.read(folder).spec.generations == 2
    assert "stopped_when_worse" not in Manifest.read(folder).content
    # As one that was never stopped.
    lineage(tmp_path / "whole", [0.9, 0.5, 0.6]).run()
    assert hashes(tmp_path / "whole") == hashes(folder)


def test_a_student_that_is_no_worse_ends_nothing(tmp_path):
    lineage(tmp_path / "out", [0.9, 0.89, 0.9], stop_when_worse=True).run()
    content = Manifest.read(tmp_path / "out").content
    assert len(content["generations"]) == 3 and all("train_fit" not in own for own in content["generations"])
