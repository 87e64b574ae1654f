"""From the Hub alone: lineages that come back, go on, and answer as they did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from example_scripts import load_example
from hub_store import Blob
from lineage_folders import WORDS, inputs, lineage, network

from born_again import LineageEnsemble, load_generation
from born_again.hub.client import Hub, HubError
from born_again.hub.files import HubSettings
from born_again.hub.launch import create_publisher, resume_lineage
from born_again.hub.publishing import publish_lineage
from born_again.hub.restoring import download_lineage, restore_lineage
from born_again.lineage.lock import FolderLock
from born_again.lineage.manifest import LineageError, Manifest
from born_again.lineage.spec import spec_sha256

SETTINGS = HubSettings("born-again")


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["image", "lstm"])
def any_kind(request, tmp_path_factory):
    return _made(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return _made("image", tmp_path_factory)


def _made(kind, tmp_path_factory) -> Path:
    words = [WORDS] * 3 if kind == "lstm" else None
    folder = lineage(tmp_path_factory.mktemp(kind) / "out", [network(kind, seed) for seed in range(3)], words=words)
    ensemble = LineageEnsemble.from_lineage(folder, [1, 2])
    metrics = {"test": {"nll": 1.0, "accuracy": 0.5} if kind == "image" else {"nll": 1.0, "perplexity": 8.0}}
    ensemble.save_pretrained(folder / "ensemble", metrics)
    manifest = Manifest.read(folder)
    hashes = [record["weights_sha256"] for record in manifest.generations[1:]]
    record = {"members": [1, 2], "average": "probabilities", "weights_sha256": hashes, "metrics": metrics}
    manifest.content["ensembles"] = [record]
    manifest.save()
    return folder


@pytest.fixture
def published(logged_in_hub, made, tmp_path) -> Path:
    """The folder, whose lineage is on the Hub."""
    folder = shutil.copytree(made, tmp_path / "published")
    assert publish_lineage(folder, "born-again") == {}
    return folder


def repository(hub, index):
    return hub.store.repositories["model", f"born-again/tiny-gen{index}"]


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_all_of_it_comes_back(logged_in_hub, any_kind, tmp_path):
    folder = shutil.copytree(any_kind, tmp_path / "published")
    assert publish_lineage(folder, "born-again") == {}
    back = tmp_path / "new" / "back"
    assert restore_lineage("tiny", SETTINGS, back) == 3
    assert sorted(path.name for path in back.iterdir()) == ["gen0", "gen1", "gen2", "lineage.json"]
    for index in range(3):
        for path in (folder / f"gen{index}").iterdir():
            assert (back / f"gen{index}" / path.name).is_file(), path.name
            if path.name == "config.json":
                assert json.loads((back / f"gen{index}/config.json").read_text()) == json.loads(path.read_text())
            elif path.name != "README.md":
                assert (back / f"gen{index}" / path.name).read_bytes() == path.read_bytes(), path.name
        assert load_generation(back / f"gen{index}") is not None
    before, after = Manifest.read(folder).content, Manifest.read(back).content
    assert {**before, "hub": None, "ensembles": None} == {**after, "hub": None, "ensembles": None}
    start = len(logged_in_hub.requests)
    assert list(publish_lineage(back)) == [] and "commit" not in logged_in_hub.made(start)
    assert left_over(back) == []


def test_nothing_comes_back_where_nothing_is(logged_in_hub, tmp_path):
    assert restore_lineage("tiny", SETTINGS, tmp_path / "back") == 0
    logged_in_hub.store.make("model", "born-again/tiny-gen0")  # as a preflight leaves it
    assert restore_lineage("tiny", SETTINGS, tmp_path / "back") == 0
    assert not (tmp_path / "back").exists()


def test_a_gap_ends_it(logged_in_hub, published, tmp_path):
    del logged_in_hub.store.repositories["model", "born-again/tiny-gen1"]
    assert restore_lineage("tiny", SETTINGS, tmp_path / "back") == 1
    (record,) = Manifest.read(tmp_path / "back").generations
    assert record["hub"] == Manifest.read(published).generations[0]["hub"] | {"commit": record["hub"]["commit"]}


def test_the_commits_that_students_name_are_known(logged_in_hub, published, tmp_path):
    """Not those of the cards that were renewed after them."""
    restore_lineage("tiny", SETTINGS, tmp_path / "back")
    commits = [
        [record["hub"]["commit"] for record in Manifest.read(folder).generations]
        for folder in (published, tmp_path / "back")
    ]
    assert commits[0] == commits[1] and commits[0][0] != repository(logged_in_hub, 0).branches["main"]


def other_weights(hub, commit="main"):
    """The teacher's, in the place of the first student's."""
    repository(hub, 1).at(commit).files["model.safetensors"] = repository(hub, 0).at("main").files["model.safetensors"]
    repository(hub, 1).objects |= repository(hub, 0).objects


def no_manifest(hub):
    repository(hub, 2).at("main").files["lineage.json"] = Blob(b"{}")


def no_json(hub):
    repository(hub, 2).at("main").files["lineage.json"] = Blob(b"<html>")


def of_another_name(hub):
    content = json.loads(repository(hub, 2).at("main").files["lineage.json"].data)
    content["name"] = content["spec"]["name"] = "other"
    content["spec_sha256"] = spec_sha256(content["spec"])
    repository(hub, 2).at("main").files["lineage.json"] = Blob(json.dumps(content).encode())


def of_another_generation(hub):
    repository(hub, 2).at("main").files["lineage.json"] = repository(hub, 1).at("main").files["lineage.json"]


def config_of_someone(hub):
    repository(hub, 0).at("main").files["config.json"] = Blob(b"[]")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (other_weights, LineageError, r"gen1.model\.safetensors: does not hash to what lineage\.json holds"),
        (no_manifest, LineageError, "the field 'format' is wrong, expected 'born_again.lineage', got nothing"),
        (no_json, LineageError, "lineage.json: is not JSON"),
        (of_another_name, LineageError, "is of generation 2 of 'other', expected generation 2 of 'tiny'; give the"),
        (of_another_generation, LineageError, "is of generation 1 of 'tiny', expected generation 2 of 'tiny'"),
        (config_of_someone, HubError, "'tiny' cannot be restored: .*config.json holds a list"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_what_is_no_such_lineage_is_refused(logged_in_hub, published, tmp_path, change, error, message, exists):
    back = tmp_path / "back"
    if exists:
        back.mkdir()
    change(logged_in_hub)
    with pytest.raises(error, match=message):
        restore_lineage("tiny", SETTINGS, back)
    assert back.exists() == exists and not (exists and [*back.iterdir()]) and left_over(back) == []


@pytest.mark.parametrize("name", ["lineage.json", "notes.txt", "gen0"])
def test_a_folder_that_holds_something_is_left_alone(hub, tmp_path, name):
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / name).write_text("mine")
    assert restore_lineage("tiny", SETTINGS, tmp_path / "back") == 0 and hub.made() == []
    (tmp_path / "file").write_text("mine")
    assert restore_lineage("tiny", SETTINGS, tmp_path / "file") == 0


def test_a_kill_in_the_middle_is_repeated(logged_in_hub, published, tmp_path, monkeypatch):
    back, whole = tmp_path / "back", Hub.download

    def die(self, repo, commit, folder):
        whole(self, repo, commit, folder)
        if folder.name == "gen1":
            shutil.copytree(folder.parent, tmp_path / "as_it_was")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Hub, "download", die)
        restore_lineage("tiny", SETTINGS, back)
    assert not back.exists() or not [*back.iterdir()]
    (tmp_path / "as_it_was").rename(tmp_path / ".back.restoring")  # what kill -9 leaves
    assert restore_lineage("tiny", SETTINGS, back) == 3 and left_over(back) == []
    assert len(Manifest.read(back).generations) == 3


def test_two_at_once(logged_in_hub, published, tmp_path):
    back = tmp_path / "back"
    with FolderLock(back), pytest.raises(LineageError, match="is in use by process"):
        restore_lineage("tiny", SETTINGS, back)
    assert restore_lineage("tiny", SETTINGS, back) == 3 and not (back / ".lineage.lock").exists()


def test_from_another_place(logged_in_hub, made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "published")
    values = {"name_pattern": "{name}.{index}", "private": True, "branch": "runs"}
    assert publish_lineage(folder, "tester", **values) == {}
    settings = HubSettings("tester", "{name}.{index}", True, "runs")
    monkeypatch.delenv("HF_TOKEN")
    assert restore_lineage("tiny", settings, tmp_path / "none") == 0  # nobody is told that they are there
    assert restore_lineage("tiny", settings, tmp_path / "back", token=logged_in_hub.token) == 3
    assert Manifest.read(tmp_path / "back").generations[0]["hub"]["repo"] == "tester/tiny.0"
    assert logged_in_hub.token not in (tmp_path / "back/lineage.json").read_text()


@pytest.mark.parametrize("defer", [True, False])
def test_a_hub_that_cannot_be_asked(logged_in_hub, tmp_path, caplog, defer):
    script = load_example("run_cifar")
    logged_in_hub.stop()
    words = [*words_of(tmp_path / "out"), "--push_to_hub", "True", "--hub_namespace", "born-again"]
    lineage_flags, training = script.parse_arguments(
        (script.LineageArguments, script.BornAgainTrainingArguments),
        script.recipe,
        [*words, "--hub_defer", str(defer)],
    )
    if defer:
        resume_lineage(lineage_flags, training)
        assert create_publisher(lineage_flags, training).defer
        assert "cannot be reached" in caplog.text and "A new lineage is begun." in caplog.text
    else:
        with pytest.raises(HubError, match="cannot be restored: http://.* cannot be reached .*Try again later"):
            resume_lineage(lineage_flags, training)
    assert not (tmp_path / "out").exists()


# ---- Going on ----


def words_of(folder: Path, generations: int = 1) -> list[str]:
    words = "--smoke --num_train_epochs 1 --threads 1 --disable_tqdm True --max_train_samples 64 --max_eval_samples 32"
    return [*words.split(), "--generations", str(generations), "--output_dir", str(folder)]


@pytest.mark.slow
def test_a_lineage_goes_on_from_the_hub_alone(logged_in_hub, tmp_path, capsys):
    start = load_example("run_cifar").start
    push = ["--push_to_hub", "True", "--hub_namespace", "born-again"]
    assert start(words_of(tmp_path / "never_interrupted")) == 0
    assert start([*words_of(tmp_path / "first", 0), *push]) == 0
    shutil.rmtree(tmp_path / "first")
    assert start([*words_of(tmp_path / "second"), *push]) == 0
    expected, found = (Manifest.read(tmp_path / name) for name in ("never_interrupted", "second"))
    for one, other in zip(expected.generations, found.generations, strict=True):
        assert one["weights_sha256"] == other["weights_sha256"] and one["metrics"] == other["metrics"]
    name = found.spec.name
    assert [id for _, id in logged_in_hub.store.repositories] == [f"born-again/{name}-gen{index}" for index in (0, 1)]
    for index in range(2):
        commits = [
            c.title for c in logged_in_hub.store.repositories["model", f"born-again/{name}-gen{index}"].history()
        ]
        assert commits.count(f"Generation {index} of {name}") == 1
    # Once more there is nothing to do.
    begin = len(logged_in_hub.requests)
    assert start([*words_of(tmp_path / "second"), *push]) == 0 and logged_in_hub.made(begin) == []


# ---- Loading ----


@pytest.mark.parametrize("sequential", [False, True])
def test_the_ensemble_answers_as_at_home(logged_in_hub, any_kind, tmp_path, sequential):
    folder = shutil.copytree(any_kind, tmp_path / "published")
    assert publish_lineage(folder, "born-again") == {}
    kind = "lstm" if (folder / "gen0/tokenizer.json").exists() else "image"
    here = LineageEnsemble.from_pretrained(folder / "ensemble")
    there = LineageEnsemble.from_pretrained("born-again/tiny-ensemble", sequential=sequential)
    assert [member.commit for member in there.members] == [
        record["hub"]["commit"] for record in Manifest.read(folder).generations[1:]
    ]
    assert torch.equal(here(inputs(kind)).logits, there(inputs(kind)).logits)
    one = load_generation("born-again/tiny-gen1")
    with torch.no_grad():
        assert torch.equal(one(inputs(kind)).logits, load_generation(folder / "gen1")(inputs(kind)).logits)


def edited(hub, **changes):
    files = hub.store.repositories["model", "born-again/tiny-ensemble"].at("main").files
    content = json.loads(files["ensemble.json"].data)
    content["members"][0].update(changes)
    files["ensemble.json"] = Blob(json.dumps(content).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo": "../tiny-gen1"}, r"the field 'members\[0\].repo' is '../tiny-gen1', expected a repository"),
        ({"repo": None}, r"'members\[0\].repo' is None"),
        ({"repo": "a..b/c"}, r"'members\[0\].repo' is"),
        ({"commit": "main"}, r"'members\[0\].commit' is 'main', expected a commit, 40 hexadecimal digits"),
        ({"commit": None}, r"'members\[0\].commit' is None"),
        ({"weights_sha256": "0" * 64}, "does not match the recorded hash of generation 1"),
        ({"folder": "../../x"}, r"'members\[0\].folder' is '../../x'"),
    ],
)
def test_an_ensemble_that_was_changed_is_refused(logged_in_hub, published, changes, message):
    edited(logged_in_hub, **changes)
    with pytest.raises(LineageError, match=message):
        LineageEnsemble.from_pretrained("born-again/tiny-ensemble")


def test_a_member_that_was_changed_is_refused(logged_in_hub, published):
    commit = Manifest.read(published).generations[1]["hub"]["commit"]
    other_weights(logged_in_hub, commit)
    with pytest.raises(LineageError, match="does not match the recorded hash of generation 1"):
        LineageEnsemble.from_pretrained("born-again/tiny-ensemble")


def test_what_was_published_cannot_be_saved_or_is_not_there(logged_in_hub, published, tmp_path):
    ensemble = LineageEnsemble.from_pretrained("born-again/tiny-ensemble")
    with pytest.raises(LineageError, match="for an ensemble from the Hub, expected one from a lineage's folder"):
        ensemble.save_pretrained(tmp_path / "ensemble")
    for name in ("born-again/none", "born-again/tiny-gen0"):
        with pytest.raises(OSError, match=name):
            LineageEnsemble.from_pretrained(name)


@pytest.mark.parametrize("name", ["tiny", "tiny-gen0", "tiny-gen2", "tiny-ensemble"])
def test_a_lineage_is_found_by_any_of_its_names(logged_in_hub, published, tmp_path, name):
    assert download_lineage(f"born-again/{name}", tmp_path / "back") == 3
    restored = [own["weights_sha256"] for own in Manifest.read(tmp_path / "back").generations]
    assert restored == [own["weights_sha256"] for own in Manifest.read(published).generations]


def test_a_lineage_is_found_by_its_own_pattern_of_names(logged_in_hub, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "published")
    assert publish_lineage(folder, "born-again", name_pattern="mine-{index}") == {}
    assert download_lineage("born-again/mine-1", tmp_path / "back") == 3


def test_a_name_without_a_lineage_is_refused(logged_in_hub, tmp_path):
    logged_in_hub.store.put("model", "born-again/other", {"config.json": b"{}"})
    with pytest.raises(FileNotFoundError, match="lineage: got 'born-again/other'.*nor 'born-again/other-gen0'"):
        download_lineage("born-again/other", tmp_path / "back")
    assert not (tmp_path / "back").exists()
