"""The command for language models with --push_to_hub, against a Hub on the loopback interface."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import EXAMPLES, load_example

from born_again import load_generation
from born_again.lineage.manifest import Manifest

SCRIPT = EXAMPLES / "run_ptb.py"
NAME = "test-lstm-grammar"
TINY = ["--smoke", "--max_train_samples", "2000", "--max_eval_samples", "400", "--num_train_epochs", "1"]
TINY += ["--per_device_train_batch_size", "4", "--window", "10", "--threads", "1", "--disable_tqdm", "True"]
TINY += ["--push_to_hub", "--hub_namespace", "born-again"]
FRESH = """
import sys
import born_again, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, expected = sys.argv[1], torch.load(sys.argv[2])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(repo)
assert tokenizer(expected["text"])["input_ids"] == expected["ids"][0].tolist()
with torch.no_grad():
    assert torch.equal(AutoModelForCausalLM.from_pretrained(repo)(expected["ids"]).logits, expected["logits"])
"""


def fresh(hub, folder, *words, home=None):
    environment = hub.environment(home, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def hashes(folder):
    return [record["weights_sha256"] for record in Manifest.read(folder).generations]


@pytest.mark.slow
def test_language_models_go_to_the_hub_and_on_from_there(logged_in_hub, tmp_path, monkeypatch):
    hub, folder = logged_in_hub, tmp_path / "outputs" / NAME
    torch.set_num_threads(1)
    fresh(hub, tmp_path, "-m", "accelerate.commands.launch", SCRIPT, *TINY, "--generations", 1)
    repos = [f"born-again/{NAME}-gen{index}" for index in (0, 1)]
    assert sorted(id for _, id in hub.store.repositories) == repos
    (collection,) = hub.store.collections.values()
    assert [item["id"] for item in collection.items] == repos
    assert hub.leaks(hub.token) == [] and hub.outside == []

    words = [word for word, _ in sorted(load_vocabulary(folder / "gen1").items(), key=lambda item: item[1])]
    ids = torch.arange(len(words))[None, :30]
    with torch.no_grad():
        logits = load_generation(folder / "gen1")(ids).logits
    torch.save({"text": " ".join(words[:30]), "ids": ids, "logits": logits}, tmp_path / "expected.pt")
    fresh(hub, tmp_path, "-c", FRESH, repos[1], tmp_path / "expected.pt", home=tmp_path / "other_home")

    weights = hashes(folder)
    shutil.rmtree(folder)
    script = load_example("run_ptb")
    trained = []

    class Watched(script.BornAgainLMTrainer):
        def train(self, *args, **kwargs):
            trained.append(Path(self.args.output_dir).name)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(script, "BornAgainLMTrainer", Watched)
    monkeypatch.chdir(tmp_path)
    assert script.start([*TINY, "--generations", "1"]) == 0
    assert trained == [] and hashes(folder) == weights
    shutil.rmtree(folder)
    assert script.start([*TINY, "--generations", "2"]) == 0
    assert trained == ["gen2"] and hashes(folder)[:2] == weights
    published = sorted(id for _, id in hub.store.repositories)
    assert published == [f"born-again/{NAME}-ensemble", *repos, f"born-again/{NAME}-gen2"]


def load_vocabulary(folder):
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
