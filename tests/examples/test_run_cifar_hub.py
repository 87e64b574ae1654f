"""The main job with --push_to_hub, as a user runs it, against a Hub on the loopback interface."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example_scripts import EXAMPLES, load_example
from hub_fixtures import put_cifar100
from hub_store import Account
from huggingface_hub import ModelCard
from lineage_folders import lineage, network
from secret_search import places_of

from born_again.hub.client import HubError
from born_again.hub.publishing import publish_lineage
from born_again.lineage.manifest import Manifest

SCRIPT = EXAMPLES / "run_cifar.py"
# cifar100 of the Hub, as there is no --dataset.
TINY = ["--model", "test_wide_resnet_cifar", "--num_train_epochs", "1", "--threads", "1", "--disable_tqdm", "True"]
DIGITS = [*TINY, "--dataset", "digits", "--max_train_samples", "64", "--max_eval_samples", "32"]
PUSH = ["--push_to_hub", "--hub_namespace", "born-again"]
NAME = "test-wide-resnet-cifar100"


def run(hub, folder, *words, launcher=(), **environment):
    """A new process that is logged in by HF_TOKEN."""
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, words)],
        cwd=folder,
        env=hub.environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script in this process, for what needs no new one; `trained` is what it has trained."""
    module = load_example("run_cifar")
    module.trained = []

    class Watched(module.BornAgainTrainer):
        def train(self, *args, **kwargs):
            module.trained.append(Path(self.args.output_dir).name)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(module, "BornAgainTrainer", Watched)
    monkeypatch.chdir(tmp_path)  # outputs/NAME
    return module


def models(hub):
    return sorted(id.removeprefix("born-again/") for type, id in hub.store.repositories if type == "model")


def head(hub, name):
    return hub.store.repositories["model", f"born-again/{name}"].at("main")


def card(hub, name):
    return ModelCard(head(hub, name).files["README.md"].data.decode())


def hashes(folder):
    return [record["weights_sha256"] for record in Manifest.read(folder).generations]


@pytest.mark.slow
def test_a_lineage_goes_to_the_hub_and_on_from_there(logged_in_hub, script, tmp_path, capsys):
    """One command trains and publishes; without the folder it brings all back; with one more it trains one more."""
    hub, folder = logged_in_hub, tmp_path / "outputs" / NAME
    put_cifar100(hub.store)
    done = run(hub, tmp_path, *TINY, "--generations", 3, *PUSH, launcher=("-m", "accelerate.commands.launch"))
    assert done.returncode == 0, done.stderr[-4000:]
    generations = [f"{NAME}-gen{index}" for index in range(4)]
    assert models(hub) == sorted([*generations, f"{NAME}-ensemble"])
    (collection,) = hub.store.collections.values()
    assert collection.title == f"{NAME}: born again" and collection.owner == "born-again"
    assert [item["id"] for item in collection.items] == [
        f"born-again/{name}" for name in [*generations, f"{NAME}-ensemble"]
    ]
    content = json.loads((folder / "lineage.json").read_text())
    assert [record["hub"]["status"] for record in content["generations"]] == ["published"] * 4
    assert card(hub, f"{NAME}-gen1").data.datasets == ["uoft-cs/cifar100"]
    assert card(hub, f"{NAME}-gen1").data.base_model == f"born-again/{NAME}-gen0"
    assert card(hub, f"{NAME}-gen1").data.new_version == f"born-again/{NAME}-gen3"
    assert places_of(hub.token, tmp_path) == [] and hub.token not in done.stdout + done.stderr
    # datasets asks the Hub's viewer too, another host that belongs to it.
    assert [place for place in hub.leaks(hub.token) if "http://datasets-server." not in place] == []

    weights, commits = hashes(folder), {name: head(hub, name).oid for name in models(hub)}
    shutil.rmtree(folder)
    assert script.start([*TINY, "--generations", "3", *PUSH]) == 0
    assert script.trained == [] and hashes(folder) == weights
    assert {name: head(hub, name).oid for name in models(hub)} == commits
    assert len(hub.store.collections) == 1
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table

    shutil.rmtree(folder)
    assert script.start([*TINY, "--generations", "4", *PUSH]) == 0
    assert script.trained == ["gen4"] and hashes(folder)[:4] == weights
    assert models(hub) == sorted([*generations, f"{NAME}-gen4", f"{NAME}-ensemble"])
    assert head(hub, f"{NAME}-gen4").files["model.safetensors"].sha256 == hashes(folder)[4]
    for name in generations:
        assert card(hub, name).data.new_version == f"born-again/{NAME}-gen4"
    members = json.loads(head(hub, f"{NAME}-ensemble").files["ensemble.json"].data)["members"]
    assert [member["generation"] for member in members] == [2, 3, 4]
    assert f"born-again/{NAME}-gen4" in [item["id"] for item in collection.items]


def test_a_published_generation_teaches_another_lineage(logged_in_hub, script, tmp_path):
    hub = logged_in_hub
    labels = [str(digit) for digit in range(10)]
    first = lineage(tmp_path / "first", [network("image", seed, labels=labels) for seed in range(2)], name="first")
    assert publish_lineage(first, "born-again") == {}
    words = [
        *DIGITS,
        "--image_size",
        "32",
        "--generations",
        "1",
        "--name",
        "second",
        "--teacher",
        "born-again/first-gen1",
        *PUSH,
    ]
    assert script.start(words) == 0
    assert script.trained == ["gen1"]
    folder = tmp_path / "outputs" / "second"
    assert hashes(folder)[0] == hashes(first)[1] == head(hub, "first-gen1").files["model.safetensors"].sha256
    assert models(hub) == ["first-gen0", "first-gen1", "second-gen0", "second-gen1"]
    taught = card(hub, "second-gen0")
    assert "A copy of born-again/first-gen1, which was trained elsewhere" in taught.text
    assert taught.data.base_model == "born-again/first-gen1" and taught.data.datasets in (None, [])
    assert card(hub, "second-gen1").data.base_model == "born-again/second-gen0"
    shutil.rmtree(folder)
    script.trained.clear()
    assert script.start(words) == 0 and script.trained == []
    assert hashes(folder)[0] == hashes(first)[1]


def test_a_namespace_without_rights_is_refused_before_training(logged_in_hub, script, tmp_path, monkeypatch):
    hub = logged_in_hub
    hub.store.accounts["hf_stranger"] = Account("stranger", orgs={"their-group": "write"})
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    message = r"got 'born-again', expected 'stranger' or an organisation of theirs \(their-group\)"
    with pytest.raises(HubError, match=f"hub_namespace: {message}"):
        script.start([*DIGITS, "--generations", "1", *PUSH])
    assert script.trained == [] and models(hub) == [] and not list(tmp_path.rglob("*.safetensors"))
