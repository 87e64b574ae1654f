"""What of a killed run is deleted, and what never is."""

import logging
import os
import shutil

import manifests
import pytest

from born_again.lineage.folders import clean_up, remove_leftovers, remove_training_files, set_aside_later_checkpoints
from born_again.lineage.lock import LOCK_NAME, FolderLock
from born_again.lineage.manifest import Manifest


def manifest(folder, *records):
    return Manifest(folder / "lineage.json", manifests.content(*records or [manifests.training(0)]))


def test_leftovers_of_a_killed_run_are_deleted_and_nothing_else(tmp_path, caplog):
    folder, outside = tmp_path / "out", tmp_path / "outside"
    gone = [".gen0.partial", ".gen12.partial", ".lineage.json.a_b1c2d3", ".lineage.replaced-1.json.abcdefgh"]
    kept = ["gen0", ".gen.partial", ".gen1.partial.old", "x.gen1.partial", ".lineage.lock", "lineage.json"]
    kept += [".lineage.json.bak", ".lineage.json.A_b1c2d3", "lineage.json.a_b1c2d3", ".gen3.partial", ".gen4.partial"]
    kept += [".lineage.json.aaaaaaaa", ".lineage.json.bbbbbbbb"]
    for name in (*gone[:2], "gen0", ".gen.partial", ".gen1.partial.old", "x.gen1.partial", ".lineage.json.bbbbbbbb"):
        (folder / name / "inner").mkdir(parents=True)
        (folder / name / "inner" / "file").write_text("1")
    for name in (*gone[2:], ".lineage.lock", "lineage.json", ".lineage.json.bak", ".lineage.json.A_b1c2d3"):
        (folder / name).write_text("1")
    for name in ("lineage.json.a_b1c2d3", ".gen4.partial"):
        (folder / name).write_text("1")
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (folder / ".gen3.partial").symlink_to(outside)
    (folder / ".lineage.json.aaaaaaaa").symlink_to(outside / "precious")
    (folder / ".gen0.partial" / "link").symlink_to(outside)
    with caplog.at_level(logging.INFO):
        assert [path.name for path in remove_leftovers(manifest(folder))] == gone
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]
    assert ".gen12.partial, a leftover of a killed run, is deleted" in caplog.text
    assert remove_leftovers(manifest(folder)) == [] and remove_leftovers(manifest(tmp_path / "nothing")) == []


def test_a_leftover_that_cannot_be_deleted_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / ".gen0.partial").mkdir()
    (tmp_path / ".lineage.json.abcdefgh").write_text("")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert [path.name for path in remove_leftovers(manifest(tmp_path))] == [".lineage.json.abcdefgh"]
    assert ".gen0.partial, a leftover of a killed run, cannot be deleted (Permission denied)" in caplog.text


def test_temporary_files_of_the_ensemble_are_deleted_and_its_own_are_not(tmp_path):
    (tmp_path / "ensemble").mkdir()
    for name in ("ensemble.json", "README.md", ".ensemble.json.a_b1c2d3", ".README.md.abcdefgh"):
        (tmp_path / "ensemble" / name).write_text("1")
    assert len(remove_leftovers(manifest(tmp_path))) == 2
    assert sorted(path.name for path in (tmp_path / "ensemble").iterdir()) == ["README.md", "ensemble.json"]


def test_checkpoints_of_finished_generations_are_deleted_unless_they_are_kept(tmp_path):
    for index in range(4):
        (tmp_path / "checkpoints" / f"gen{index}" / "checkpoint-2").mkdir(parents=True)
    known = manifest(
        tmp_path,
        manifests.record(0, checkpoints=[]),
        manifests.record(1, checkpoints=["checkpoint-2"]),
        manifests.record(2),  # of a version that did not tell
        manifests.training(3, checkpoints=[]),
    )
    assert [path.name for path in remove_leftovers(known)] == ["gen0"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["gen1", "gen2", "gen3"]


@pytest.mark.parametrize("newest", ["finished", "training"])
def test_answers_of_a_teacher_that_teaches_no_more_are_deleted(tmp_path, newest):
    (tmp_path / "teacher_cache" / "a1").mkdir(parents=True)
    last = manifests.record(1) if newest == "finished" else manifests.training(1)
    gone = [path.name for path in remove_leftovers(manifest(tmp_path, manifests.record(0), last))]
    assert gone == (["teacher_cache"] if newest == "finished" else [])
    assert (tmp_path / "teacher_cache").exists() == (newest == "training")


@pytest.mark.parametrize("keep", [True, False])
def test_what_served_a_generation_goes_with_it(tmp_path, keep):
    for name in ("teacher_cache/a1", "checkpoints/gen1/checkpoint-2", "checkpoints/gen2/checkpoint-1", "gen1"):
        (tmp_path / name).mkdir(parents=True)
    remove_training_files(tmp_path, 1, keep_checkpoints=keep)
    remove_training_files(tmp_path, 1, keep_checkpoints=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "gen1"]
    assert (tmp_path / "checkpoints" / "gen1").exists() == keep and (tmp_path / "checkpoints" / "gen2").exists()


@pytest.mark.parametrize("left", [["gen0"], []])
def test_an_empty_folder_of_checkpoints_goes_too(tmp_path, left):
    (tmp_path / "checkpoints").mkdir()
    for name in left:
        (tmp_path / "checkpoints" / name).mkdir()
    clean_up(manifest(tmp_path, manifests.record(0, checkpoints=[])))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_lineage_is_left_alone_while_another_run_holds_it(tmp_path):
    (tmp_path / ".gen0.partial").mkdir()
    with FolderLock(tmp_path):
        clean_up(manifest(tmp_path))
        assert (tmp_path / ".gen0.partial").exists()
    (tmp_path / LOCK_NAME).write_text("{}")  # of a killed run
    clean_up(manifest(tmp_path))
    assert list(tmp_path.iterdir()) == []


def checkpoint(folder, step, *, without=(), more=()):
    """A checkpoint of small files, as far as clearing looks into them."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    names = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "config.json")
    for name in {*names, "trainer_state.json", *more} - {*without}:
        (path / name).write_text("{}")
    return path


def test_what_a_kill_left_half_written_is_deleted(tmp_path, caplog):
    folder = tmp_path / "gen1"
    checkpoint(folder, 2, without=("trainer_state.json",))
    (checkpoint(folder, 4) / "trainer_state.json").write_text('{"global_')
    set_aside_later_checkpoints(folder, None, [])
    assert list(tmp_path.rglob("*")) == [folder] and caplog.text == ""


def test_after_a_whole_checkpoint_only_what_a_kill_left_half_written_is_deleted(tmp_path, caplog):
    folder = tmp_path / "gen1"
    names = [checkpoint(folder, step).name for step in (2, 4)]
    checkpoint(folder, 10, without=("optimizer.pt",))
    checkpoint(folder, 12, without=("trainer_state.json",))
    (folder / "checkpoint-x").mkdir()
    set_aside_later_checkpoints(folder, folder / "checkpoint-4", ["checkpoint-10"])
    assert sorted(path.name for path in folder.iterdir()) == [*names, "checkpoint-x"]
    aside = tmp_path / "gen1.replaced-1"
    assert [path.name for path in aside.iterdir()] == ["checkpoint-10"]
    assert "checkpoint-10 cannot be resumed from" in caplog.text and "step 0" not in caplog.text


def test_checkpoints_in_folders_of_other_names_are_moved_aside(tmp_path, caplog):
    """Trainer does not find them, and they would go with their generation's folder."""
    folder = tmp_path / "gen1"
    checkpoint(folder, 5).rename(folder / "ckpt_5")
    checkpoint(folder, 10).rename(folder / "checkpoint-10.good")
    (folder / "runs").mkdir()
    set_aside_later_checkpoints(folder, None, ["checkpoint-5", "checkpoint-10"])
    assert [path.name for path in folder.iterdir()] == ["runs"]
    aside = tmp_path / "gen1.replaced-1"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-10.good", "ckpt_5"]
    assert "does not have the name of a checkpoint" in caplog.text
    assert "begins again at step 0" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "recorded"),
    [
        ({"without": ("optimizer.pt",)}, False),
        ({"without": ("trainer_state.json",)}, True),
        ({"without": ("optimizer.pt",), "more": ("optimizer.bak",)}, False),
        ({"without": ("trainer_state.json",), "more": ("state.old",)}, False),
    ],
)
def test_what_may_hold_trained_work_is_moved_aside(tmp_path, caplog, wrong, recorded):
    folder = tmp_path / "gen1"
    before = sorted(path.name for path in checkpoint(folder, 8, **wrong).iterdir())
    (tmp_path / "gen1.replaced-1").mkdir()
    set_aside_later_checkpoints(folder, None, ["checkpoint-8"] if recorded else [])
    kept = tmp_path / "gen1.replaced-2" / "checkpoint-8"
    assert sorted(path.name for path in kept.iterdir()) == before and list(folder.iterdir()) == []
    assert "checkpoint-8 cannot be resumed from (" in caplog.text and "begins again at step 0" in caplog.text
    assert f"it is kept as {os.path.join('gen1.replaced-2', 'checkpoint-8')}" in caplog.text


def test_another_layout_is_moved_aside_after_a_whole_checkpoint_too(tmp_path, caplog):
    folder = tmp_path / "gen1"
    whole = checkpoint(folder, 4)
    (folder / "checkpoint-8" / "optimizer_0").mkdir(parents=True)  # as a sharded engine writes it
    checkpoint(folder, "0010")
    (folder / "checkpoint-12").symlink_to(whole)
    set_aside_later_checkpoints(folder, whole, [])
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12", "checkpoint-4"]
    assert sorted(path.name for path in (tmp_path / "gen1.replaced-1").iterdir()) == [
        "checkpoint-0010",
        "checkpoint-8",
    ]
    assert "holds files that do not belong to a checkpoint" in caplog.text and "step 0" not in caplog.text
