"""What changed since a lineage was begun, in ways that no argument shows."""

import functools
import json

import datasets
import numpy as np
import pytest
import timm
import torch
from any_lineage import classifier, lineage, pixels, rows
from helpers import arguments, sequence_classifier
from transformers import AutoModelForSequenceClassification

from born_again.any_model.begun_with import code_sha256
from born_again.data.fingerprint import transformed_sha256
from born_again.lineage.manifest import LineageError

NOT_THE_SAME = "not the same as where the lineage in .* was begun: "


def edit(folder, **changes):
    """Changes the record as an earlier version, or other versions of the libraries, would have written it."""
    path = folder / "lineage.json"
    content = json.loads(path.read_text())
    content["data"]["begun_with"] = {**content["data"]["begun_with"], **changes} if changes else None
    if not changes:
        del content["data"]["begun_with"]
    path.write_text(json.dumps(content))


def test_other_pretrained_weights_under_the_same_path(tmp_path, caplog):
    def save(seed):
        model = sequence_classifier(seed).float()
        model.classifier = torch.nn.Linear(16, 2)
        model.config.num_labels = 2
        model.save_pretrained(tmp_path / "start")

    def make():
        return AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "start", num_labels=4, ignore_mismatched_sizes=True
        )

    save(0)
    own = functools.partial(lineage, tmp_path / "own", make)
    own(generations=0, changes={"max_steps": 1}).run()
    assert own(changes={"max_steps": 1}).starting_point == str(tmp_path / "start")
    save(1)
    with pytest.raises(LineageError, match=NOT_THE_SAME + "the pretrained weights that model_init loads. Give"):
        own(changes={"max_steps": 1})
    edit(tmp_path / "own", versions={"torch": "2.0"})
    own(changes={"max_steps": 1})
    assert "the pretrained weights that model_init loads. Other versions of the libraries may be the" in caplog.text
    edit(tmp_path / "own")
    own(changes={"max_steps": 1})  # of an earlier version


def test_other_dropout_of_a_network_of_timm(tmp_path):
    def own(rate):
        make = functools.partial(timm.create_model, "test_resnet", num_classes=3, drop_rate=rate)
        return lineage(tmp_path, make, data=pixels(32, 6), generations=0, changes={"max_steps": 1})

    own(0.0).run()
    own(0.0)
    with pytest.raises(LineageError, match=NOT_THE_SAME + "the modules of the network"):
        own(0.5)


def test_another_transform_of_the_same_rows(tmp_path):
    def own(scale, noise=0.0):
        def transform(batch):
            images = torch.as_tensor(np.array(batch["pixel_values"])) * scale + noise * torch.randn(())
            return {"pixel_values": list(images), "labels": batch["labels"]}

        data = pixels(32, 6).with_transform(transform)
        make = functools.partial(timm.create_model, "test_resnet", num_classes=3)
        return lineage(tmp_path, make, data=data, generations=0, changes={"max_steps": 1})

    own(1.0, 0.1).run()
    own(1.0, 0.1)  # random, at a fixed seed
    own(1.0 + 1e-7, 0.1)  # as another machine might round
    with pytest.raises(LineageError, match=NOT_THE_SAME + "what the transforms of the datasets make of a row"):
        own(2.0, 0.1)


def test_a_mirrored_row_has_another_hash_and_one_that_is_never_the_same_has_none():
    data = datasets.Dataset.from_dict({"x": [[0.0, 1.0, 5.0]] * 3})
    one, other = (
        transformed_sha256(data.with_transform(change))
        for change in (
            lambda batch: {"x": [torch.tensor(row) for row in batch["x"]]},
            lambda batch: {"x": [torch.tensor(row).flip(0) for row in batch["x"]]},
        )
    )
    assert one != other and None not in (one, other)
    count = iter(range(10**6))
    assert transformed_sha256(data.with_transform(lambda batch: {"x": [next(count) for _ in batch["x"]]})) is None
    assert transformed_sha256(data) is None


def weighted(weight):
    def loss(student_logits, teacher_logits, labels):
        losses = -(teacher_logits.softmax(-1) * student_logits.log_softmax(-1)).sum(-1) * weight
        return losses, torch.ones_like(losses)

    return loss


def test_another_body_of_the_objective_is_warned_of(tmp_path, caplog):
    own = functools.partial(lineage, tmp_path, classifier, data=rows(), generations=0)
    changes = {"max_steps": 1, "objective": arguments(tmp_path).objective}
    own(objective=weighted(1.0), changes=changes).run()
    own(objective=weighted(1.0), changes=changes)
    assert "another body" not in caplog.text
    own(objective=weighted(5.0), changes=changes)
    assert "objective: the function has another body than where the lineage in" in caplog.text
    assert code_sha256(len) is None and code_sha256(functools.partial(weighted, 2)) == code_sha256(weighted)
