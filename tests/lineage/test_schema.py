"""lineage.json is a contract: what it may hold, and what is said of anything else."""

import json
import os
from pathlib import Path

import pytest
from manifests import SPEC, content, record, training
from pydantic import ValidationError

from born_again.lineage.manifest import MAX_BYTES, LineageError, Manifest, _Finished, is_repo_id


def read(folder, values):
    (folder / "lineage.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return Manifest.read(folder)


def test_what_the_runner_writes_is_read(tmp_path):
    manifest = read(tmp_path, content())
    assert manifest.content == content() and manifest.spec == SPEC
    assert read(tmp_path, content(generations=[])).generations == []


@pytest.mark.parametrize("name", ["images.json", "text.json"])
def test_what_version_0_1_0_wrote_is_written_again_byte_for_byte(tmp_path, name):
    written = (Path(__file__).parent / "begun_at_0_1_0" / name).read_text()
    read(tmp_path, written).save()
    assert (tmp_path / "lineage.json").read_text() == written


def test_fields_of_later_work_are_kept(tmp_path):
    values = content(record(0, curve=[[1, 2.5], {"a": None}]), note="é")
    read(tmp_path, values).save()
    assert Manifest.read(tmp_path).content == values


def test_more_generations_leave_the_hash_of_the_spec(tmp_path):
    values = content()
    values["spec"]["generations"] = 9
    assert read(tmp_path, values).spec.generations == 9


def test_a_spec_written_before_a_field_was_added_keeps_its_hash(tmp_path):
    """Its hash is of what stands there, and the field that is missing has its default."""
    from born_again.lineage.spec import spec_sha256

    older = {"name": "a", "model": "b", "dataset": "c"}
    values = content(generations=[], name="a", spec=older, spec_sha256=spec_sha256(older))
    assert read(tmp_path, values).spec.objective == "ban"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "the field 'format' is wrong, expected 'born_again.lineage', got 'other'; restore"),
        ({"version": "1"}, "the field 'version' is wrong, expected a whole number above 0, got '1'"),
        ({"version": True}, "the field 'version' is wrong"),
        ({"version": 2}, "has version 2, this born_again reads up to 1; upgrade born-again"),
        ({"spec": []}, r"the field 'spec' is wrong, expected an object, got \[\]"),
        ({"spec": {"name": "a"}}, "the field 'spec' is wrong: spec: the field 'model' is missing"),
        ({"spec": {**SPEC.to_dict(), "seed": 1.5}}, "the field 'spec' is wrong: seed: got 1.5"),
        ({"spec": {**SPEC.to_dict(), "name": "../../x"}}, "the field 'spec' is wrong: name: got '../../x'"),
        ({"name": "../../x"}, "the field 'name' is wrong, expected that of the spec, 'tiny-words', got '../../x'"),
        ({"spec": {**SPEC.to_dict(), "seed": 4}}, "the field 'spec_sha256' is wrong, expected the hash of the spec"),
        ({"data": None}, "the field 'data' is wrong, expected an object, got None"),
        ({"generations": {}}, r"the field 'generations' is wrong, expected a list, got {}"),
        ({"generations": [record(k) for k in range(5)]}, "5 of them"),
        (
            {"data": {"a": {"b": [10**30]}}},
            r"the field 'data.a.b\[0\]' is wrong, expected a number of at most 64",
        ),
    ],
)
def test_the_wrong_field_is_named(tmp_path, change, message):
    with pytest.raises(LineageError, match=message):
        read(tmp_path, content(**change))


@pytest.mark.parametrize("field", ["format", "version", "spec", "name", "spec_sha256", "data", "generations"])
def test_a_missing_field_is_named(tmp_path, field):
    values = content()
    del values[field]
    with pytest.raises(LineageError, match=f"the field '{field}' is wrong, expected .*, got nothing; restore"):
        read(tmp_path, values)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("index", 2, "expected 1, got 2"),
        ("index", True, "expected 1, got True"),
        ("status", "done", "expected 'training' or 'finished', got 'done'"),
        ("status", ["finished"], "expected 'training' or 'finished'"),
        ("seed", 1.0, "expected a whole number, or null where it is not known, got 1.0"),
        ("parent", None, "expected 0, got None"),
        ("parent", False, "expected 0, got False"),
        ("objective", "", "expected a text that is not empty, got ''"),
        ("weights_sha256", None, r"expected a SHA-256 \(64 of 0-9 and a-f\), got None"),
        ("weights_sha256", "A" * 64, "expected a SHA-256"),
        ("weights_sha256", "0" * 65, "expected a SHA-256"),
        ("metrics", {"test": 0.5}, "expected an object of numbers or null, by split, got {'test': 0.5}"),
        ("metrics", {"test": {"accuracy": True}}, "expected an object of numbers or null"),
        ("metrics", {"test": {"accuracy": "0.5"}}, "expected an object of numbers or null"),
        ("seconds", -1, "expected a number of 0 or more, got -1"),
        ("seconds", "12", "expected a number of 0 or more"),
        ("versions", {"torch": 2}, "expected an object of texts"),
        ("hardware", None, "expected a text, got None"),
        ("hub", "owner/name", "expected an object with status 'pending' or 'published'"),
        ("teacher_fit", {"accuracy": []}, "expected an object of numbers or null"),
        ("parameters", -1, "expected a whole number of 0 or more, got -1"),
        ("steps", 1.5, "expected a whole number of 0 or more"),
        ("loss_normalization", "mean", "expected 'trainer' or 'step', got 'mean'"),
        ("computation", "bf16", "expected an object with mixed_precision, a text, got 'bf16'"),
        ("computation", {"processes": 1}, "expected an object with mixed_precision, a text"),
        ("peak_memory_mib", -1, "expected a whole number of 0 or more, or null"),
    ],
)
def test_the_wrong_field_of_a_generation_is_named(tmp_path, field, value, message):
    with pytest.raises(LineageError, match=rf"the field 'generations\[1\].{field}' is wrong, {message}"):
        read(tmp_path, content(record(0), record(1, **{field: value}), training(2)))


@pytest.mark.parametrize(
    "field",
    ["index", "status", "seed", "parent", "objective", "weights_sha256", "metrics", "seconds", "versions"],
)
def test_the_missing_field_of_a_generation_is_named(tmp_path, field):
    values = content(record(0), record(1))
    del values["generations"][1][field]
    with pytest.raises(
        LineageError, match=rf"the field 'generations\[1\].{field}' is wrong, expected .*, got nothing"
    ):
        read(tmp_path, values)


@pytest.mark.parametrize("repo", ["a/b", "A-b_c/d.e-gen0", "a/" + "b" * 96])
def test_names_that_the_hub_allows(repo):
    assert is_repo_id(repo)


@pytest.mark.parametrize(
    "repo",
    ["", "a", "a/b/c", "a--b/c", "a/b..c", "../b", "/b", "a/", "-a/b", "a/b.git", "a/b\n", "é/b", "a b/c", 3, None]
    + ["a/" + "b" * 97],
)
def test_names_that_the_hub_refuses(tmp_path, repo):
    """Nothing can have been published there; a publication that is waiting may have been begun under such a name."""
    assert not is_repo_id(repo)
    if isinstance(repo, str):
        state = {"status": "pending", "repo": repo, "commit": None}
        assert read(tmp_path, content(record(0, hub=state))).record(0)["hub"] == state
        with pytest.raises(LineageError, match=r"'generations\[0\].hub' is wrong, expected an object with status"):
            read(tmp_path, content(record(0, hub={**state, "status": "published"})))


def test_a_large_file_is_refused_at_the_first_wrong_value(tmp_path):
    """An error for each of them would fill the memory."""
    numbers = dict.fromkeys(map(str, range(20_000)), "")
    for changes in (
        {"metrics": {"test": numbers}},
        {"versions": dict.fromkeys(numbers, 1)},
        {"checkpoints": [1] * 20_000},
    ):
        with pytest.raises(ValidationError) as caught:
            _Finished.model_validate(record(0, **changes))
        assert caught.value.error_count() == 1


def test_a_generation_cannot_have_begun_before_its_teacher_was_finished(tmp_path):
    with pytest.raises(LineageError, match=r"'generations\[0\].status' is wrong, expected 'finished', since the gen"):
        read(tmp_path, content(training(0), record(1)))
    with pytest.raises(LineageError, match=r"the field 'generations\[0\]' is wrong, expected an object, got 3"):
        read(tmp_path, content(3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"data": NaN}', r"is not JSON \(NaN is no JSON number\)"),
        ('{"data": -Infinity}', r"is not JSON \(-Infinity is no JSON number\)"),
        ('{"data": 1e999}', "the field 'data' is wrong, expected a finite number, got inf"),
        (f'{{"data": {"9" * 5000}}}', "is not JSON"),
        ('{"a": {"b": 1, "b": 2}}', r"is not JSON \(the name 'b' stands twice in one object\)"),
        ('{"data": "\\ud800"}', "the field 'data' is wrong, expected valid Unicode"),
        ('{"\\ud800": 1}', "expected names of valid Unicode"),
        (f'{{"data": {"[" * 40}{"]" * 40}}}', "expected at most 32 levels of objects and lists, got more"),
        ("[]", "the field 'format' is wrong"),
        ("null", "the field 'format' is wrong"),
    ],
)
def test_text_that_is_no_manifest(tmp_path, text, message):
    with pytest.raises(LineageError, match=message):
        read(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "lineage.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(LineageError, match="is not JSON .*utf-8"):
        Manifest.read(tmp_path)


def test_a_file_too_large_for_a_manifest(tmp_path):
    with open(tmp_path / "lineage.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    with pytest.raises(LineageError, match="has 67,108,865 bytes, expected at most 67,108,864 of a manifest"):
        Manifest.read(tmp_path)


def test_no_file_and_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file, expected that of a lineage"):
        Manifest.read(tmp_path)
    (tmp_path / "lineage.json").mkdir()
    with pytest.raises(LineageError, match="is no file, expected the manifest of a lineage"):
        Manifest.read(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_links_out_of_the_folder_circles_and_pipes(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    read(tmp_path, content())
    manifest = folder / "lineage.json"
    manifest.symlink_to(tmp_path / "lineage.json")
    with pytest.raises(LineageError, match="is a link out of its folder, expected a file in it"):
        Manifest.read(folder)
    manifest.unlink()
    manifest.symlink_to("lineage.json")
    with pytest.raises(LineageError, match="cannot be read"):
        Manifest.read(folder)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(LineageError, match="is no file"):
        Manifest.read(folder)
    manifest.unlink()
    (folder / "copy.json").write_text(json.dumps(content()))
    manifest.symlink_to("copy.json")
    assert Manifest.read(folder).content == content()
