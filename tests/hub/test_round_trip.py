"""Published lineages load where nothing but their names is known, and their cards say what is so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_fixtures import redirected
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from lineage_folders import WORDS, inputs, lineage, network

from born_again import LineageEnsemble, load_generation
from born_again.hub.publishing import publish_lineage
from born_again.lineage.ensemble import evaluate_ensemble
from born_again.lineage.manifest import Manifest, file_sha256
from born_again.models.language_models import create_language_model

IMAGES, LSTM, CHARACTERS = "wide-resnet-cifar100", "lstm-ptb", "char-cnn-lstm-ptb"
SCRIPT = Path(__file__).parents[1] / "support" / "fresh_interpreter.py"
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHAR = {"hidden_size": 8, "filter_widths": [1, 2], "filter_counts": [3, 4], "character_embedding_size": 5}
# In YAML some of these look like something else.
AWKWARD = [0.1 + 0.2, 1e-07, 1 / 3, 2.0, 5e-324]
TYPES = {"accuracy": "accuracy", "error": "error", "nll": "loss", "ece": "ece", "perplexity": "perplexity"}


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    torch.set_num_threads(1)


def measure(folder: Path, ensemble: list[int]) -> None:
    """Numbers that nobody measured, each of them once, and an ensemble with its own."""
    manifest = Manifest.read(folder)
    is_text = (folder / "gen0" / "tokenizer.json").exists()
    names = ("nll", "perplexity") if is_text else ("accuracy", "error", "nll", "ece")

    def numbers(seed: int) -> dict[str, dict[str, float]]:
        splits = ("validation", "test") if is_text else ("test",)
        values = iter([value * (seed + 1) for value in AWKWARD])
        return {split: {name: next(values) for name in names} for split in splits}

    for record in manifest.generations:
        manifest.update(record["index"], metrics=numbers(record["index"]))
    if ensemble:
        evaluate_ensemble(manifest, ensemble, lambda model: numbers(9))
    manifest.save()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Three lineages on a Hub, and their folders by name."""
    folder = tmp_path_factory.mktemp("published")
    lstm = [network("lstm", seed) for seed in range(3)]
    torch.manual_seed(4)
    characters = [create_language_model("char-cnn-lstm", WORDS, **CHAR)]
    made = {
        IMAGES: lineage(
            folder / IMAGES,
            [network("image", seed) for seed in range(3)],
            name=IMAGES,
            model="test_wide_resnet_cifar",
            dataset="cifar100",
        ),
        LSTM: lineage(folder / LSTM, lstm, [WORDS] * 3, name=LSTM, model="test-lstm", dataset="ptb"),
        CHARACTERS: lineage(
            folder / CHARACTERS, characters, [WORDS], name=CHARACTERS, model="char-cnn-lstm", dataset="ptb"
        ),
    }
    with HubServer(folder / "home") as hub:
        with redirected(hub):
            for name, own in made.items():
                measure(own, [] if name == CHARACTERS else [1, 2])
                assert publish_lineage(own, "born-again", license="apache-2.0", token=hub.token) == {}
        yield hub, made


def stored(hub: HubServer, repo: str, name: str) -> bytes:
    return hub.store.repositories["model", repo].at("main").files[name].data


def snippets(hub: HubServer, repo: str, alone: bool = False) -> list[str]:
    """The code on the card that is on the Hub: what needs this package, or what does without."""
    with_it, heading, without = stored(hub, repo, "README.md").decode().partition("### Without this package")
    found = SNIPPET.findall(without if alone else with_it)
    if not alone:
        assert "python" not in re.sub(SNIPPET, "", with_it).split("```")[1:]
        assert bool(heading) != repo.endswith("-ensemble")
    return found


def run_in_a_fresh_interpreter(hub: HubServer, what: str, work: Path, expected: dict) -> dict:
    torch.save(expected, work / "expected.pt")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(work)],
        cwd=work,
        env=hub.environment(work / "home", token=None, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@torch.no_grad()
def known(hub: HubServer, folder: Path, repo: str, alone: bool = False) -> dict:
    index = repo.rsplit("-", 1)[1]
    own = LineageEnsemble.from_lineage(folder, [1, 2]) if index == "ensemble" else load_generation(folder / index)
    given = inputs("image" if folder.name == IMAGES else "lstm")
    return {"inputs": given, "logits": own(given).logits, "snippets": snippets(hub, repo, alone)}


def test_image_classifiers_load_in_a_fresh_interpreter(published, tmp_path):
    hub, made = published
    repos = [f"born-again/{IMAGES}-{index}" for index in ("gen0", "gen1", "gen2", "ensemble")]
    expected = {repo: known(hub, made[IMAGES], repo) for repo in repos}
    assert [len(facts["snippets"]) for facts in expected.values()] == [3, 3, 3, 1]
    assert run_in_a_fresh_interpreter(hub, "images", tmp_path, expected) == {
        "snippet": 10, "timm": 3, "transformers": 3, "load_generation": 3, "pipeline": 3, "ensemble": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_language_models_load_in_a_fresh_interpreter(published, tmp_path):
    hub, made = published
    repos = [f"born-again/{LSTM}-{index}" for index in ("gen0", "gen2", "ensemble")]
    repos.append(f"born-again/{CHARACTERS}-gen0")
    expected = {repo: known(hub, made[repo.split("/")[1].rsplit("-", 1)[0]], repo) for repo in repos}
    assert [len(facts["snippets"]) for facts in expected.values()] == [2, 2, 1, 2]
    assert run_in_a_fresh_interpreter(hub, "text", tmp_path, expected) == {
        "snippet": 7, "transformers": 3, "load_generation": 3, "tokenizer": 3, "ensemble": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_networks_load_where_the_package_is_not_installed(published, tmp_path):
    hub, made = published
    expected = {
        f"born-again/{name}-gen{index}": known(hub, made[name], f"born-again/{name}-gen{index}", alone=True)
        for name, index in ((IMAGES, 1), (LSTM, 1), (CHARACTERS, 0))
    }
    assert [len(facts["snippets"]) for facts in expected.values()] == [1, 1, 1]
    assert run_in_a_fresh_interpreter(hub, "alone", tmp_path, expected) == {
        "snippet": 3, "transformers": 3, "timm": 1, "tokenizer": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", [IMAGES, LSTM, CHARACTERS])
def test_the_results_on_the_hub_are_those_of_the_lineage(name, published):
    hub, made = published
    content = Manifest.read(made[name]).content
    measured = {f"born-again/{name}-gen{record['index']}": record for record in content["generations"]}
    measured |= {f"born-again/{name}-ensemble": record for record in content.get("ensembles", [])}
    for repo, record in measured.items():
        expected = {
            (split, TYPES[metric]): value
            for split, values in record["metrics"].items()
            for metric, value in values.items()
        }
        with redirected(hub):
            card, info = ModelCard.load(repo), HfApi().model_info(repo)
        assert card.data.model_name == repo.split("/")[1].replace("-ensemble", ", ensemble of gen1, gen2")
        of_index = model_index_to_eval_results(info.model_index)
        assert of_index == (card.data.model_name, card.data.eval_results)
        results = card.data.eval_results
        assert {(result.dataset_split, result.metric_type): result.metric_value for result in results} == expected
        task = "image-classification" if name == IMAGES else "text-generation"
        dataset = "uoft-cs/cifar100" if name == IMAGES else "ptb-text-only/ptb_text_only"
        assert {(result.task_type, result.dataset_type) for result in results} == {(task, dataset)}
        for data in (card.data, info.card_data):
            assert (data.license, data.datasets, data.pipeline_tag) == ("apache-2.0", [dataset], task)
            assert "born-again-networks" in data.tags


@pytest.mark.parametrize("name", [IMAGES, LSTM, CHARACTERS])
def test_what_is_on_the_hub_is_what_the_lineage_says(name, published):
    hub, made = published
    content = Manifest.read(made[name]).content
    last = len(content["generations"]) - 1
    for index, record in enumerate(content["generations"]):
        repo = f"born-again/{name}-gen{index}"
        weights = stored(hub, repo, "model.safetensors")
        assert weights == (made[name] / f"gen{index}" / "model.safetensors").read_bytes()
        assert record["hub"]["repo"] == repo and record["hub"]["status"] == "published"
        at_commit = hub.store.repositories["model", repo].commits[record["hub"]["commit"]].files
        assert at_commit["model.safetensors"].sha256 == record["weights_sha256"]
        told = json.loads(stored(hub, repo, "lineage.json"))
        assert [(own["weights_sha256"], own["metrics"]) for own in told["generations"]] == [
            (own["weights_sha256"], own["metrics"]) for own in content["generations"][: index + 1]
        ]
        front = ModelCard(stored(hub, repo, "README.md").decode()).data.to_dict()
        assert front.get("base_model") == (f"born-again/{name}-gen{index - 1}" if index else None)
        assert front.get("new_version") == (f"born-again/{name}-gen{last}" if index < last else None)
        assert front["born_again"]["weights_sha256"] == file_sha256(made[name] / f"gen{index}" / "model.safetensors")
    (collection,) = [own for own in hub.store.collections.values() if own.title == f"{name}: born again"]
    extra = [] if name == CHARACTERS else [f"born-again/{name}-ensemble"]
    items = [f"born-again/{name}-gen{index}" for index in range(last + 1)] + extra
    assert [item["id"] for item in collection.items] == items
    assert hub.outside == [] and hub.leaks(hub.token) == []
