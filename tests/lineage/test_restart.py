"""--from_generation: what is trained anew, what is kept, and what a crash in between leads to."""

import json

import manifests
import pytest
import torch
from tiny_lineage import Crash, hashes, runner, spec

from born_again import LineageSpec
from born_again.lineage.folders import check_restart, restart_from
from born_again.lineage.manifest import LineageError, Manifest, file_sha256


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("lineage") / "out"
    runner(folder).run()
    return folder


def made(folder, students=2):
    """Three finished generations and the ensembles of two and of all, without a training."""
    manifest = Manifest.create(folder, LineageSpec("tiny", "bert", "words", generations=students), {})
    for index in range(3):
        manifest.generations.append(manifests.record(index))
        (folder / f"gen{index}").mkdir(parents=True)
        (folder / f"gen{index}" / "model.safetensors").write_text(f"weights {index}")
    weights = [record["weights_sha256"] for record in manifest.generations]
    manifest.content["ensembles"] = [
        {
            "members": members,
            "average": "probabilities",
            "weights_sha256": [weights[index] for index in members],
            "metrics": {},
        }
        for members in ([0, 1], [1, 2])
    ]
    (folder / "ensemble").mkdir()
    manifest.save()
    return manifest


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_same_weights_come_again_and_those_before_are_kept(finished):
    before = hashes(finished)
    again = runner(finished, from_generation=1, built=(built := []))
    assert not again.is_finished()
    again.run()
    assert [generation.index for generation in built] == [1, 2]
    assert hashes(finished) == before
    aside = [f"gen{index}.replaced-1" for index in (1, 2)]
    assert names(finished) == sorted(["gen0", "gen1", "gen2", "lineage.json", "lineage.replaced-1.json", *aside])
    for index in (1, 2):
        assert file_sha256(finished / f"gen{index}.replaced-1" / "model.safetensors") == before[index]
    kept = json.loads((finished / "lineage.replaced-1.json").read_text())
    assert [record["weights_sha256"] for record in kept["generations"]] == before
    assert "restart" not in Manifest.read(finished).content


@pytest.mark.slow
@pytest.mark.parametrize("generation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_same_command_after_a_crash_goes_on_with_the_restart(tmp_path, generation):
    folder = tmp_path / "out"
    runner(folder).run()
    before = hashes(folder)
    with pytest.raises(KeyboardInterrupt):
        runner(folder, from_generation=1, crash=Crash(generation, 5)).run()
    assert Manifest.read(folder).content["restart"] == {"from_generation": 1}
    runner(folder, from_generation=1, built=(built := [])).run()
    assert [made.index for made in built] == list(range(generation, 3))
    assert hashes(folder) == before
    assert [name for name in names(folder) if "replaced-2" in name] == []


def test_folders_checkpoints_and_ensembles_are_moved_and_numbered(tmp_path):
    manifest = made(tmp_path)
    (tmp_path / "checkpoints" / "gen2" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "gen2.replaced-1").mkdir()
    restart_from(manifest, 2)
    assert names(tmp_path) == [
        "checkpoints",
        "ensemble.replaced-1",
        "gen0",
        "gen1",
        "gen2.replaced-1",
        "gen2.replaced-2",
        "lineage.json",
        "lineage.replaced-1.json",
    ]
    assert names(tmp_path / "checkpoints") == ["gen2.replaced-1"]
    read = Manifest.read(tmp_path)
    assert len(read.generations) == 2
    assert [ensemble["members"] for ensemble in read.content["ensembles"]] == [[0, 1]]


@pytest.mark.parametrize("moment", range(5))
def test_a_crash_between_any_two_steps_loses_nothing(tmp_path, monkeypatch, moment):
    manifest = made(tmp_path)
    done = 0

    def crashing(function):
        def call(*args, **kwargs):
            nonlocal done
            if done == moment:
                raise KeyboardInterrupt
            done += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("born_again.lineage.folders.move_aside", crashing(restart_from.__globals__["move_aside"]))
        patch.setattr(
            "born_again.lineage.folders._backup_manifest", crashing(restart_from.__globals__["_backup_manifest"])
        )
        patch.setattr(Manifest, "save", crashing(Manifest.save))
        with pytest.raises(KeyboardInterrupt):
            restart_from(manifest, 1)
    restart_from(Manifest.read(tmp_path), 1)
    assert len(Manifest.read(tmp_path).generations) == 1
    texts = sorted(path.read_text() for path in tmp_path.rglob("model.safetensors"))
    assert texts == ["weights 0", "weights 1", "weights 2"]


@pytest.mark.parametrize("index", [-1, 4, True, 1.0, "1"])
def test_a_generation_that_is_none_is_refused(tmp_path, index):
    with pytest.raises(ValueError, match=r"from_generation: got .*, expected a generation from 0 .* to 3"):
        check_restart(made(tmp_path, students=3), index)


def test_a_generation_after_one_that_is_not_finished_is_refused_before_anything_is_moved(tmp_path):
    with pytest.raises(LineageError, match="got 2, but generation 0 before it is not finished, expected at most 0"):
        runner(tmp_path / "out", from_generation=2)
    assert not (tmp_path / "out").exists()
    manifest = made(tmp_path, students=4)
    manifest.generations[2] = manifests.training(2)
    check_restart(manifest, 2)
    with pytest.raises(LineageError, match="got 3, but generation 2 before it"):
        check_restart(manifest, 3)


def test_the_next_generation_that_is_not_begun_replaces_nothing(tmp_path):
    manifest = made(tmp_path, students=3)
    restart_from(manifest, 3)
    assert names(tmp_path) == ["ensemble", "gen0", "gen1", "gen2", "lineage.json"]


def test_another_experiment_stays_refused(finished):
    with pytest.raises(LineageError, match="seed: 4 here, 3 there"):
        runner(finished, spec=spec(seed=4), from_generation=1)
