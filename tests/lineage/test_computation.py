"""What decides the weights beside the arguments is recorded and compared, and what does not stands in nobody's way."""

import json
import logging
import mmap
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import Network, arguments, sequence_classifier, vectors
from tiny_lineage import Crash, hashes, runner, spec

from born_again import BornAgainTrainer
from born_again.lineage.machine import (
    COMPARED,
    SHARES,
    check_arguments,
    check_computation,
    check_sharding,
    computation_of,
    describe_computation,
    peak_memory_mib,
    precision_problem,
    reset_peak_memory,
)
from born_again.lineage.manifest import LineageError, Manifest
from born_again.training.environment import float32_precision, take_from_launcher


def trainer_of(folder, **changes):
    return BornAgainTrainer(Network(1), arguments(folder, **changes), train_dataset=vectors())


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- What is shown and recorded is what accelerate says ----


@pytest.mark.parametrize(
    ("environment", "changes", "expected", "recorded", "shown"),
    [
        ({}, {}, ("no", "no", 1), {}, "fp32, contiguous"),
        ({}, {"bf16": True}, ("bf16", "no", 1), {"bf16": True}, "bf16 autocast"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, ("bf16", "no", 1), {"bf16": True}, "bf16 autocast"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"bf16": True}, ("bf16", "no", 1), {"bf16": True}, "bf16 autocast"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_MODE": "reduce-overhead"},
            {},
            ("no", "eager", 1),
            {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "reduce-overhead"},
            "compiled by eager (reduce-overhead)",
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "NO"},
            {"torch_compile": True, "torch_compile_backend": "aot_eager"},
            ("no", "aot_eager", 1),
            {"torch_compile": True, "torch_compile_backend": "aot_eager"},
            "compiled by aot_eager (default)",
        ),
        (
            {},
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            ("no", "no", 4),
            {"gradient_accumulation_steps": 4},
            "4 batches a step",
        ),
        # Trainer reads the arguments alone.
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, ("no", "no", 1), {}, "not compiled"),
    ],
)
def test_arguments_say_what_accelerate_does(tmp_path, monkeypatch, environment, changes, expected, recorded, shown):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = arguments(tmp_path, **changes)
    assert shown in describe_computation(args)
    weight_affecting = args.weight_affecting()
    names = {"bf16", "fp16", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
    assert {
        name: weight_affecting[name] for name in weight_affecting if name in {*names, "gradient_accumulation_steps"}
    } == recorded
    for _ in range(2):  # the second trainer of the same arguments too
        found = computation_of(BornAgainTrainer(Network(1), args, train_dataset=vectors()))
        assert (
            found["mixed_precision"],
            found["dynamo_backend"],
            found["gradient_accumulation_steps"],
        ) == expected
    assert (found["processes"], found["device"], found["default_dtype"]) == (1, "cpu", "float32")


def test_the_precision_of_float32_is_shown_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    try:
        found = computation_of(trainer := trainer_of(tmp_path))
        line = describe_computation(trainer.args)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
    # What "medium" comes to is told by torch where it has a precision for each backend.
    matmul = "bf16" if hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision") else "medium"
    assert found["float32_precision"] == {"matmul": matmul, "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}
    assert found["default_dtype"] == "float64"
    assert f"fp32, default dtype float64, matmul {matmul}, ONEDNN_DEFAULT_FPMATH_MODE BF16, contiguous" in line
    monkeypatch.delenv("ONEDNN_DEFAULT_FPMATH_MODE")
    assert float32_precision("cpu") == {}


# ---- A flag, and the launcher ----


class Asked:
    def __init__(self, **values):
        defaults = {"bf16": False, "fp16": False, "gradient_accumulation_steps": 1, "torch_compile": False}
        self.__dict__ = {**defaults, "torch_compile_backend": None, "torch_compile_mode": None, **values}


BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
DYNAMO = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}


@pytest.mark.parametrize(
    ("environment", "given", "taken", "warning"),
    [
        ({}, {}, {}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, {"bf16": True}, {}, None),
        (BF16, {}, {"bf16": True, "fp16": False}, None),
        (BF16, {"bf16": True}, {"fp16": False}, None),
        (BF16, {"bf16": False}, {"fp16": False}, "--bf16 False .* ACCELERATE_MIXED_PRECISION=bf16"),
        (BF16, {"fp16": True}, {"bf16": False}, "--fp16 True .* ACCELERATE_MIXED_PRECISION=bf16"),
        (BF16, {"fp16": False}, {"bf16": True}, None),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, {"bf16": False, "fp16": False}, None),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"bf16": True}, {"fp16": False}, "--bf16 True .*=fp8"),
        (DYNAMO, {}, {"torch_compile": True, "torch_compile_backend": "inductor"}, None),
        (DYNAMO, {"torch_compile": False}, {}, "--torch_compile False .* ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {"gradient_accumulation_steps": 1},
            {},
            "--gradient_accumulation_steps 1 .* ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, {"gradient_accumulation_steps": 4}, None),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, {}, None),
    ],
)
def test_a_flag_wins_over_the_launcher_and_is_what_accelerate_does(
    tmp_path, monkeypatch, caplog, environment, given, taken, warning
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = Asked(**given)
    assert take_from_launcher(given, asked) == taken
    if warning is None:
        assert caplog.text == ""
    else:
        assert re.search(warning, caplog.text), caplog.text
    if environment.get("ACCELERATE_MIXED_PRECISION") == "fp8" and warning is None:
        return  # no library of this machine computes it
    args = arguments(tmp_path, **{**taken, **given})
    wanted = next((name for name in ("bf16", "fp16") if {**taken, **given}.get(name)), "no")
    assert args.mixed_precision == wanted
    assert args.weight_affecting().get("torch_compile", False) == {**taken, **given}.get("torch_compile", False)


# ---- Refused, because work would be lost, or is computed otherwise than it says ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_only_model": True}, "save_only_model: got True, expected False in a lineage.*leave it out"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "dataloader_persistent_workers: got True, expected False in a lineage",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: got True, expected False in a lineage.*smaller"),
        ({"ignore_data_skip": True}, "ignore_data_skip: got True, expected False in a lineage.*leave it out"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint: got True, expected False in a lineage.*SIGTERM"),
        ({"fp16": True}, "fp16: got True, .* on a CPU, where accelerate silently computes in float32"),
    ],
)
def test_what_a_lineage_cannot_go_on_from_is_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        runner(tmp_path / "out", changes=changes).run()
    assert not [path for path in (tmp_path / "out").rglob("*") if not path.is_dir()]
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments(tmp_path, **changes))
    assert not runner(tmp_path / "out").is_finished()  # what is left of it is no other lineage


def test_an_engine_that_no_lineage_knows(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ValueError, match="accelerate launch: got Megatron, which shards.*FSDP2"):
        check_arguments(arguments(tmp_path))


def test_an_engine_that_accelerate_does_not_take_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate launch: got FSDP, which accelerate did not take"):
        runner(tmp_path / "out").run()
    assert not [path for path in (tmp_path / "out").rglob("*") if not path.is_dir()]


@pytest.mark.parametrize(
    ("plugin", "changes", "message"),
    [
        ({"cpu_offload": True}, {}, "fsdp_offload_params: got True, expected False in a lineage"),
        ({"cpu_offload": None}, {"torch_compile": True}, "torch_compile: got 'inductor' with FSDP"),
        ({"zero_stage": 3}, {"torch_compile": True}, "torch_compile: got 'inductor' with DeepSpeed"),
        ({"zero_stage": 0}, {}, "zero_stage: got 0, expected 1, 2 or 3"),
        ({"zero_stage": 3, "folders": 2}, {}, "output_dir: got a folder of its own on each node with DeepSpeed"),
        (
            {"zero_stage": 3, "deepspeed_config": {"scheduler": {"type": "WarmupLR"}}},
            {},
            "deepspeed: its configuration has 'scheduler' 'WarmupLR', .* --lr_scheduler_type",
        ),
    ],
)
def test_how_a_lineage_cannot_be_sharded(tmp_path, monkeypatch, plugin, changes, message):
    trainer = trainer_of(tmp_path, **changes)
    engine, plugin = ("deepspeed" if "zero_stage" in plugin else "fsdp"), {"deepspeed_config": {}, **plugin}
    monkeypatch.setattr(trainer, f"is_{engine}_enabled", True)
    stand_ins = {f"{engine}_plugin": SimpleNamespace(**plugin), "distributed_type": DistributedType.NO}
    monkeypatch.setattr(trainer.accelerator, "state", SimpleNamespace(**stand_ins))
    with pytest.raises(ValueError, match=message):
        check_sharding(trainer, "folders" not in plugin)


def test_deepspeed_goes_on_with_the_same_stage_and_number_of_processes():
    here = {name: 2 for name in COMPARED}
    whole = {**here, "zero_stage": None}
    check_computation(whole, 1, {"computation": {**whole, "processes": 1}}, SHARES)
    for name in ("processes", "zero_stage"):
        with pytest.raises(LineageError, match=f"generation 1 would be .* \\({name}: 2 here, 3 there\\)"):
            check_computation(here, 1, {"computation": {**here, name: 3}}, SHARES)


def test_another_precision_is_deepspeeds_too(tmp_path):
    args = arguments(tmp_path, bf16=True)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"bf16": {"enabled": True}}, hf_ds_config=object())
    args.use_precision("no")
    config = args.deepspeed_plugin.deepspeed_config
    assert config == {"bf16": {"enabled": False}, "fp16": {"enabled": False}}


def test_fp16_is_not_computed_on_a_cpu(tmp_path):
    """The reason of the refusal: accelerate says fp16, and wraps nothing."""
    assert trainer_of(tmp_path, fp16=True).accelerator.native_amp is False
    assert precision_problem("fp16", torch.device("cpu")) and precision_problem("bf16", torch.device("cpu")) is None


# ---- Going on ----


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Generation 0 finished, generation 1 interrupted after its first checkpoint."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, crash=Crash(1, 3)).run()
    return folder


def test_a_generation_records_what_it_is_computed_in(begun):
    first, second = Manifest.read(begun).generations
    assert first["computation"] == second["computation"]
    assert {name: first["computation"][name] for name in ("mixed_precision", "gradient_accumulation_steps")} == {
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
    }
    assert first["computation"]["distributed_type"] == "NO" and first["computation"]["dynamo_mode"] is None


def test_an_interrupted_generation_does_not_go_on_in_another_precision(begun, tmp_path, monkeypatch):
    folder = shutil.copytree(begun, tmp_path / "out")
    before = (folder / "lineage.json").read_text()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    message = "generation 1 would be computed differently .*mixed_precision: 'bf16' here, 'no' there.*give the same"
    with pytest.raises(LineageError, match=message):
        runner(folder).run()
    assert (folder / "lineage.json").read_text() == before
    assert (folder / "checkpoints" / "gen1" / "checkpoint-2").is_dir()


def test_a_next_generation_in_another_computation_is_warned_of(begun, tmp_path, caplog):
    folder = shutil.copytree(begun, tmp_path / "out")
    content = json.loads((folder / "lineage.json").read_text())
    del content["generations"][1]
    (folder / "lineage.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "checkpoints")
    with caplog.at_level(logging.WARNING):
        runner(folder, spec=spec(generations=1), changes={"gradient_accumulation_steps": 2}).run()
    assert "Generation 1 of tiny-words is computed differently than the lineage before it: " in caplog.text
    assert "gradient_accumulation_steps: 2 here, 1 there" in caplog.text


def test_threads_and_records_of_earlier_versions_are_not_compared(begun, tmp_path, caplog):
    folder = shutil.copytree(begun, tmp_path / "out")
    content = json.loads((folder / "lineage.json").read_text())
    for record in content["generations"]:
        record["computation"] |= {"threads": 64, "device": "cuda", "float32_precision": {"conv": "tf32"}}
    del content["generations"][1]["computation"]["default_dtype"]
    (folder / "lineage.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        runner(folder).run()
    assert caplog.text == ""


HERE = {"source": "/home/a/birds", "revision": None, "rows": {"train": 22}, "sha256": "a", "image_column": "image"}
THERE = {"source": "b/birds", "revision": "0" * 40, "rows": {"train": 22}, "sha256": "a", "flip": True}


def test_the_same_data_from_another_place_goes_on(tmp_path):
    folder = tmp_path / "out"
    at_home = {"dataset": "/home/a/birds", "data_args": {"image_column": "image", "max_train_samples": 22}}
    runner(folder, spec=spec(generations=0, **at_home), data=HERE).run()
    elsewhere = {"dataset": "b/birds", "data_args": {"dataset_revision": "main"}}
    done = runner(folder, spec=spec(generations=1, **elsewhere), data=THERE).run()
    assert len(done.generations) == 2
    assert done.spec.dataset == "/home/a/birds" and done.content["data"] == HERE  # as it was begun
    Manifest.read(folder)
    for other, message in [
        ({**THERE, "sha256": "b"}, "dataset: 'b/birds' here, '/home/a/birds' there"),
        ({**THERE, "rows": {"train": 21}}, "the data is not what .* trained on .other rows."),
        ({"rows": {"train": 22}}, "dataset: 'b/birds' here"),
    ]:
        with pytest.raises(LineageError, match=message):
            runner(folder, spec=spec(generations=1, **elsewhere), data=other)
    with pytest.raises(LineageError, match="data_args.window: 9 here, 'default' there"):
        runner(folder, spec=spec(**{**elsewhere, "data_args": {"window": 9}}), data=THERE)


def test_the_same_teacher_from_another_place_goes_on(begun, tmp_path):
    def load():
        return sequence_classifier(0).from_pretrained(begun / "gen0")

    folder, moved = tmp_path / "out", tmp_path / "moved"
    runner(folder, spec=spec(generations=0, teacher=str(begun / "gen0")), take_teacher=load).run()
    shutil.copytree(begun / "gen0", moved)
    assert runner(folder, spec=spec(generations=0, teacher=str(moved)), take_teacher=load).is_finished()
    (moved / "model.safetensors").write_bytes(b"other")
    with pytest.raises(LineageError, match="teacher: .*moved' here"):
        runner(folder, spec=spec(generations=0, teacher=str(moved)), take_teacher=load)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["rename", "shard"])
def test_checkpoints_that_cannot_be_gone_on_from_are_kept(begun, tmp_path, caplog, spoil):
    """The training begins again, to the same weights; what was there is moved aside, and stays."""
    folder, whole = shutil.copytree(begun, tmp_path / "out"), tmp_path / "whole"
    checkpoint = folder / "checkpoints" / "gen1" / "checkpoint-2"
    if spoil == "rename":
        (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.pt.old")
    else:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "pytorch_model_fsdp_0").mkdir()
    files = sorted(path.name for path in checkpoint.iterdir())
    with caplog.at_level(logging.WARNING):
        runner(folder).run()
    kept = folder / "checkpoints" / "gen1.replaced-1" / "checkpoint-2"
    assert sorted(path.name for path in kept.iterdir()) == files
    assert "is missing" in caplog.text and "begins again at step 0" in caplog.text
    runner(whole).run()
    assert hashes(folder) == hashes(whole)


# ---- Memory ----


def test_the_peak_of_memory_is_that_of_a_generation():
    if not reset_peak_memory():
        pytest.skip("this system does not let a process reset its peak")
    before = peak_memory_mib()
    block = mmap.mmap(-1, 64 << 20)  # no allocator keeps it for later
    block.write(b"1" * (64 << 20))
    with_block = peak_memory_mib()
    assert with_block >= before + 60
    block.close()
    assert peak_memory_mib() >= with_block - 1  # a peak stays
    reset_peak_memory()
    assert peak_memory_mib() <= with_block - 50


def test_a_peak_that_cannot_be_reset_is_not_recorded(begun, tmp_path, monkeypatch):
    monkeypatch.setattr("born_again.lineage.machine._CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device's peak can be reset always")
    assert not reset_peak_memory() and peak_memory_mib() > 0
    folder = shutil.copytree(begun, tmp_path / "out")
    assert runner(folder).run().record(1)["peak_memory_mib"] is None
