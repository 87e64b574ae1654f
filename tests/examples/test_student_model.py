"""Students of another architecture than their teacher's, arguments of architectures, and short schedules."""

import json

import pytest
import torch
from example_scripts import load_example
from safetensors.torch import load_file

from born_again import LineageEnsemble, load_generation
from born_again.cli import main as cli
from born_again.hub.launch import apply_budget
from born_again.lineage.arguments import parse_mapping
from born_again.lineage.reevaluation import reevaluate
from born_again.models.image_classifier import check_model_args, create_image_classifier
from born_again.models.shared_ends import share_ends

TINY = ["--smoke", "--max_train_samples", "48", "--max_eval_samples", "16", "--disable_tqdm", "True"]
TINY += ["--per_device_train_batch_size", "16", "--num_train_epochs", "1", "--threads", "1"]


def parsed(*words, script="run_cifar"):
    script = load_example(script)
    types = (script.LineageArguments, script.BornAgainTrainingArguments)
    lineage, training = script.parse_arguments(types, script.recipe, [*map(str, words)])
    return lineage, training, lambda: script.lineage_spec(lineage, training)


def test_a_lineage_whose_students_have_another_architecture(tmp_path, capsys):
    script, folder = load_example("run_cifar"), tmp_path / "out"
    words = [*TINY, "--student_model", "test_densenet_cifar", "--student_model_args", "depth=10,growth_rate=4"]
    assert script.start([*words, "--teacher_cache", "memory", "--generations", "2", "--output_dir", str(folder)]) == 0
    first = "test_wide_resnet_cifar, students test_densenet_cifar (depth=10, growth_rate=4), on digits"
    assert first in capsys.readouterr().out
    names = ["test_wide_resnet_cifar", "test_densenet_cifar", "test_densenet_cifar"]
    for index, name in enumerate(names):
        config = load_generation(folder / f"gen{index}").config
        assert (config.architecture, config.model_args) == (name, {"depth": 10, "growth_rate": 4} if index else {})
        assert name.replace("_", "\\_") in (folder / f"gen{index}" / "README.md").read_text().split("## Use")[0]
        result = reevaluate(folder / f"gen{index}")
        assert (result["model"], result["agrees"]) == (name, True)
    assert cli(["status", str(folder)]) == 0
    assert "test_wide_resnet_cifar on digits, teacher + 2 (test_densenet_cifar) by ban" in capsys.readouterr().out
    records = json.loads((folder / "lineage.json").read_text())["generations"]
    assert records[0]["parameters"] != records[1]["parameters"] == records[2]["parameters"]
    assert len(LineageEnsemble.from_pretrained(folder / "ensemble").members) == 2


@pytest.mark.parametrize(
    ("words", "student"),
    [
        ((), {}),
        (("--student_model", "wide_resnet28_1_cifar"), {}),  # the teacher's
        (("--student_model_args", "width=2"), {"wide_resnet28_1_cifar": {"proj_drop_rate": 0.3, "width": 2}}),
        (("--student_model", "densenet90_60_cifar"), {"densenet90_60_cifar": {}}),
        (("--student_model", "densenet90_60_cifar", "--dropout", "0.2"), {"densenet90_60_cifar": {}}),
        (("--student_model", "wide_resnet28_2_cifar"), {"wide_resnet28_2_cifar": {"proj_drop_rate": 0.3}}),
        (
            ("--student_model", "wide_resnet16_1_cifar", "--dropout", "0.2"),
            {"wide_resnet16_1_cifar": {"proj_drop_rate": 0.2}},
        ),
    ],
)
def test_the_students_architecture_and_its_dropout(words, student):
    spec = parsed("--model", "wide_resnet28_1_cifar", *words)[2]()
    own = {"proj_drop_rate": 0.2 if "--dropout" in words else 0.3}
    assert (spec.model, spec.model_args) == ("wide_resnet28_1_cifar", own)
    assert ({spec.student_model: spec.student_model_args} if spec.student_model else {}) == student


def test_model_args_in_a_file_and_on_the_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: densenet90_60_cifar\nmodel_args: {depth: 172, growth_rate: 30}\n")
    line = parsed("--model_args", "depth=172,growth_rate=30")[2]()
    assert parsed("--config", config)[2]() == line and line.model_args == {"depth": 172, "growth_rate": 30}
    text = parsed("--model_args", "tie_weights=false,hidden_size=8", script="run_ptb")[2]()
    assert text.model_args == {"tie_weights": False, "hidden_size": 8}
    assert parse_mapping("model_args", "depths=[2, 2],width=4") == {"depths": [2, 2], "width": 4}
    assert parse_mapping("model_args", None) == {}
    for wrong in ("depth", "depth=1,", "=3", "a=1=2", "a=[", 3, {3: 4}):
        with pytest.raises(ValueError, match="model_args: got .*, expected NAME=VALUE pairs such as 'depth=172,"):
            parse_mapping("model_args", wrong)
    with pytest.raises(ValueError, match="model_args: got 'a=1,a=2', which gives 'a' twice; give it once"):
        parse_mapping("model_args", "a=1,a=2")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("test_densenet_cifar", {"dept": 12}, "x_args: got 'dept', which test_dens.* not have; did you mean 'depth'?"),
        ("test_densenet_cifar", {"zzz": 1}, "x_args: got 'zzz', which .* does not have; it has compression, depth"),
        ("test_densenet_cifar", {"proj_drop_rate": 0.1}, r"got 'proj_drop_rate' \(it is --dropout\), which test_den"),
        ("test_densenet_cifar", {"depth": 9}, r"x_args=\{'depth': 9\}: test_.* with these: depth=9 leaves a dense"),
        ("test_densenet_cifa", {}, "x='test_densenet_cifa' is not an architecture .* Near it: test_densenet_cifar"),
    ],
)
def test_arguments_that_an_architecture_does_not_have(name, args, message):
    with pytest.raises(ValueError, match=message):
        check_model_args(name, args, "x_args")


def test_a_wrong_student_is_refused_before_anything_is_made(tmp_path):
    script, folder = load_example("run_cifar"), tmp_path / "out"
    for words, message in (
        (["--student_model_args", "dept=12"], "student_model_args: got 'dept', which test_wide_resnet_cifar does not"),
        (["--student_model", "test_densenet_cifar", "--share_teacher_ends"], "share_teacher_ends: the first convolut"),
        (["--budget", "1.5"], "budget: got 1.5, expected a share of the epochs above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            script.start([*TINY, *words, "--output_dir", str(folder)])
        assert not folder.exists()


def classifier(name, labels="ab", **args):
    return create_image_classifier(name, list(labels), [0.5] * 3, [0.5] * 3, **args)


def test_ends_of_another_width_are_refused():
    with pytest.raises(
        ValueError, match="the classifier of test_w.* has weight 2 x 32, .*, that of its teacher .* 3 x"
    ):
        share_ends(classifier("test_wide_resnet_cifar"), classifier("test_wide_resnet_cifar", "abc"))
    with pytest.raises(ValueError, match="the first convolution of test_wide_resnet_cifar has weight 4 x 3 x 3 x 3"):
        share_ends(classifier("test_wide_resnet_cifar", base_width=4), classifier("test_wide_resnet_cifar"))


def test_shared_ends_stay_the_teachers_while_the_rest_trains_and_when_it_is_resumed(tmp_path, monkeypatch):
    words = [*TINY, "--generations", "1", "--share_teacher_ends", "--num_train_epochs", "2"]
    words += ["--model", "test_densenet_cifar", "--student_model", "test_resnet_student_cifar"]
    words += ["--save_strategy", "steps", "--save_steps", "2", "--keep_checkpoints", "True"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script = load_example("run_cifar")
    assert script.start([*words, "--output_dir", str(whole)]) == 0

    class Crash(script.EpochCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and args.output_dir.endswith("gen1"):
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "EpochCallback", Crash)
        script.start([*words, "--output_dir", str(cut)])
    assert script.start([*words, "--output_dir", str(cut)]) == 0
    teacher = load_file(whole / "gen0" / "model.safetensors")
    weights, resumed = (load_file(folder / "gen1" / "model.safetensors") for folder in (whole, cut))
    saved = load_file(whole / "checkpoints" / "gen1" / "checkpoint-4" / "model.safetensors")
    for key, tensor in weights.items():
        assert torch.equal(resumed[key], tensor), key
        is_end = key.startswith(("stem.", "head.fc."))
        assert torch.equal(saved[key], tensor) == is_end, key
        assert not is_end or torch.equal(teacher[key], tensor), key


def test_a_teacher_trained_elsewhere_whose_ends_have_another_width(tmp_path):
    script = load_example("run_cifar")
    assert script.start([*TINY, "--generations", "0", "--output_dir", str(tmp_path / "a")]) == 0
    words = ["--teacher", str(tmp_path / "a" / "gen0"), "--model", "test_densenet_cifar", "--share_teacher_ends"]
    with pytest.raises(
        ValueError, match="share_teacher_ends: the first convolution of test_densenet_cifar has weight"
    ):
        script.start([*TINY, *words, "--output_dir", str(tmp_path / "b")])
    assert not (tmp_path / "b" / "gen0").exists()


def test_a_student_whose_labels_have_other_names_is_refused(tmp_path):
    script = load_example("run_cifar")
    teacher = classifier("test_wide_resnet_cifar", labels="abcdefghij")
    script.save_image_classifier(teacher, tmp_path / "teacher")
    words = ["--teacher", str(tmp_path / "teacher"), "--student_model", "test_densenet_cifar"]
    with pytest.raises(ValueError, match="teacher: .*'a'"):
        script.start([*TINY, *words, "--output_dir", str(tmp_path / "out")])


def test_budget_shortens_the_training_and_keeps_the_shape_of_its_schedule():
    lineage, training, _ = parsed("--budget", "0.05", "--warmup_steps", "40")
    assert lineage.budget == 0.05 and training.output_dir == "outputs/densenet-cifar100-budget0.05"
    apply_budget(lineage, training)
    assert (training.num_train_epochs, training.lr_milestones, training.warmup_steps) == (10.0, [0.3, 0.6, 0.8], 2)
    lineage, training, _ = parsed("--budget", "0.001")
    apply_budget(lineage, training)
    assert training.num_train_epochs == 1.0
    lineage, training, _ = parsed("--budget", "0.5", "--max_steps", "7")
    apply_budget(lineage, training)
    assert training.max_steps == 4
    lineage, training, spec = parsed("--budget", "0.05", "--dataset", "grammar", script="run_ptb")
    apply_budget(lineage, training)
    assert (training.num_train_epochs, training.output_dir) == (1.0, "outputs/lstm-small-grammar-budget0.05")
    assert spec().training["num_train_epochs"] == 1.0
