"""A lineage on an engine that shards its students ends as one on one process, in the same files."""

import json
from pathlib import Path

import pytest
import torch
from engine_lineages import PARTS
from processes import found_by
from safetensors.torch import load_file, save_file
from torch import nn

from born_again import create_image_classifier
from born_again.training.sharding import layers_to_shard, load_whole

SCRIPT = Path(__file__).parents[1] / "support" / "engine_lineages.py"
ROUNDING = 1e-10
WHOLE = ("text", "sgd", "images", "measured")


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    return folder, {part: PARTS[part](folder / part) for part in WHOLE}


@pytest.fixture(scope="module")
def on_fsdp(tmp_path_factory):
    """Everything in one start of two processes."""
    folder = tmp_path_factory.mktemp("fsdp2")
    return folder, found_by(SCRIPT, folder, "fsdp2", *WHOLE, "sharded", "crashed", "sgd crashed", processes=2)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob("gen*/*")}


def largest_difference(folder: Path, other: Path) -> float:
    """Relative to the largest weight of each tensor, over all generations of a lineage."""
    differences = []
    for path in sorted(folder.glob("gen*/model.safetensors")):
        ours, theirs = load_file(other / path.relative_to(folder)), load_file(path)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
            differences.append(float((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-9)))
    return max(differences)


@pytest.mark.parametrize("part", ["text", "sgd", "images"])
def test_generations_of_fsdp2_are_those_of_one_process(on_one, on_fsdp, part):
    (folder, expected), (sharded, found) = on_one, on_fsdp
    assert files(sharded / part) == files(folder / part)
    assert largest_difference(folder / part, sharded / part) < ROUNDING
    for path in sorted((folder / part).glob("gen*/config.json")):
        own = sharded / part / path.relative_to(folder / part)
        assert json.loads(own.read_text()) == json.loads(path.read_text())
    for rank in found:
        for own, record in zip(rank[part]["records"], expected[part]["records"], strict=True):
            assert own["parameters"] == record["parameters"] > 3000
            assert own["metrics"]["test"] == pytest.approx(record["metrics"]["test"], rel=10 * ROUNDING)
            assert (own["teacher_fit"] or {}) == pytest.approx(record["teacher_fit"] or {}, rel=10 * ROUNDING)
    recorded = json.loads((sharded / part / "lineage.json").read_text())["generations"][0]["computation"]
    assert recorded["distributed_type"] == "FSDP"


@pytest.mark.parametrize("part", ["text", "sgd"])
def test_a_generation_resumed_under_fsdp2_has_the_weights_of_an_uninterrupted_one(on_fsdp, part):
    _, found = on_fsdp
    crashed = {"text": "crashed", "sgd": "sgd crashed"}[part]
    for rank in found:
        own = [record["weights_sha256"] for record in rank[crashed]["records"]]
        assert own == [record["weights_sha256"] for record in rank[part]["records"]][: len(own)]


@pytest.mark.slow
def test_a_lineage_under_fsdp2_goes_on_after_kill_9(on_fsdp, tmp_path):
    with pytest.raises(AssertionError, match="SIGKILL"):
        found_by(SCRIPT, tmp_path, "fsdp2", "killed", processes=2)
    assert (tmp_path / "text" / "checkpoints" / "gen1" / "checkpoint-4").is_dir()
    found = found_by(SCRIPT, tmp_path, "fsdp2", "text", processes=2)
    hashes = [[record["weights_sha256"] for record in rank[0]["text"]["records"]] for rank in (found, on_fsdp[1])]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("placement", ["measured", "sharded"])
def test_evaluation_before_training_and_the_teacher_beside_a_student_in_shards(on_one, on_fsdp, placement):
    expected = on_one[1]["measured"]
    for rank in on_fsdp[1]:
        own = rank[placement]
        assert own["student_in_shards"] and own["teacher_in_shards"] == (placement == "sharded")
        for name in ("before", "again", "after"):
            assert own[name] == pytest.approx(expected[name], rel=ROUNDING / 100)
        assert own["student_fit"] == pytest.approx(expected["student_fit"])
        assert own["infinite"].startswith("weights: not finite after step 6 of 6")


def test_the_layers_that_are_gathered_one_after_the_other():
    def layers(name: str) -> list[str]:
        return layers_to_shard(create_image_classifier(name, list("abc"), [0.5] * 3, [0.2] * 3))

    assert layers("test_densenet_cifar") == ["DenseBlock"]
    assert layers("test_wide_resnet_cifar") == ["WideBlock"]
    assert layers("test_vit") == ["Block"]
    assert layers("test_resnet") == ["BasicBlock", "Bottleneck"]
    assert layers_to_shard(nn.Sequential(nn.LSTM(2, 2), nn.Linear(2, 2))) == []


def test_weights_that_lack_a_tensor_are_not_loaded(tmp_path):
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="its weights lack bias of Linear; expected those of the network"):
        load_whole(nn.Linear(2, 2), tmp_path)
