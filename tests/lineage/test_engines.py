"""A lineage on an engine that shards its students ends as one on one process, in the same files."""

import functools
import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from engine_lineages import PARTS
from processes import found_by
from safetensors.torch import load_file, save_file
from torch import nn

from born_again import create_image_classifier
from born_again.lineage.checkpoints import checkpoint_error, is_incomplete
from born_again.training.sharding import layers_to_shard, load_whole

SCRIPT = Path(__file__).parents[1] / "support" / "engine_lineages.py"
# DeepSpeed trains in float32.
ROUNDING = {
    "fsdp2": 1e-10,
    "zero2": 1e-5,
    "zero3": 1e-5,
}
WHOLE = ("text", "sgd", "images", "measured", "narrow")
PARTS_OF = {
    "fsdp2": ("text", "sgd", "images", "measured", "sharded", "crashed", "sgd crashed"),
    "zero2": ("text", "measured", "crashed"),
    "zero3": ("text", "images", "narrow", "measured", "sharded"),
}
ON_DEEPSPEED = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed"),
]


def on_engines(part: str | None = None):
    """Parametrizes a test by engine, and by the parts that are run on it as on one process."""
    values = [
        pytest.param(engine, name, marks=ON_DEEPSPEED if engine.startswith("zero") else [], id=f"{engine}-{name}")
        for engine, names in PARTS_OF.items()
        for name in (names if part is None else [part])
        if name in ("text", "sgd", "images")
    ]
    return pytest.mark.parametrize(("engine", "part"), values)


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """A part on one process, in the precision of an engine."""

    @functools.cache
    def lineage(dtype, part):
        folder = tmp_path_factory.mktemp("one")
        torch.set_num_threads(1)
        return folder, PARTS[part](folder / part, dtype=dtype)

    return lambda engine, part: lineage(torch.float32 if engine.startswith("zero") else torch.float64, part)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Everything of an engine in one start of two processes."""

    @functools.cache
    def lineages(engine):
        folder = tmp_path_factory.mktemp(engine)
        return folder, found_by(SCRIPT, folder, engine, *PARTS_OF[engine], processes=2)

    return lineages


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


@on_engines()
def test_generations_on_an_engine_are_those_of_one_process(on_one, on_two, engine, part):
    (folder, expected), (sharded, found) = on_one(engine, part), on_two(engine)
    assert files(sharded / part) == files(folder / part)
    assert largest_difference(folder / part, sharded / part) < ROUNDING[engine]
    for path in sorted((folder / part).glob("gen*/config.json")):
        own = sharded / part / path.relative_to(folder / part)
        assert json.loads(own.read_text()) == json.loads(path.read_text())
    for rank in found:
        for own, record in zip(rank[part]["records"], expected["records"], strict=True):
            assert own["parameters"] == record["parameters"] > 3000
            assert own["metrics"]["test"] == pytest.approx(record["metrics"]["test"], rel=10 * ROUNDING[engine])
            assert (own["teacher_fit"] or {}) == pytest.approx(record["teacher_fit"] or {}, rel=10 * ROUNDING[engine])
    recorded = json.loads((sharded / part / "lineage.json").read_text())["generations"][0]["computation"]
    kind = "FSDP" if engine == "fsdp2" else "DEEPSPEED"
    assert recorded["distributed_type"] == kind and recorded["zero_stage"] == {"zero2": 2, "zero3": 3}.get(engine)


@pytest.mark.parametrize(
    ("engine", "part"),
    [("fsdp2", "text"), ("fsdp2", "sgd"), pytest.param("zero2", "text", marks=ON_DEEPSPEED)],
)
def test_a_generation_resumed_on_an_engine_has_the_weights_of_an_uninterrupted_one(on_two, engine, part):
    _, found = on_two(engine)
    crashed = {"text": "crashed", "sgd": "sgd crashed"}[part]
    for rank in found:
        own = [record["weights_sha256"] for record in rank[crashed]["records"]]
        assert own == [record["weights_sha256"] for record in rank[part]["records"]][: len(own)]


@pytest.mark.slow
@on_engines("text")
def test_a_lineage_on_an_engine_goes_on_after_kill_9(on_two, tmp_path, engine, part):
    if engine == "zero2":
        pytest.skip("its checkpoints are resumed above")
    with pytest.raises(AssertionError, match="SIGKILL"):
        found_by(SCRIPT, tmp_path, engine, "killed", processes=2)
    checkpoint = tmp_path / "text" / "checkpoints" / "gen1" / "checkpoint-4"
    assert checkpoint_error(checkpoint, 4) is None
    assert (checkpoint / "latest").exists() == (engine == "zero3")
    found = found_by(SCRIPT, tmp_path, engine, "text", processes=2)
    hashes = [
        [record["weights_sha256"] for record in rank[0]["text"]["records"]] for rank in (found, on_two(engine)[1])
    ]
    assert hashes[0] == hashes[1]


@on_engines("text")
def test_evaluation_before_training_and_the_teacher_beside_a_student_in_shards(on_one, on_two, engine, part):
    _, expected = on_one(engine, "measured")
    for placement in ("measured", "sharded"):
        if placement not in PARTS_OF[engine]:
            continue
        for rank in on_two(engine)[1]:
            own = rank[placement]
            assert own["student_in_shards"] == (engine != "zero2")
            assert own["teacher_in_shards"] == (placement == "sharded")
            for name in ("before", "again", "after"):
                assert own[name] == pytest.approx(expected[name], rel=max(ROUNDING[engine] / 100, 1e-6))
            assert own["student_fit"] == pytest.approx(expected["student_fit"])
            assert own["infinite"].startswith("weights: not finite after step 6 of 6")


@pytest.mark.parametrize("engine", [pytest.param("zero3", marks=ON_DEEPSPEED)])
def test_a_student_that_deepspeed_trains_in_bfloat16_is_saved_in_float32(on_one, on_two, engine):
    _, expected = on_one(engine, "narrow")
    folder, found = on_two(engine)
    for path in (folder / "narrow").glob("gen*/model.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float32}
        assert json.loads(path.with_name("config.json").read_text())["dtype"] == "float32"
        assert any(value.ne(value.bfloat16()).any() for value in load_file(path).values())
    for rank in found:
        own = rank["narrow"]
        # Before the training it computes in autocast, as on one process.
        assert own["before"] == pytest.approx(expected["before"], rel=1e-6)
        assert own["after"] == pytest.approx(expected["after"], rel=1e-2)
        for record, other in zip(own["records"], expected["records"], strict=True):
            assert record["metrics"]["test"] == pytest.approx(other["metrics"]["test"], rel=1e-2)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_a_checkpoint_of_deepspeed_is_complete_with_the_states_of_every_process(tmp_path, stage, prefix):
    states = tmp_path / "checkpoint-4" / "global_step4"
    states.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, tmp_path / "checkpoint-4" / "model.safetensors")
    (states.parent / "latest").write_text("global_step4")
    models = ["mp_rank_00"] if stage == 2 else ["zero_pp_rank_0_mp_rank_00", "zero_pp_rank_1_mp_rank_00"]
    own = [f"{name}_model_states.pt" for name in models]
    own += [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    for path in [*(states / name for name in own), *(states.parent / f"rng_state_{rank}.pth" for rank in range(2))]:
        torch.save({}, path)
    torch.save({}, states.parent / "scheduler.pt")
    assert is_incomplete(states.parent)
    (states.parent / "trainer_state.json").write_text('{"global_step": 4}')
    assert checkpoint_error(states.parent, 4) is None and not is_incomplete(states.parent)
    for name in own:
        content = (states / name).read_bytes()
        (states / name).write_bytes(content[:-30])
        assert checkpoint_error(states.parent, 4).startswith(f"{name}: cannot be read")
        (states / name).unlink()
        assert checkpoint_error(states.parent, 4).endswith("is missing")
        (states / name).write_bytes(content)
    (states.parent / "latest").write_text("global_step2")
    assert checkpoint_error(states.parent, 4) == "latest: names 'global_step2', which is no folder of states"


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
