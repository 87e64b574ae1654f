"""What a teacher refuses, before any work is lost."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import Network, arguments, language_model, sequence_classifier, vectors
from torch import nn
from transformers import TrainingArguments

from born_again import BornAgainTrainer, BornAgainTrainingArguments
from born_again.teacher import FrozenTeacher, logits_of
from born_again.training.environment import check_engine, check_launch
from born_again.training.sharding import check_teacher_loading


def build(student, teacher, folder, **changes):
    return BornAgainTrainer(student, arguments(folder, **changes), train_dataset=vectors(), teacher=teacher)


def test_teacher_that_is_the_student(tmp_path):
    student = Network(1)
    with pytest.raises(ValueError, match="teacher: got the student itself, expected another network"):
        build(student, student, tmp_path)


def test_teacher_that_shares_parameters(tmp_path):
    student, teacher = Network(1), Network(2)
    teacher.out.weight = nn.Parameter(student.out.weight.detach())
    with pytest.raises(ValueError, match="teacher: shares parameters with the student"):
        build(student, [Network(3), teacher], tmp_path)


def test_teacher_with_other_classes(tmp_path):
    student, teacher = sequence_classifier(1), sequence_classifier(2)
    teacher.config.id2label = {index: f"LABEL_{index}" for index in range(7)}
    with pytest.raises(ValueError, match="teacher: has 7 labels, the student 4"):
        build(student, teacher, tmp_path)


def test_teacher_with_other_label_names(tmp_path):
    student, teacher = sequence_classifier(1), sequence_classifier(2)
    teacher.config.id2label = {0: "LABEL_0", 1: "cat", 2: "LABEL_2", 3: "LABEL_3"}
    with pytest.raises(ValueError, match="teacher: class 1 is called 'cat', by the student 'LABEL_1'"):
        build(student, teacher, tmp_path)


def test_teacher_with_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="teacher: has 29 tokens, the student 23"):
        build(language_model(1), language_model(2, words=29), tmp_path)


def test_teacher_of_plain_modules_with_other_classes_is_found_at_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: gives logits of shape \(8, 3\) where the student's are \(8, 4\)"):
        trainer = build(Network(1), Network(2, classes=3), tmp_path)
        trainer.train()


def test_teacher_that_is_no_network(tmp_path):
    with pytest.raises(TypeError, match="teacher: got int, expected an nn.Module"):
        build(Network(1), [0], tmp_path)
    with pytest.raises(ValueError, match="teacher: got an empty list"):
        build(Network(1), [], tmp_path)


def test_settings_without_meaning_beside_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor: got 0.1 beside a teacher"):
        build(sequence_classifier(1), sequence_classifier(2), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_names: got .* expected one name"):
        build(Network(1), Network(2), tmp_path, label_names=["start", "end"])
    with pytest.raises(ValueError, match="compute_loss_func: got a function beside a teacher"):
        BornAgainTrainer(Network(1), arguments(tmp_path), teacher=Network(2), compute_loss_func=lambda *a, **k: 0)
    for setting in ({"problem_type": "multi_label_classification"}, {"num_labels": 1}):
        pair = [sequence_classifier(1), sequence_classifier(2)]
        for model in pair:
            for name, value in setting.items():
                setattr(model.config, name, value)
        with pytest.raises(ValueError, match="the student's config means .* expected single-label classification"):
            build(*pair, tmp_path)
    teacher = sequence_classifier(3)
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="the teacher's config means 'multi_label_classification' beside a teacher"):
        build(sequence_classifier(1), [sequence_classifier(2), teacher], tmp_path)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(TypeError, match="args: got TrainingArguments beside a teacher"):
        BornAgainTrainer(Network(1), TrainingArguments(str(tmp_path), use_cpu=True), teacher=Network(2))


def test_several_gpus_in_one_process(tmp_path):
    args = arguments(tmp_path)
    student = Network(1)
    trainer = BornAgainTrainer(student, args)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs are visible to one process.*accelerate launch"):
        trainer._take_teacher(Network(2))


def test_batch_without_labels(tmp_path):
    unlabelled = [{"x": row["x"]} for row in vectors()]
    trainer = BornAgainTrainer(Network(1), arguments(tmp_path), train_dataset=unlabelled, teacher=Network(2))
    with pytest.raises(ValueError, match="labels: a batch has only the keys x, expected 'labels' among them"):
        trainer.train()


def test_labels_that_do_not_fit_the_logits(tmp_path):
    wrong = [{**row, "labels": row["labels"].repeat(2)} for row in vectors()]
    trainer = BornAgainTrainer(Network(1), arguments(tmp_path), train_dataset=wrong, teacher=Network(2))
    with pytest.raises(ValueError, match=r"labels: got shape \(8, 2\) for logits of shape \(8, 4\)"):
        trainer.train()


def test_outputs_without_logits():
    with pytest.raises(ValueError, match="model output: got the keys loss, expected 'logits'"):
        logits_of({"loss": torch.zeros(())})
    with pytest.raises(TypeError, match="model output: got str"):
        logits_of("logits")


def test_teacher_is_not_given_what_it_does_not_know():
    teacher = FrozenTeacher(Network(2))
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(teacher({"x": x, "token_type_ids": None}), teacher({"x": x}))


def test_mean_of_one_teacher_is_that_teacher():
    network, x = Network(2), torch.randn(3, 5, dtype=torch.float64)
    one, three = FrozenTeacher(network)({"x": x}), FrozenTeacher([network, copy.deepcopy(network), network])({"x": x})
    torch.testing.assert_close(one.softmax(-1), three.softmax(-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "bam"}, "objective: got 'bam', expected one of .*; did you mean 'ban'"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a finite number above 0"),
        ({"temperature": float("nan")}, "temperature: got nan, expected a finite number above 0"),
        (
            {"objective": "ban+l", "label_weight": -1.0},
            "label_weight: got -1.0, expected a finite number of 0 or more",
        ),
        ({"label_weight": 2.0}, "label_weight: got 2.0, but objective 'ban' does not read it"),
        ({"objective": "cwtm", "temperature": 2.0}, "temperature: got 2.0, but objective 'cwtm' does not read it"),
        ({"permutation": "fixed"}, "permutation: got 'fixed', but objective 'ban' does not read it"),
        ({"objective": "dkpp", "permutation": "none"}, "permutation: got 'none', expected one of 'fresh', 'fixed'"),
        ({"teacher_cache": "ram"}, "teacher_cache: got 'ram', expected one of 'off', 'memory', 'disk'"),
        ({"lr_gamma": 0.0}, "lr_gamma: got 0.0, expected a finite number above 0"),
        ({"lr_milestones": [0.6, 0.3]}, r"lr_milestones: got \[0.6, 0.3\], expected rising fractions"),
        ({"lr_milestones": [60, 120]}, r"lr_milestones: got \[60, 120\], expected rising fractions"),
        ({"lr_milestones": []}, r"lr_milestones: got \[\], expected rising fractions"),
        (
            {"lr_milestones": [0.5], "lr_scheduler_type": "cosine"},
            "lr_scheduler_type 'cosine'; expected one of the two",
        ),
    ],
)
def test_arguments_out_of_range(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_weight_affecting_arguments_leave_out_what_changes_no_weight(tmp_path):
    first = BornAgainTrainingArguments(str(tmp_path / "a"), use_cpu=True, learning_rate=0.1, logging_steps=3, seed=1)
    second = BornAgainTrainingArguments(str(tmp_path / "b"), use_cpu=True, learning_rate=0.1, save_steps=9, seed=2)
    assert first.weight_affecting() == second.weight_affecting() == {"learning_rate": 0.1}


def test_sequences_train_with_labels_named_otherwise(tmp_path):
    data = [{"x": row["x"], "label": row["labels"]} for row in vectors()]
    for name, rows in (("labels", vectors()), ("label", data)):
        args = arguments(tmp_path, label_names=[name], remove_unused_columns=False)
        trainer = BornAgainTrainer(
            Network(1), args, train_dataset=rows, teacher=Network(2), data_collator=torch.utils.data.default_collate
        )
        trainer.train()
        if name == "labels":
            expected = trainer.model.out.weight.detach()
    assert torch.equal(trainer.model.out.weight, expected)


def test_processes_that_would_train_alone(tmp_path, monkeypatch):
    """As torchrun starts them on a machine without GPUs, when use_cpu is left out; an older accelerate joins them."""
    args = arguments(tmp_path, use_cpu=False)
    check_launch(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="use_cpu: got False where the launcher started 2 processes, and accelerate"):
        check_launch(args)


def test_batches_of_which_a_process_may_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(BornAgainTrainingArguments, "world_size", 2)
    uneven = {"accelerator_config": {"even_batches": False}}
    with pytest.raises(ValueError, match="accelerator_config: got even_batches=False on 2 processes"):
        build(Network(1), Network(2), tmp_path, **uneven)


def test_an_engine_that_accelerate_did_not_take(tmp_path, monkeypatch):
    """Which would train every weight on every process, as use_cpu has it."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="got FSDP, which accelerate did not take: .* run as NO on"):
        build(Network(1), Network(2), tmp_path)


def test_an_engine_or_a_network_that_is_not_known_here(tmp_path, monkeypatch):
    trainer = build(Network(1), Network(2), tmp_path)

    def refused(match, **changes):
        plugin, precision = changes.pop("plugin", None), changes.pop("precision", "no")
        state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=plugin)
        kind = SimpleNamespace(value=changes.pop("kind", "NO"))
        parallel = changes.pop("parallel", None)
        stand_in = SimpleNamespace(
            accelerator=SimpleNamespace(
                state=state,
                distributed_type=kind,
                num_processes=2,
                parallelism_config=parallel,
                mixed_precision=precision,
            ),
            args=trainer.args,
        )
        with pytest.raises(ValueError, match=match):
            check_engine(stand_in, changes.pop("student", SimpleNamespace(**changes)))

    refused("model: the student is spread over 0, 1 by a device_map", hf_device_map={"hidden": 0, "out": 1})
    refused("parallelism_config: got tp_size=2, sp_size=2, which", parallel=SimpleNamespace(tp_size=2, sp_size=2))
    refused("parallelism_config: got tp_size=2, which", _tp_size=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("fsdp_version: got 1, expected 2", kind="FSDP", plugin=SimpleNamespace(fsdp_version=1))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    split, whole = (SimpleNamespace(deepspeed_config={"tensor_parallel": {"autotp_size": size}}) for size in (2, 1))
    refused("parallelism_config: got tp_size=2, which", kind="DEEPSPEED", plugin=split)
    norm = torch.nn.BatchNorm1d(2)
    refused("bf16: got True with DeepSpeed", kind="DEEPSPEED", plugin=whole, precision="bf16", student=norm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_placement": "split"}, "teacher_placement: got 'split', expected one of 'replicated', 'sharded'"),
        ({"teacher_placement": "sharded"}, "teacher_placement: got 'sharded' without FSDP2 or DeepSpeed"),
    ],
)
def test_where_a_teacher_cannot_be_placed(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(Network(1), Network(2), tmp_path, **changes)


def test_a_teacher_that_not_every_process_has_or_calls(tmp_path):
    trainer = build(Network(1), Network(2), tmp_path)
    trainer.is_fsdp_enabled = True
    with torch.device("meta"):
        absent = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="teacher: process 0 has no weights of Linear, which from_pretrained"):
        check_teacher_loading(trainer, absent)
    partitioned = torch.nn.Linear(2, 2)
    partitioned.weight.ds_id = 0
    with pytest.raises(ValueError, match="teacher: Linear was loaded in shards.*load it before them, or inside"):
        check_teacher_loading(trainer, [partitioned])
    trainer.args.teacher_placement, trainer.args.teacher_cache = "sharded", "memory"
    with pytest.raises(ValueError, match="teacher_placement: got 'sharded' with teacher_cache 'memory'"):
        check_teacher_loading(trainer, Network(2))


@pytest.mark.parametrize(("split", "sizes"), [("train", (8, 9)), ("eval", (9, 8))])
def test_split_batches_that_cannot_be_shared_out(tmp_path, monkeypatch, split, sizes):
    monkeypatch.setattr(BornAgainTrainingArguments, "world_size", 3)
    train, evaluation = sizes
    args = arguments(
        tmp_path,
        per_device_train_batch_size=train,
        per_device_eval_batch_size=evaluation,
        accelerator_config={"split_batches": True},
    )
    with pytest.raises(ValueError, match=f"per_device_{split}_batch_size: got 8 with split_batches=True, .* multiple"):
        BornAgainTrainer(Network(1), args, train_dataset=vectors(), eval_dataset=vectors(), teacher=Network(2))
