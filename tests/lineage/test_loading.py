"""A generation of any kind, back from its folder, here and in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, ViTConfig

import born_again
from born_again.data.text import word_tokenizer
from born_again.lineage import evaluation
from born_again.models.image_classifier import create_image_classifier, save_image_classifier
from born_again.models.language_models import create_language_model

ROOT = Path(born_again.__file__).parents[1]
WORDS = ["the", "cat", "<eos>", "sat", "<unk>"]
CHAR = {"hidden_size": 4, "filter_widths": [1, 2], "filter_counts": [2, 3]}
LANGUAGE = ["lstm", "char", "gpt2"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def generations(tmp_path_factory) -> dict[str, torch.nn.Module]:
    """Untrained models by folder; a language model's folder holds its tokenizer too."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("generations")
    gpt2 = GPT2Config(vocab_size=len(WORDS), n_positions=8, n_embd=8, n_layer=1, n_head=2)
    models = {
        "lstm": create_language_model("test-lstm", WORDS),
        "char": create_language_model("char-cnn-lstm", WORDS, **CHAR),
        "gpt2": GPT2LMHeadModel(gpt2),
    }
    for name, model in models.items():
        model.eval().save_pretrained(root / name)
        word_tokenizer(WORDS).save_pretrained(root / name)
    models["image"] = create_image_classifier("test_wide_resnet_cifar", ["a", "b"], [0.5] * 3, [0.25] * 3).eval()
    save_image_classifier(models["image"], root / "image")
    return {str(root / name): model for name, model in models.items()}


def _ids() -> torch.Tensor:
    return torch.tensor([[2, 0, 1, 3, 4]])


def _pixels() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model(_pixels() if hasattr(model, "timm_model") else _ids()).logits


def test_each_kind_of_folder_gives_its_model(generations):
    for folder, model in generations.items():
        loaded = born_again.load_generation(folder)
        assert type(loaded) is type(model) and not loaded.training
        assert torch.equal(_logits(loaded), _logits(model))
        assert torch.equal(_logits(born_again.load_generation(Path(folder))), _logits(model))


FRESH = """
import json, sys
import born_again
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pixels, ids = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32), torch.tensor([[2, 0, 1, 3, 4]])
texts = [folder for folder in sys.argv[1:] if not folder.endswith("image")]
loaded = [(folder, AutoModelForCausalLM.from_pretrained(folder)) for folder in texts]
for folder, model in loaded:
    read = AutoTokenizer.from_pretrained(folder)("<eos> the cat sat dog", return_tensors="pt")["input_ids"]
    assert torch.equal(read, ids), read
    assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))) is type(model)
loaded += [(folder, born_again.load_generation(folder)) for folder in sys.argv[1:]]
with torch.no_grad():
    print(json.dumps([
        [folder, type(model).__name__, model.training, model(ids if folder in texts else pixels).logits.tolist()]
        for folder, model in loaded
    ]))
"""


@pytest.mark.slow
def test_a_fresh_interpreter_reads_the_same(generations):
    """Language models by transformers, and every kind by load_generation."""
    texts = [folder for folder in generations if not folder.endswith("image")]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, *generations],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [folder for folder, *_ in found] == [*texts, *generations]
    for folder, kind, training, logits in found:
        assert (kind, training) == (type(generations[folder]).__name__, False)
        assert torch.equal(torch.tensor(logits), _logits(generations[folder]))


@pytest.mark.parametrize("kind", ["timm_wrapper", "lstm_lm"])
def test_a_revision_of_a_repository_is_what_is_read(kind, monkeypatch):
    asked = []
    config = lambda source, revision: (asked.append((source, revision)), ({"model_type": kind}, {}))[1]  # noqa: E731
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", config)
    for name in ("load_image_classifier", "load_language_model"):
        load = lambda source, revision, name=name: asked.append((name, source, revision))  # noqa: E731
        monkeypatch.setattr(evaluation, name, load)
    born_again.load_generation("owner/name", revision="v2")
    loader = "load_image_classifier" if kind == "timm_wrapper" else "load_language_model"
    assert asked == [("owner/name", "v2"), (loader, "owner/name", "v2")]


def test_a_folder_that_is_missing_or_lacks_a_file(tmp_path, generations):
    with pytest.raises(FileNotFoundError, match="'.*nowhere' is not a folder; give a folder with config.json"):
        born_again.load_generation(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        born_again.load_generation(tmp_path)
    for folder, model in generations.items():
        here = tmp_path / Path(folder).name
        model.config.save_pretrained(here)
        torch.save(model.state_dict(), here / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match=r"has no model.safetensors.*pytorch_model.bin\) are never loaded"):
            born_again.load_generation(here)


def test_a_repository_that_cannot_be_reached():
    with pytest.raises(OSError, match="couldn't connect"):
        born_again.load_generation("no-such/repository")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet18", "num_classes": 3}, "describes .* weights, expected no more than the 1 that"),
        ({"model_type": ViTConfig.model_type}, "ViTConfig"),
        ({"hidden_size": 3}, "Unrecognized model"),
    ],
)
def test_a_folder_of_something_else(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        born_again.load_generation(tmp_path)
