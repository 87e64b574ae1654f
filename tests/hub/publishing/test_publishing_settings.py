"""Publishing as it is asked for: settings, what messages tell, and the command."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_views import card, files, repos, states
from huggingface_hub import HfApi

from born_again.cli import main
from born_again.hub.client import HubError
from born_again.hub.files import HubSettings
from born_again.hub.publishing import publish_lineage
from born_again.lineage.lock import FolderLock
from born_again.lineage.manifest import LineageError, Manifest

IMAGE_FILES = {"README.md", "config.json", "lineage.json", "model.safetensors"}


# ---- Messages ----


@pytest.mark.parametrize("kind", [OSError, ValueError, TypeError, RuntimeError])
def test_no_token_gets_into_a_message(logged_in_hub, folder, monkeypatch, caplog, kind):
    other, key = "hf_" + "Ab1" * 11, "X-Amz-Signature=" + "5e" * 9

    def fail(*arguments, **options):
        raise kind(f"Bearer {logged_in_hub.token} and {other}\nat 'https://storage/x?{key}&y=1'")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", fail)
        with caplog.at_level(logging.DEBUG):
            left = publish_lineage(folder, "born-again")
    assert "Bearer *** and *** at 'https://storage/x'" in left["gen0"]
    for secret in (logged_in_hub.token, other, key):
        assert secret not in caplog.text and secret not in (folder / "lineage.json").read_text()
    assert ("TypeError is not an error of the Hub; it was raised in" in caplog.text) == (kind is TypeError)
    assert publish_lineage(folder) == {} and states(folder)[0]["message"] is None


def test_a_token_with_a_line_end_is_not_shown(hub, folder):
    with pytest.raises(HubError) as caught:
        publish_lineage(folder, "born-again", token=f"{hub.token}\n")
    assert hub.token not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "how", "options", "remedy"),
    [
        ("lfs-upload", "401", {}, "set HF_TOKEN to a token that may write."),  # wrapped by huggingface_hub
        ("commit", "403", {}, "a token that may."),
        ("paths-info", "429", {"retry_after": 7}, "Try again in 7 seconds."),
        ("paths-info", "502", {}, "Try again later."),
        ("commit", "400", {}, "Correct that, and publish again."),
    ],
)
def test_a_message_names_the_remedy(logged_in_hub, folder, caplog, endpoint, how, options, remedy):
    logged_in_hub.fail(endpoint, how, **options)
    left = publish_lineage(folder, "born-again")
    assert left["gen0"].endswith(remedy)
    assert f"Generation 0 of tiny is not published yet: {left['gen0']}" in caplog.text
    assert "not an error of the Hub" not in caplog.text
    assert publish_lineage(folder) == {}


# ---- Settings ----


def test_a_branch(logged_in_hub, folder):
    assert publish_lineage(folder, "born-again", branch="runs/3") == {}
    repository = logged_in_hub.store.repositories["model", "born-again/tiny-gen1"]
    assert set(repository.at("main").files) == {".gitattributes"}
    assert set(repository.at("runs/3").files) > IMAGE_FILES
    assert 'revision="runs/3"' in files(logged_in_hub, repository.id, "runs/3")["README.md"].data.decode()


def test_pattern_license_and_private(logged_in_hub, text_folder):
    values = {"name_pattern": "{name}.{index}", "license": "apache-2.0", "private": True}
    assert publish_lineage(text_folder, "tester", **values) == {}
    assert sorted(repos(logged_in_hub)) == ["tester/tiny-ensemble", *(f"tester/tiny.{index}" for index in range(3))]
    assert all(repository.private for repository in logged_in_hub.store.repositories.values())
    assert all(collection.private for collection in logged_in_hub.store.collections.values())
    assert {card(logged_in_hub, repo)["license"] for repo in repos(logged_in_hub)} == {"apache-2.0"}
    assert (
        Manifest.read(text_folder).content["hub"].items()
        >= {
            "namespace": "tester",
            "pattern": "{name}.{index}",
            "private": True,
            "branch": None,
            "license": "apache-2.0",
        }.items()
    )


def test_what_is_not_given_is_as_it_was_before(logged_in_hub, folder):
    logged_in_hub.fail(lambda request: request.endpoint == "commit" and request.id.endswith("1"), "500")
    assert "gen1" in publish_lineage(folder, "born-again", name_pattern="{name}.{index}", private=True, license="mit")
    assert publish_lineage(folder) == {}
    assert sorted(repos(logged_in_hub)) == ["born-again/tiny.0", "born-again/tiny.1"]
    assert logged_in_hub.store.repositories["model", "born-again/tiny.1"].private
    assert card(logged_in_hub, "born-again/tiny.1")["license"] == "mit"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"namespace": "tester"},
            "hub_namespace: got 'tester', but born-again/tiny-gen0 of this lineage is published",
        ),
        ({"name_pattern": "{name}.{index}"}, "hub_pattern: got '{name}.{index}', but .* already with '{name}-gen"),
        ({"branch": "other"}, "hub_branch: got 'other', but .* already with None; give the same, or train into"),
    ],
)
def test_half_of_a_lineage_does_not_go_elsewhere(logged_in_hub, folder, changed, message):
    logged_in_hub.fail(lambda request: request.endpoint == "commit" and request.id.endswith("gen1"), "500")
    publish_lineage(folder, "born-again")
    before = (folder / "lineage.json").read_bytes()
    with pytest.raises(HubError, match=message):
        publish_lineage(folder, **changed)
    assert (folder / "lineage.json").read_bytes() == before


def test_another_license_renews_every_card(logged_in_hub, text_folder):
    assert publish_lineage(text_folder, "born-again", license="mit") == {}
    before = states(text_folder)
    assert publish_lineage(text_folder, license="apache-2.0") == {}
    assert {card(logged_in_hub, repo)["license"] for repo in repos(logged_in_hub)} == {"apache-2.0"}
    assert [state["commit"] for state in states(text_folder)] == [state["commit"] for state in before]
    start = len(logged_in_hub.requests)
    assert publish_lineage(text_folder) == {} and logged_in_hub.made(start) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"namespace": ""}, "hub_namespace: got '', expected the name of a user or an organisation, without '/'"),
        ({"namespace": "a/b"}, "hub_namespace: got 'a/b'"),
        ({"namespace": "é"}, "hub_namespace: got 'é'"),
        ({"namespace": None}, "hub_namespace: got None"),
        ({"pattern": "{name}"}, r"hub_name_pattern: got '\{name\}', expected a plain name with \{index\}"),
        ({"pattern": "{name}/{index}"}, "hub_name_pattern: got"),
        ({"pattern": "{index:>999999999}"}, "hub_name_pattern: got"),
        ({"pattern": "{name.__class__}{index}"}, "hub_name_pattern: got"),
        ({"pattern": "-{index}"}, "hub_name_pattern: got"),
        ({"pattern": 3}, "hub_name_pattern: got 3"),
        ({"pattern": "{name}--{index}"}, "hub_name_pattern: got '{name}--{index}', expected a plain name"),
        ({"namespace": "a--b"}, "hub_namespace: got 'a--b', expected the name of a user or an organisation"),
        ({"private": "yes"}, "private: got 'yes', expected True or False"),
        ({"branch": ""}, "hub_branch: got '', expected a plain name such as 'main', or None"),
        ({"branch": "a b"}, "hub_branch: got 'a b'"),
        ({"license": "a\nb: c"}, r"hub_license: got 'a\\nb: c', expected a plain name such as 'apache-2.0', or None"),
        ({"license": 2}, "hub_license: got 2"),
    ],
)
def test_settings_that_are_none(values, message):
    with pytest.raises(ValueError, match=message):
        HubSettings(**{"namespace": "born-again", **values})


def test_names_of_repositories():
    settings = HubSettings("me", "x_{index}.{name}")
    assert (settings.repo("net", 12), settings.ensemble_repo("net")) == ("me/x_12.net", "me/net-ensemble")


def test_what_cannot_be_published_at_all(hub, folder, tmp_path):
    with pytest.raises(ValueError, match="namespace: got None, expected the user or organisation to publish to"):
        publish_lineage(folder)
    with pytest.raises(FileNotFoundError, match=r"lineage\.json: there is no such file"):
        publish_lineage(tmp_path / "none", "born-again")
    assert not (tmp_path / "none").exists()
    with FolderLock(folder), pytest.raises(LineageError, match="is in use by process"):
        publish_lineage(folder, "born-again")
    assert hub.made() == []


# ---- The command ----


def test_the_command_publishes(logged_in_hub, folder, capsys):
    logged_in_hub.fail(lambda request: request.endpoint == "commit" and request.id.endswith("gen1"), "500")
    assert main(["publish", str(folder), "--namespace", "born-again", "--license", "mit"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("not published: gen1: ") and said[1] == "not published: collection: not tried yet"
    assert main(["publish", str(folder)]) == 0
    assert capsys.readouterr().out == "everything that is finished is published\n"
    for words, message in [
        ([str(folder), "--namespace", "tester"], "hub_namespace: got 'tester', but "),
        ([str(folder / "none")], "there is no such file"),
        ([str(folder), "--name_pattern", "x"], "hub_name_pattern: got 'x'"),
        ([str(folder), "--namespac", "x"], "unrecognized arguments"),
    ]:
        assert main(["publish", *words]) == 2
        assert message in capsys.readouterr().err


def test_the_command_renders_cards_again(logged_in_hub, text_folder, capsys):
    publish_lineage(text_folder, "born-again")
    assert main(["card", str(text_folder)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written == [text_folder / f"gen{index}/README.md" for index in range(3)]
    for index, path in enumerate(written):
        assert path.read_bytes() == files(logged_in_hub, f"born-again/tiny-gen{index}")["README.md"].data


@pytest.mark.slow
def test_another_process_goes_by_its_environment(hub, folder):
    command = [sys.executable, "-m", "born_again.cli", "publish", str(folder), "--namespace", "born-again"]
    environment = {**hub.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, "everything that is finished is published\n"), done.stderr
    assert sorted(repos(hub)) == ["born-again/tiny-gen0", "born-again/tiny-gen1"]
    assert hub.outside == [] == hub.leaks(hub.token) and os.environ.get("HF_ENDPOINT") != hub.endpoint
