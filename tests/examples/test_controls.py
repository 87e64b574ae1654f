"""--control: what a lineage is compared with, as lineages on disk that say so."""

import json

import pytest
from example_scripts import load_example
from safetensors.torch import load_file

from born_again import LineageEnsemble, LineageSpec
from born_again.lineage.manifest import LineageError, Manifest
from born_again.lineage.members import members_to_choose
from born_again.lineage.status import lineage_status

CIFAR = ["--smoke", "--max_train_samples", "32", "--max_eval_samples", "32", "--per_device_train_batch_size", "16",
         "--num_train_epochs", "1", "--seed", "5", "--objective", "ban+l", "--label_weight", "0.5",
         "--disable_tqdm", "True", "--threads", "1"]  # fmt: skip
PTB = ["--smoke", "--max_train_samples", "400", "--max_eval_samples", "60", "--num_train_epochs", "1",
       "--window", "10", "--per_device_train_batch_size", "4", "--threads", "1", "--disable_tqdm", "True"]  # fmt: skip


def run(script, *words):
    return load_example(script).start([*(CIFAR if script == "run_cifar" else PTB), *map(str, words)])


def content(folder):
    return json.loads((folder / "lineage.json").read_text())


def test_equal_compute_is_one_run_on_labels_as_long_as_the_whole_lineage(tmp_path, capsys):
    flags = ("--control", "equal-compute", "--generations", 3, "--output_dir", tmp_path / "out")
    run("run_cifar", *flags)
    (record,) = content(tmp_path / "out")["generations"]
    spec = Manifest.read(tmp_path / "out").spec
    assert record["steps"] == 4 * 2 and record["objective"] == "label" and record["seed"] == 5
    assert spec.control == "equal-compute" and spec.control_generations == 3 and spec.generations == 0
    assert spec.training["num_train_epochs"] == 4 and "label_weight" not in spec.training
    assert "control: one run on labels, as long as a teacher + 3" in capsys.readouterr().out
    card = (tmp_path / "out" / "gen0" / "README.md").read_text()
    assert "control: equal-compute" in card and "as long as a teacher and 3 students of a born-again lineage" in card
    assert "teacher of generation 1" not in card and "gain" not in card.split("## Calibration")[0].split("|\n\n")[1]
    run("run_cifar", *flags)
    assert "nothing is left to do" in capsys.readouterr().out
    with pytest.raises(LineageError, match="control: 'default' here, 'equal-compute' there"):
        run("run_cifar", *flags[2:])


def test_seeds_are_independent_runs_on_labels_and_their_ensemble(tmp_path, capsys):
    flags = ("--generations", 3, "--output_dir", tmp_path / "out")
    run("run_cifar", "--control", "seeds", *flags)
    found = content(tmp_path / "out")
    assert [record["seed"] for record in found["generations"]] == [5, 6, 7]
    assert all(record["parent"] is None and record["objective"] == "label" for record in found["generations"])
    assert [entry["members"] for entry in found["ensembles"]] == [[1, 2], [0, 1, 2]]
    assert [member.generation for member in LineageEnsemble.from_lineage(tmp_path / "out").members] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "control: 3 independent runs on labels" in printed and "(teacher)" not in printed
    assert "run 2 of 3 independent ones" in (tmp_path / "out" / "gen1" / "README.md").read_text().replace("\n", " ")
    assert "independently of one another" in (tmp_path / "out" / "ensemble" / "README.md").read_text()
    status = lineage_status(tmp_path / "out")
    assert status["control"] == "seeds" and status["next"]["action"] == "nothing"
    assert [facts["parent"] for facts in status["generations"]] == [None] * 3
    # Its first run is the teacher of the lineage of the same flags.
    run("run_cifar", "--generations", 0, "--output_dir", tmp_path / "lineage")
    weights = [load_file(tmp_path / name / "gen0" / "model.safetensors") for name in ("out", "lineage")]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_labels_are_smoothed_in_generation_0_alone_where_students_do_not_read_them(tmp_path, capsys):
    words = [word for word in CIFAR if word not in ("--label_weight", "0.5")]
    words += ["--objective", "ban", "--label_smoothing_factor", "0.1", "--generations", "1"]
    load_example("run_cifar").start([*words, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "Labels are smoothed by 0.1, in generation 0 alone, since objective 'ban' has no term with" in printed
    assert content(tmp_path / "out")["spec"]["training"]["label_smoothing_factor"] == 0.1
    assert "(in generation 0 alone" in (tmp_path / "out" / "gen1" / "README.md").read_text()


def test_a_control_of_students_of_another_architecture_has_theirs(monkeypatch):
    example, found = load_example("run_cifar"), []
    monkeypatch.setattr(
        example, "main", lambda lineage, training: found.append(example.lineage_spec(lineage, training))
    )
    words = ["--smoke", "--student_model", "test_densenet_cifar", "--student_model_args", "growth_rate=4"]
    example.start([*words, "--control", "seeds"])
    example.start(words)
    control, lineage = found
    assert (control.model, control.model_args) == (lineage.student_model, lineage.student_model_args)
    assert control.student_model is None and lineage.model == "test_wide_resnet_cifar"


def test_a_control_of_language_models(tmp_path):
    run("run_ptb", "--control", "seeds", "--generations", 2, "--output_dir", tmp_path / "out")
    assert [record["parent"] for record in content(tmp_path / "out")["generations"]] == [None, None]
    run("run_ptb", "--control", "equal-compute", "--generations", 1, "--output_dir", tmp_path / "long")
    steps = [content(tmp_path / name)["generations"][0]["steps"] for name in ("out", "long")]
    assert steps[1] == 2 * steps[0] > 0


@pytest.mark.parametrize("script", ["run_cifar", "run_ptb"])
def test_name_and_folder_of_its_own(script, monkeypatch):
    example, found = load_example(script), []
    monkeypatch.setattr(example, "main", lambda lineage, training: found.append((lineage.name, training.output_dir)))
    for words in ((), ("--control", "seeds"), ("--control", "seeds", "--name", "mine")):
        example.start(["--smoke", *words])
    (name, folder), control, named = found
    assert control == (f"{name}-seeds", f"{folder}-seeds") and named == ("mine", "outputs/mine-seeds")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--control", "equal-computer"], "control: got 'equal-computer', .*did you mean 'equal-compute'"),
        (["--control", "seeds", "--generations", "1"], "control: got 'seeds' with 1 generations.*--generations 2 or"),
        (["--control", "seeds", "--teacher", "x"], "control: got 'seeds' beside --teacher x, expected no teacher"),
    ],
)
def test_a_control_that_cannot_be(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run("run_cifar", *words, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "seed"}, "control: got 'seed', expected 'equal-compute' or 'seeds'; did you mean 'seeds'"),
        ({"control": "seeds", "objective": "ban"}, "control: got 'seeds' with teacher None and objective 'ban'"),
        (
            {"control": "equal-compute", "generations": 2},
            "generations: got 2 with control 'equal-compute', expected 0",
        ),
        ({"control": "seeds", "student_model": "x"}, "control: got 'seeds' with student_model 'x'.*expected neither"),
        ({"control_generations": 2}, "control_generations: got 2 without a control"),
    ],
)
def test_a_spec_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        LineageSpec(**{"name": "a", "model": "b", "dataset": "c", "objective": "label", **changes})


def test_a_spec_without_a_control_has_the_hash_that_it_had():
    spec = LineageSpec(name="a-b", model="a", dataset="b", training={"learning_rate": 0.1})
    assert "control" not in spec.to_dict()
    # Computed before there were controls.
    assert spec.sha256() == "b90b8f63650b43bb7dbffcf869bab670a4f887854e93b5fae754889fa796f5bb"
    control = LineageSpec(name="a-b", model="a", dataset="b", objective="label", control="seeds")
    assert control.sha256() != spec.sha256() and LineageSpec.from_dict(control.to_dict()) == control


def test_members_of_an_ordinary_lineage_are_its_students(tmp_path):
    manifest = Manifest.create(tmp_path, LineageSpec(name="a", model="b", dataset="c"), {})
    for index, parent in ((0, None), (1, 0)):
        manifest.update(index, parent=parent)
    assert members_to_choose(manifest) == [1]
