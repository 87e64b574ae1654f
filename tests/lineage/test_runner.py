"""The loop: what it trains, what it writes, how it goes on, and what it refuses."""

import json
import logging
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import sequence_classifier
from tiny_lineage import Crash, hashes, runner, spec
from transformers import AutoModelForSequenceClassification, TrainerCallback

from born_again import LineageRunner
from born_again.lineage.folders import last_checkpoint
from born_again.lineage.manifest import LineageError, Manifest, file_sha256


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("lineage") / "out"
    runner(folder).run()
    return folder


def test_a_lineage_leaves_a_folder_a_generation_and_its_record(finished):
    assert sorted(path.name for path in finished.iterdir()) == ["gen0", "gen1", "gen2", "lineage.json"]
    content = json.loads((finished / "lineage.json").read_text())
    assert content["spec"]["objective"] == "ban+l" and content["data"]["sha256"] == "a"
    for index, record in enumerate(content["generations"]):
        assert record["index"] == index and record["status"] == "finished"
        assert record["seed"] == 3 + index
        assert record["parent"] == (None if index == 0 else index - 1)
        assert record["objective"] == ("label" if index == 0 else "ban+l")
        assert record["weights_sha256"] == file_sha256(finished / f"gen{index}" / "model.safetensors")
        assert set(record["metrics"]) == {"test"} and record["metrics"]["test"]["loss"] > 0
        assert (
            record["seconds"] > 0
            and torch.__version__.startswith(record["versions"]["torch"])
            and record["hub"] is None
        )
        assert (record["teacher_fit"] is None) == (index == 0)
        assert sorted(path.name for path in (finished / f"gen{index}").iterdir()) == [
            "config.json",
            "history.json",
            "model.safetensors",
        ]
    assert len(set(hashes(finished))) == 3


def test_the_same_command_again_trains_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    again = runner(finished, built=(built := []))
    assert again.is_finished()
    again.run()
    assert built == []
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_two_runs_of_one_command_give_the_same_weights(finished, tmp_path):
    runner(tmp_path / "out").run()
    assert hashes(tmp_path / "out") == hashes(finished)


def test_a_generation_depends_on_nothing_that_ran_before(finished, tmp_path):
    """The second half of a lineage, trained by another process, is the same."""
    folder = tmp_path / "out"
    runner(folder, spec=spec(generations=1)).run()
    torch.rand(1000)
    more = runner(folder, built=(built := []))
    assert not more.is_finished()
    more.run()
    assert [generation.index for generation in built] == [2]
    assert hashes(folder) == hashes(finished)
    assert Manifest.read(folder).spec.generations == 2


@pytest.mark.parametrize(
    ("step", "generation"),
    [(3, 0), (6, 1), *(pytest.param(*moment, marks=pytest.mark.slow) for moment in [(1, 0), (6, 0), (1, 1), (3, 1)])],
)
def test_an_interrupted_lineage_goes_on_to_the_same_weights(finished, tmp_path, generation, step):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, crash=Crash(generation, step)).run()
    assert Manifest.read(folder).record(generation)["status"] == "training"
    runner(folder, built=(built := [])).run()
    assert [entry.index for entry in built] == list(range(generation, 3))
    assert hashes(folder) == hashes(finished)
    assert Manifest.read(folder).record(generation)["metrics"] == Manifest.read(finished).record(generation)["metrics"]
    assert sorted(path.name for path in folder.iterdir()) == ["gen0", "gen1", "gen2", "lineage.json"]


def test_checkpoints_are_kept_on_request(tmp_path):
    done = runner(tmp_path / "out", spec=spec(generations=0), keep_checkpoints=True).run()
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints" / "gen0").iterdir())
    assert kept == done.record(0)["checkpoints"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_checkpoints_in_training_are_told_and_those_of_finished_generations_are_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path / "out", crash=Crash(1, 5)).run()
    finished, begun = Manifest.read(tmp_path / "out").generations
    assert finished["checkpoints"] == [] and not (tmp_path / "out" / "checkpoints" / "gen0").exists()
    assert begun["checkpoints"] == ["checkpoint-2", "checkpoint-4"] and begun["seconds"] > 0


def test_a_crash_between_a_generation_and_its_record_leaves_nothing_behind(finished, tmp_path, monkeypatch):
    folder, update = tmp_path / "out", Manifest.update

    def crashing(manifest, index, **fields):
        if fields.get("status") == "finished":
            raise KeyboardInterrupt
        update(manifest, index, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "update", crashing)
        with pytest.raises(KeyboardInterrupt):
            runner(folder).run()
    assert (folder / "gen0").is_dir() and Manifest.read(folder).record(0)["status"] == "training"
    (folder / ".gen0.partial").mkdir()
    (folder / ".lineage.json.abcd_123").write_text("{")
    runner(folder).run()
    assert hashes(folder) == hashes(finished)
    assert sorted(path.name for path in folder.iterdir()) == ["gen0", "gen1", "gen2", "lineage.json"]


@pytest.mark.slow
def test_a_crash_after_the_last_step_trains_none_more(tmp_path, monkeypatch):
    # The checkpoint of the last step is in the middle of an epoch of three.
    options = {"spec": spec(generations=1), "changes": {"max_steps": 4, "lr_scheduler_type": "constant"}}
    runner(tmp_path / "whole", **options).run()
    with monkeypatch.context() as patch:
        patch.setattr(LineageRunner, "_finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runner(tmp_path / "cut", **options).run()
    done = runner(tmp_path / "cut", **options).run()
    assert [record["steps"] for record in done.generations] == [4, 4]
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_a_network_trained_elsewhere_is_the_teacher(finished, tmp_path):
    folder, source = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(finished / "gen1", source)
    asked = spec(generations=1, teacher=str(source))
    options = {"spec": asked, "take_teacher": lambda: AutoModelForSequenceClassification.from_pretrained(source)}
    with pytest.raises(KeyboardInterrupt):
        runner(folder, crash=Crash(1, 3), **options).run()
    shutil.rmtree(source)  # from here on the lineage has its own copy
    done = runner(folder, **options).run()
    taught, student = done.generations
    assert taught["weights_sha256"] == hashes(finished)[1] and taught["status"] == "finished"
    assert (taught["objective"], taught["seed"], taught["steps"]) == ("external", None, 0)
    assert (
        taught["source"] == {"path_or_repo": str(source), "revision": None} and taught["metrics"]["test"]["loss"] > 0
    )
    assert student["seed"] == asked.seed + 1 and student["parent"] == 0 and student["teacher_fit"] is not None
    with pytest.raises(LineageError, match=f"teacher: None here, '{source}' there"):
        runner(folder, spec=spec(generations=1))


def test_a_network_trained_elsewhere_that_cannot_teach_is_not_kept(tmp_path):
    other = sequence_classifier(1).train()
    other.config.id2label = {index: f"other {index}" for index in other.config.id2label}
    with pytest.raises(ValueError, match="teacher: .*other 0"):
        runner(tmp_path / "out", spec=spec(teacher="elsewhere"), take_teacher=lambda: other).run()
    assert not {"gen0", "lineage.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert other.training and all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(ValueError, match="take_teacher: got None and a spec with teacher 'elsewhere'"):
        runner(tmp_path / "out", spec=spec(teacher="elsewhere"))


def test_evaluate_measures_the_files_and_the_card_is_written(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model)
        return {"test": {"accuracy": 0.5}}

    def write_card(manifest, index, curve):
        assert (tmp_path / "out" / ".gen0.partial" / curve).is_file()
        return f"{manifest['name']} {index} {manifest['generations'][index]['metrics']['test']['accuracy']}"

    def draw_curve(history, path):
        assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]
        return path.write_bytes(b"drawn") > 0

    options = {"evaluate": evaluate, "write_card": write_card, "draw_curve": draw_curve}
    options["changes"] = {"logging_steps": 2}
    done = runner(tmp_path / "out", spec=spec(generations=0), **options).run()
    assert done.record(0)["metrics"] == {"test": {"accuracy": 0.5}}
    assert (tmp_path / "out" / "gen0" / "README.md").read_text() == "tiny-words 0 0.5"
    on_disk = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "gen0")
    assert all(torch.equal(a, b) for a, b in zip(seen[0].parameters(), on_disk.parameters(), strict=True))


def test_the_report_is_written_after_each_generation_and_its_errors_end_no_training(tmp_path, caplog):
    folder, seen = tmp_path / "out", []

    def write_report(output_dir):
        records = Manifest.read(output_dir).generations
        seen.append([record["status"] for record in records] + [len(list(output_dir.glob("gen*/history.json")))])
        raise RuntimeError("no ink")

    def write_card(manifest, index, curve, report, picture):
        return f"{curve} {report} {picture}"

    options = {"write_card": write_card, "write_report": write_report, "changes": {"logging_steps": 2}}
    with caplog.at_level(logging.WARNING, "born_again"):
        runner(folder, spec=spec(generations=1), **options).run()
    assert seen == [["finished", 1], ["finished", "finished", 2]]
    assert "is not written (RuntimeError: no ink); the training goes on" in caplog.text
    assert (folder / "gen1/README.md").read_text() == "None ../report.html ../report.png"
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    runner(
        folder, spec=spec(generations=1), **options
    ).run()  # finished: nothing is written, the folder may be read-only
    assert len(seen) == 2 and before == {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_another_experiment_is_refused_and_nothing_is_touched(finished):
    before = (finished / "lineage.json").read_bytes()
    with pytest.raises(LineageError, match="objective: 'ban' here, 'ban\\+l' there; seed: 4 here, 3 there"):
        runner(finished, spec=spec(objective="ban", seed=4))
    assert (finished / "lineage.json").read_bytes() == before


def test_other_data_is_refused(finished):
    with pytest.raises(LineageError, match=r"the data is not what the lineage .* was trained on \(other sha256\)"):
        runner(finished, data={"sha256": "b", "rows": {"train": 22}})


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(LineageError, match="holds something that is no lineage .* nothing in it was touched"):
        runner(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(LineageError, match="holds something that is no lineage"):
        runner(tmp_path / "thesis.tex")


def test_changed_and_missing_weights_are_refused(tmp_path):
    folder = tmp_path / "out"
    runner(folder, spec=spec(generations=0)).run()
    weights = folder / "gen0" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LineageError, match="does not hash to what lineage.json holds"):
        runner(folder).run()
    weights.unlink()
    with pytest.raises(LineageError, match="is missing, though lineage.json says that generation 0 is finished"):
        runner(folder).run()


def test_a_generation_folder_of_unknown_origin_is_kept_aside(tmp_path, caplog):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, crash=Crash(0, 1)).run()
    (folder / "gen0").mkdir()
    (folder / "gen0" / "precious.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        runner(folder, spec=spec(generations=0)).run()
    assert (folder / "gen0.replaced-1" / "precious.txt").read_text() == "mine"
    assert "kept as gen0.replaced-1" in caplog.text


def test_nan_names_generation_and_step_and_keeps_checkpoints(tmp_path):
    folder = tmp_path / "out"
    runner(folder, spec=spec(generations=0)).run()

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.classifier.weight.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="generation 1 of tiny-words: weights: not finite after step 4 of 6"):
        runner(folder, crash=Poison()).run()
    assert last_checkpoint(folder / "checkpoints" / "gen1").name == "checkpoint-2"
    assert Path(folder / "gen0").is_dir()


@pytest.mark.slow
def test_memory_of_a_generation_is_let_go(tmp_path):
    """No student, teacher or trainer of a finished generation is reachable."""
    import gc
    import weakref

    alive = []
    work = runner(tmp_path / "out")
    build_trainer = work.build_trainer

    def watch(student, teacher, generation):
        trainer = build_trainer(student, teacher, generation)
        alive.extend(weakref.ref(value) for value in (student, teacher, trainer) if value is not None)
        return trainer

    work.build_trainer = watch
    work.run()
    gc.collect()
    assert len(alive) == 8 and not [reference for reference in alive if reference() is not None]


def test_a_measurement_that_is_not_finite_costs_no_generation_its_record(tmp_path):
    def evaluate(model):
        return {"test": {"nll": 800.0, "perplexity": float("inf"), "tokens": 7}}

    runner(tmp_path / "out", spec=spec(generations=0), evaluate=evaluate).run()
    (record,) = json.loads((tmp_path / "out" / "lineage.json").read_text())["generations"]
    assert record["status"] == "finished"
    assert record["metrics"] == {"test": {"nll": 800.0, "perplexity": None, "tokens": 7}}


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}


def test_generation_0_has_the_normalised_loss_of_its_students(tmp_path, caplog):
    """Batch 8 is 2 x 4 accumulated for the teacher too, which stock Trainer gives twice the loss for."""
    for name, changes in (("accumulated", ACCUMULATED), ("whole", {})):
        work = runner(tmp_path / name, spec=spec(generations=0), changes=changes)
        work.build_student = lambda generation: sequence_classifier(generation.seed)  # without dropout
        with caplog.at_level(logging.INFO):
            assert work.run().record(0)["loss_normalization"] == "step"
        assert "Generation 0 of tiny-words has the mean over all items of a step as its loss" in caplog.text
    weights = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "gen0", dtype="float64").state_dict()
        for name in ("accumulated", "whole")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_generation_0_that_an_earlier_version_began_goes_on_as_it_was_begun(tmp_path, monkeypatch, caplog):
    begun_earlier = {"spec": spec(generations=0), "changes": ACCUMULATED}
    with monkeypatch.context() as patch:
        patch.setattr(LineageRunner, "_normalize_loss", lambda *_: None)
        runner(tmp_path / "earlier", **begun_earlier).run()
        with pytest.raises(KeyboardInterrupt):
            runner(tmp_path / "cut", crash=Crash(0, 3), **begun_earlier).run()
    content = json.loads((tmp_path / "cut" / "lineage.json").read_text())
    del content["generations"][0]["loss_normalization"]
    (tmp_path / "cut" / "lineage.json").write_text(json.dumps(content))
    with caplog.at_level(logging.INFO):
        done = runner(tmp_path / "cut", **begun_earlier).run()
    assert "was begun with Trainer's normalisation of the loss" in caplog.text
    assert "loss_normalization" not in done.record(0)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "earlier")
    runner(tmp_path / "now", **begun_earlier).run()
    assert hashes(tmp_path / "now") != hashes(tmp_path / "earlier")
    again = runner(tmp_path / "cut", from_generation=0, **begun_earlier).run()
    assert again.record(0)["loss_normalization"] == "step"
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "now")


def squared(student_logits, teacher_logits, labels):
    losses = (student_logits - teacher_logits).square().mean(-1)
    return losses, torch.ones_like(losses)


def test_a_function_as_objective_is_recorded_by_its_name(tmp_path):
    name = f"custom: {__name__}.squared"

    def lineage(folder, objective):
        made = runner(tmp_path / folder, spec=spec(objective=objective, generations=1), changes={"objective": "ban"})
        build = made.build_trainer

        def build_trainer(student, teacher, generation):
            trainer = build(student, teacher, generation)
            trainer._take_objective(squared)
            return trainer

        made.build_trainer = build_trainer
        return made

    assert lineage("out", name).run().record(1)["objective"] == name
    message = f"objective: the spec of tiny-words says 'ban', and build_trainer gave .*LineageSpec.objective='{name}'"
    with pytest.raises(ValueError, match=message):
        lineage("other", "ban").run()  # before generation 0 is trained
    assert not (tmp_path / "other" / "gen0").exists()
    with pytest.raises(ValueError, match=f"objective: the spec of tiny-words says '{name}', and build_trainer gave a"):
        runner(tmp_path / "out", spec=spec(objective=name), changes={"objective": "ban"}).run()
