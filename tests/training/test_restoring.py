"""Every weight of a checkpoint is restored, whatever save_pretrained calls it, and another network's is refused."""

import pytest
import torch
from helpers import Network, arguments, vectors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from born_again import BornAgainTrainer
from born_again.training.sharding import load_whole

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 3}
NETWORKS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGES)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**IMAGES)),
    "beit": lambda: BeitForImageClassification(BeitConfig(**IMAGES)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**IMAGES)),
    "tied": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=16, n_embd=8, n_layer=1, n_head=2)),
    "plain": lambda: Network(0),
}


def network(kind, seed):
    torch.manual_seed(seed)
    made = NETWORKS[kind]()
    with torch.no_grad():  # biases begin at the same number
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


def trainer(kind, folder, seed):
    student = network(kind, seed)
    return BornAgainTrainer(student, arguments(folder, loss_normalization="step"), train_dataset=vectors())


def restore(own, folder, way):
    if way == "resumed":
        own._load_from_checkpoint(str(folder))
    elif way == "best":
        own.state.best_model_checkpoint = str(folder)
        own._load_best_model()
    else:
        load_whole(own.model, folder)


@pytest.mark.parametrize("way", ["resumed", "best", "sharded"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_weight_is_restored_and_nothing_drawn(tmp_path, kind, way):
    saved = trainer(kind, tmp_path, 1)
    saved.model = saved.model.double() if kind == "beit" else saved.model
    saved.save_model(str(tmp_path / "checkpoint-1"))
    own = trainer(kind, tmp_path, 2)
    own.model = own.model.double() if kind == "beit" else own.model
    drawn = torch.get_rng_state()
    restore(own, tmp_path / "checkpoint-1", way)
    assert torch.equal(torch.get_rng_state(), drawn)
    expected, found = saved.model.state_dict(), own.model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_weights_in_several_files(tmp_path):
    saved = network("vit", 1)
    saved.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="5KB")
    assert len(list((tmp_path / "checkpoint-1").glob("*.safetensors"))) > 1
    own = trainer("vit", tmp_path, 2)
    restore(own, tmp_path / "checkpoint-1", "resumed")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in own.model.state_dict().items())


@pytest.mark.parametrize("way", ["resumed", "best"])
@pytest.mark.parametrize("kind", ["vit", "plain"])
def test_a_checkpoint_of_another_network_is_refused(tmp_path, kind, way):
    folder, own = tmp_path / "checkpoint-1", trainer(kind, tmp_path, 1)
    own.save_model(str(folder))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("bias"))
    save_file({**weights, "other": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"have other beside those of {type(own.model).__name__}; expected those of"):
        restore(own, folder, way)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"its weights lack [\w.]+bias of {type(own.model).__name__}; expected those"
    ):
        restore(own, folder, way)


def test_a_compiled_student_is_restored(tmp_path):
    saved = trainer("vit", tmp_path, 1)
    saved.save_model(str(tmp_path / "checkpoint-1"))
    own = trainer("vit", tmp_path, 2)
    own.model = torch.compile(own.model)
    restore(own, tmp_path / "checkpoint-1", "resumed")
    assert torch.equal(
        nn.utils.parameters_to_vector(own.model.parameters()), nn.utils.parameters_to_vector(saved.model.parameters())
    )
