"""Another number of processes that share out the same batch is the same experiment, or is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import sequence_classifier
from processes import found_by
from reshared_lineages import CRASH, crash, lineage
from safetensors.torch import load_file
from tiny_lineage import Crash, runner, spec
from torch import nn

from born_again.lineage.global_batch import GlobalBatch, may_differ
from born_again.lineage.manifest import LineageError, Manifest
from born_again.training.arguments import BornAgainTrainingArguments

SCRIPT = Path(__file__).parents[1] / "support" / "reshared_lineages.py"
AS_ASKED = {"per_device_train_batch_size": 8}
TWICE_FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def largest_difference(folder: Path, other: Path) -> float:
    """Relative to the largest weight of each tensor, over the generations of two lineages."""
    paths = sorted(folder.glob("gen*/model.safetensors"))
    assert len(paths) == len([*other.glob("gen*/model.safetensors")]) > 1
    return max(
        float((own - value).abs().max() / value.abs().max())
        for path in paths
        for own, value in zip(
            load_file(other / path.relative_to(folder)).values(), load_file(path).values(), strict=True
        )
    )


@pytest.fixture(scope="module")
def reshared(tmp_path_factory):
    """Lineages begun on one process that ended on two, and the other way round; and those of one process."""
    folder = tmp_path_factory.mktemp("reshared")
    torch.set_num_threads(1)
    for kind in CRASH:
        lineage(kind, folder / kind).run()
        crash(kind, folder / f"{kind} begun on 1")
    found_by(SCRIPT, folder, processes=2)
    for kind in CRASH:
        lineage(kind, folder / f"{kind} begun on 2").run()
    return folder


@pytest.mark.parametrize("begun", [1, 2])
@pytest.mark.parametrize("kind", CRASH)
def test_another_number_of_processes_ends_with_the_weights_of_one(reshared, kind, begun):
    """In the middle of an epoch, with a carried state and momentum, and from the next generation on."""
    changed = reshared / f"{kind} begun on {begun}"
    assert 0 < largest_difference(reshared / kind, changed) < 1e-12
    first, second, third = Manifest.read(changed).generations
    assert [record["computation"]["processes"] for record in (first, second, third)] == [begun, begun, 3 - begun]
    rows = 4 if begun == 1 else 8
    other = {"processes": 3 - begun, "gradient_accumulation_steps": 1, "micro_batch_size": rows}
    step = 2 * ((CRASH[kind].step - 1) // 2)
    assert second["resumed_on"] == [{"step": step, **other}]
    assert "resumed_on" not in first and "resumed_on" not in third
    metrics, expected = ([record["metrics"]["test"] for record in Manifest.read(path).generations]
                         for path in (changed, reshared / kind))  # fmt: skip
    assert metrics[2] == pytest.approx(expected[2], rel=1e-10)


def test_fewer_rows_at_a_time_are_warned_of_and_each_change_is_recorded(tmp_path, caplog):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, spec=spec(training=AS_ASKED), crash=Crash(1, 3)).run()
    twice = spec(training=TWICE_FOUR)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        runner(folder, spec=twice, changes=TWICE_FOUR, crash=Crash(1, 5)).run()
    assert (
        "Generation 1 of tiny-words goes on with 1 process x 4 rows x 2 accumulated instead of 1 process x 8 rows: "
        "the same 8 rows a step"
    ) in caplog.text
    assert "computed differently" not in caplog.text
    done = runner(folder, spec=spec(training=AS_ASKED)).run()
    entry = {"processes": 1, "gradient_accumulation_steps": 2, "micro_batch_size": 4}
    back = {"processes": 1, "gradient_accumulation_steps": 1, "micro_batch_size": 8}
    assert done.record(1)["resumed_on"] == [{"step": 2, **entry}, {"step": 4, **back}]
    assert done.spec.training == AS_ASKED  # as it was begun


def test_a_lineage_of_an_earlier_version_goes_on_with_another_number_too(tmp_path):
    """Its records say neither how many rows a process read at once, nor, before, on how many processes."""
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, spec=spec(training=AS_ASKED), crash=Crash(1, 3)).run()
    content = json.loads((folder / "lineage.json").read_text())
    del content["generations"][0]["computation"], content["generations"][1]["computation"]["micro_batch_size"]
    (folder / "lineage.json").write_text(json.dumps(content))
    as_before = shutil.copytree(folder, tmp_path / "as before")
    assert "resumed_on" not in runner(as_before, spec=spec(training=AS_ASKED)).run().record(1)
    done = runner(folder, spec=spec(training=TWICE_FOUR), changes=TWICE_FOUR).run()
    assert [entry["micro_batch_size"] for entry in done.record(1)["resumed_on"]] == [4]


# ---- Refused ----


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Generation 0 finished, generation 1 interrupted after its first checkpoint."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, spec=spec(training=AS_ASKED), crash=Crash(1, 3)).run()
    return folder


def refused(begun, tmp_path, message, changes=TWICE_FOUR, training=TWICE_FOUR, edit=None, **options):
    folder = shutil.copytree(begun, tmp_path / "out")
    content = json.loads((folder / "lineage.json").read_text())
    if edit is not None:
        edit(content)
        (folder / "lineage.json").write_text(json.dumps(content))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(LineageError, match=message):
        runner(folder, spec=spec(training=training), changes=changes, **options).run()
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != "lineage.lock"} == before


def test_batchnorm_of_other_rows_is_another_experiment(begun, tmp_path, monkeypatch):
    def with_batchnorm(seed):
        student = sequence_classifier(seed)
        student.norm = nn.BatchNorm1d(4)
        return student

    monkeypatch.setattr("tiny_lineage.sequence_classifier", with_batchnorm)
    message = (
        "generation 1 would be another experiment on 1 process x 4 rows x 2 accumulated than on 1 process x 8 rows, "
        "as it was begun: its 1 BatchNorm layers have the statistics of the rows that a process reads at once; go on "
        "with --num_processes 1 with --per_device_train_batch_size 8 --gradient_accumulation_steps 1, or give another"
    )
    refused(begun, tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader_drop_last": True}, "dataloader_drop_last drops what does not fill 4 rows here, 8 there"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler=False orders rows"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length orders rows by what one process reads"),
    ],
)
def test_another_order_of_rows_is_another_experiment(begun, tmp_path, changes, message):
    refused(begun, tmp_path, message, changes={**TWICE_FOUR, **changes})


def test_a_loss_that_trainer_normalises_is_another_by_micro_batch(tmp_path):
    folder = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, spec=spec(training=AS_ASKED), crash=Crash(0, 3)).run()

    def of_an_earlier_version(content):
        del content["generations"][0]["loss_normalization"]

    message = r"generation 0 would be another .* mean of its micro-batches' means \(loss_normalization 'trainer'\)"
    refused(folder, tmp_path, message, edit=of_an_earlier_version)


def test_another_batch_is_refused_with_what_would_be_the_same(begun, tmp_path):
    message = (
        r"training.world_size: 2 here, 'default' there.; give the same arguments .--num_processes 1 with "
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 1, or --num_processes 2 with "
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 1. to continue it"
    )
    refused(begun, tmp_path, message, training={"world_size": 2, "per_device_train_batch_size": 8})
    # A spec that does not say: the record of the generation does.
    message = "on 1 process x 4 rows than on 1 process x 8 rows, .*: a step has 4 rows here, 8 there"
    shutil.rmtree(tmp_path / "out")
    refused(begun, tmp_path, message, changes={"per_device_train_batch_size": 4}, training=AS_ASKED)


# ---- How a batch is shared out ----


def test_what_may_differ_between_two_specs():
    split = {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 20}
    assert GlobalBatch.of_spec({**split, "world_size": 2}) == GlobalBatch(10, 1, 2)
    assert GlobalBatch.of_spec(split).size == GlobalBatch.of_spec({**split, "world_size": 4}).size == 20
    assert may_differ({}, {"per_device_train_batch_size": 2}) == set()
    fields = {f"training.{name}" for name in ("world_size", *TWICE_FOUR)}
    two = {"world_size": 2, "per_device_train_batch_size": 4}
    assert may_differ({}, two) == fields
    # One process normalises by all rows, as synchronised ones do.
    assert may_differ({}, {**two, "sync_batchnorm": True}) == {*fields, "training.sync_batchnorm"}
    known = BornAgainTrainingArguments.__dataclass_fields__
    assert {name.removeprefix("training.") for name in fields} - {"world_size"} <= {*known}


def test_the_same_batch_on_another_number_of_processes():
    batch = GlobalBatch(8, 2, 2)
    assert str(batch) == "2 processes x 8 rows x 2 accumulated" and batch.size == 32
    assert batch.same_on(4) == GlobalBatch(4, 2, 4) and batch.same_on(32) == GlobalBatch(1, 1, 32)
    assert batch.same_on(3) is None and batch.same_on(64) is None
    streams = GlobalBatch(10, 1, 2, split_batches=True)
    assert "--per_device_train_batch_size 20 " in streams.flags()
