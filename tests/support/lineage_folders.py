"""Lineages of untrained networks on disk, as a runner leaves them."""

import shutil
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from born_again import LineageEnsemble, LineageSpec
from born_again.data.text import word_tokenizer
from born_again.lineage.manifest import Manifest, file_sha256
from born_again.models.image_classifier import create_image_classifier, save_image_classifier
from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM

WORDS = ["the", "cat", "<eos>", "sat", "<unk>", "on"]
LABELS = ["a", "b", "c"]
ENSEMBLE = {"average": "probabilities", "metrics": {"test": {"nll": 1.0, "perplexity": 8.0}}}


def network(kind: str, seed: int, **changes) -> torch.nn.Module:
    """Untrained, with weights wide enough for members to disagree."""
    torch.manual_seed(seed)
    if kind == "image":
        labels = changes.get("labels", LABELS)
        statistics = changes.get("statistics", ([0.5] * 3, [0.25] * 3))
        model = create_image_classifier("test_wide_resnet_cifar", labels, *statistics)
        with torch.no_grad():
            model.timm_model.get_classifier().weight.normal_(std=2.0)
        return model.eval()
    settings = {"vocab_size": changes.get("words", len(WORDS)), "initializer_range": 1.0}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=2, **settings))
    else:
        layers = changes.get("layers", 2)
        model = LstmLMForCausalLM(LstmLMConfig(hidden_size=8, num_layers=layers, dropout=0.5, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def lineage(
    folder: Path, networks: list, words: list[list[str]] | None = None, finished: int | None = None, **spec
) -> Path:
    """A lineage's folder as a runner leaves it; `spec` is of its LineageSpec."""
    students = len(networks) - 1
    spec = {"name": "tiny", "model": "test", "dataset": "made", "objective": "ban+l", **spec}
    manifest = Manifest.create(folder, LineageSpec(**spec, generations=students), {})
    for index, model in enumerate(networks):
        here = folder / f"gen{index}"
        if hasattr(model, "timm_model"):
            save_image_classifier(model, here)
        else:
            model.save_pretrained(here)
        if words is not None:
            word_tokenizer(words[index]).save_pretrained(here)
        is_text = not hasattr(model, "timm_model")
        score = {"perplexity": 9.0} if is_text else {"accuracy": 0.5, "error": 0.5, "ece": 0.1}
        manifest.update(
            index,
            status="finished" if finished is None or index < finished else "training",
            seed=42 + index,
            parent=index - 1 if index else None,
            objective="ban+l" if index else "label",
            weights_sha256=file_sha256(here / "model.safetensors"),
            metrics={"test": {"nll": 1.0, **score}},
            seconds=1.0,
            versions={"torch": torch.__version__},
            hardware="CPU",
            hub=None,
        )
    manifest.save()
    return folder


def add_ensemble(folder: Path, members: list[int]) -> None:
    """Records an ensemble of language models as evaluated."""
    manifest = Manifest.read(folder)
    hashes = [manifest.generations[index]["weights_sha256"] for index in members]
    record = {**ENSEMBLE, "members": members, "weights_sha256": hashes}
    manifest.content.setdefault("ensembles", []).append(record)
    manifest.save()


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def inputs(kind: str, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "image":
        return torch.randn(rows, 3, 32, 32, generator=generator)
    return torch.randint(len(WORDS), (rows, 5), generator=generator)


def members(ensemble: LineageEnsemble) -> list[int]:
    return [member.generation for member in ensemble.members]
