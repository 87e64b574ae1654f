"""The spec is frozen and hashed; the manifest is checked on reading and written in one step."""

import dataclasses
import json
import os

import pytest

from born_again import LineageSpec
from born_again._files import replaced_atomically, write_atomically
from born_again.lineage.manifest import Manifest
from born_again.lineage.spec import plain_name


def spec(**changes):
    values = {"name": "a-b", "model": "a", "dataset": "b", "training": {"learning_rate": 0.1, "lr_milestones": [0.5]}}
    return LineageSpec(**{**values, **changes})


def test_spec_round_trips_and_is_frozen():
    assert LineageSpec.from_dict(json.loads(json.dumps(spec().to_dict()))) == spec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().seed = 3


def test_hash_changes_with_the_weights_and_not_with_the_number_of_generations():
    assert spec().sha256() == spec().sha256() == spec(generations=9).sha256()
    others = [spec(seed=1), spec(objective="ban+l"), spec(model="c"), spec(training={"learning_rate": 0.2})]
    assert len({other.sha256() for other in [spec(), *others]}) == 5


def test_students_of_another_architecture():
    other = spec(model_args={"a": 1}, student_model="c", student_model_args={"depth": 3})
    assert [other.model_of(k) for k in range(3)] == ["a", "c", "c"]
    assert [other.model_args_of(k) for k in range(3)] == [{"a": 1}, {"depth": 3}, {"depth": 3}]
    assert [spec(model_args={"a": 1}).model_args_of(k) for k in range(2)] == [{"a": 1}, {"a": 1}]
    assert LineageSpec.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    assert other.differences(spec(model_args={"a": 1})) == [
        "student_model: 'c' here, 'default' there",
        "student_model_args.depth: 3 here, 'default' there",
    ]
    assert len({one.sha256() for one in (spec(), spec(student_model="a"), spec(share_teacher_ends=True))}) == 3


def test_later_fields_at_their_defaults_are_not_in_the_hash():
    assert not {"student_model", "student_model_args", "share_teacher_ends"} & spec().to_dict().keys()
    assert (
        spec().sha256() == "1a84efcd500c958572c52ee0377b009e9ac1113db8e6c76449baa5df07c1875a"
    )  # as before they existed


def test_differences_name_fields_and_both_values():
    other = spec(seed=1, generations=9, training={"learning_rate": 0.2, "lr_milestones": [0.5], "bf16": True})
    assert spec().differences(other) == [
        "seed: 42 here, 1 there",
        "training.bf16: 'default' here, True there",
        "training.learning_rate: 0.1 here, 0.2 there",
    ]
    assert spec().differences(spec(generations=9)) == []


@pytest.mark.parametrize(("old", "new"), [("plain", "full"), ("chunked", "chunked")])
def test_an_argument_recorded_under_its_old_name_is_the_same(old, new):
    recorded, asked = (spec(training=training) for training in ({"loss_form": old}, {"loss_implementation": new}))
    assert asked.differences(recorded) == []
    assert f"training.loss_implementation: 'default' here, {new!r} there" in spec().differences(recorded)


def test_seeds_and_objectives_of_generations():
    assert [spec(seed=5).seed_of(k) for k in range(3)] == [5, 6, 7]
    assert [spec(objective="cwtm").objective_of(k) for k in range(3)] == ["label", "cwtm", "cwtm"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generations": -1}, "generations: got -1, expected 0 or more students"),
        ({"generations": 1.5}, "generations: got 1.5, expected a whole number"),
        ({"seed": "7"}, "seed: got '7', expected a whole number"),
        ({"name": ""}, "name: got '', expected a text that is not empty"),
        ({"name": "../../x"}, r"name: got '../../x', expected at most 90 letters, .* give a plain name"),
        ({"name": "a b"}, "name: got 'a b', expected at most 90 letters"),
        ({"name": ".."}, "name: got '..', expected at most 90 letters"),
        ({"name": "a" * 91}, "name: got 'a+', expected at most 90 letters"),
        ({"student_model": ""}, "student_model: got '', expected a text that is not empty, or None"),
        ({"student_model_args": {"depth": 3}}, "student_model_args: got {'depth': 3} without a student_model, exp"),
        ({"share_teacher_ends": "yes"}, "share_teacher_ends: got 'yes', expected True or False"),
        ({"model_args": {"a": object()}}, "model_args: expected a mapping of JSON values"),
        ({"training": {"a": float("nan")}}, "training: expected a mapping of JSON values"),
    ],
)
def test_spec_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lstm-small-ptb", "lstm-small-ptb"),
        ("wide-resnet-my data", "wide-resnet-my-data"),
        ("densenet-", "densenet"),
        ("a/../b", "a-..-b"),
        ("x" * 200, "x" * 90),
    ],
)
def test_a_name_is_made_plain(text, name):
    assert plain_name(text) == name
    assert spec(name=plain_name(text)).name == name


def test_spec_refuses_unknown_and_missing_fields():
    with pytest.raises(ValueError, match="spec: got the unknown field 'objectiv'; did you mean 'objective'"):
        LineageSpec.from_dict({**spec().to_dict(), "objectiv": "ban"})
    with pytest.raises(ValueError, match="spec: the field 'model' is missing"):
        LineageSpec.from_dict({"name": "a", "dataset": "b"})


def test_manifest_round_trips(tmp_path):
    manifest = Manifest.create(tmp_path, spec(), {"rows": {"train": 3}})
    manifest.update(0, status="finished", weights_sha256="0" * 64, metrics={"test": {"accuracy": 1.0}})
    manifest.update(0, seed=42, parent=None, objective="label", seconds=0.0, versions={})
    manifest.save()
    read = Manifest.read(tmp_path)
    assert read.content == manifest.content
    assert read.spec == spec() and read.record(0)["index"] == 0 and read.record(1) is None


@pytest.mark.parametrize("content", ["é\n", b"\xff"])
def test_a_write_that_breaks_off_leaves_the_old_content(tmp_path, monkeypatch, content):
    path = tmp_path / "new" / "lineage.json"
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert path.stat().st_mode & 0o777 == 0o644

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt), replaced_atomically(path) as temporary:
        temporary.write_text("a part")
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "other")
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [entry.name for entry in path.parent.iterdir()] == ["lineage.json"]
