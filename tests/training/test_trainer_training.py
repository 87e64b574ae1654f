"""What a training is besides its loss: resuming, checkpoints, schedule, decay, memory format, evaluation, NaN."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from helpers import Network, arguments, sentences, sequence_classifier, vectors
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from born_again import BornAgainTrainer, create_image_classifier
from born_again.objectives import OBJECTIVES


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def images(rows=24, classes=4):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(rows, 3, 32, 32, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return [{"pixel_values": pixels[row], "labels": labels[row]} for row in range(rows)]


def image_classifier(seed, **model_args):
    torch.manual_seed(seed)
    labels = ["one", "two", "three", "four"]
    return create_image_classifier("test_wide_resnet_cifar", labels, [0.5] * 3, [0.25] * 3, **model_args)


@pytest.mark.slow_but_for("ban+l")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resume_in_the_middle_of_an_epoch_is_bit_equal(tmp_path, objective):
    """With dropout, shuffling, accumulation, momentum, a schedule and fresh permutations."""
    settings = {
        "objective": objective,
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim_args": "momentum=0.9",
        "lr_milestones": [0.5],
    }

    def train(folder, stop=None, checkpoint=None):
        trainer = BornAgainTrainer(
            Network(1, dropout=0.3),
            arguments(folder, **settings),
            train_dataset=vectors(22),
            teacher=Network(2),
            callbacks=[StopAfter(stop)] if stop else None,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model.state_dict()

    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", stop=4)
    resumed = train(tmp_path / "cut", checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_resume_of_an_image_student_in_channels_last_and_bf16_is_bit_equal(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "optim_args": "momentum=0.9"}

    def train(folder, checkpoint=None):
        trainer = BornAgainTrainer(
            image_classifier(1, proj_drop_rate=0.3),
            arguments(folder, bf16=True, channels_last=True, learning_rate=0.05, **settings),
            train_dataset=images(),
            teacher=image_classifier(2),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model.state_dict()

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "cut", checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_two_trainings_from_one_seed_are_equal_and_another_seed_is_not(tmp_path):
    weights = []
    for seed in (7, 7, 8):
        trainer = BornAgainTrainer(
            Network(1, dropout=0.3), arguments(tmp_path, seed=seed), train_dataset=vectors(), teacher=Network(2)
        )
        trainer.train()
        weights.append(trainer.model.out.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_checkpoints_hold_the_student_alone_and_load_by_from_pretrained(tmp_path):
    teacher = sequence_classifier(2)
    trainer = BornAgainTrainer(
        sequence_classifier(1),
        arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=sentences("sequence"),
        teacher=teacher,
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert load_file(checkpoint / "model.safetensors").keys() == trainer.model.state_dict().keys()
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


def test_the_teacher_stays_as_it_was(tmp_path):
    """BatchNorm would show a teacher in train mode: its statistics would move."""
    teacher = image_classifier(2).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = BornAgainTrainer(
        image_classifier(1), arguments(tmp_path, learning_rate=0.05), train_dataset=images(), teacher=teacher
    )
    trainer.train()
    trainer.evaluate(images())
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module is teacher for module in trainer.model.modules())


def test_a_teacher_put_in_train_mode_runs_in_eval_mode(tmp_path):
    teacher = image_classifier(2)
    trainer = BornAgainTrainer(image_classifier(1), arguments(tmp_path), train_dataset=images(), teacher=teacher)
    teacher.train()
    trainer.train()
    assert not teacher.training


def test_the_teacher_computes_in_the_precision_of_the_student(tmp_path):
    teacher, seen = image_classifier(2), []
    teacher.timm_model.head.fc.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    args = arguments(tmp_path, bf16=True, max_steps=1)
    BornAgainTrainer(image_classifier(1), args, train_dataset=images(), teacher=teacher).train()
    assert seen and set(seen) == {torch.bfloat16}


def test_channels_last_reaches_weights_and_inputs_of_both(tmp_path):
    layouts = []

    def look(module, args, kwargs):
        layouts.append(kwargs["pixel_values"].is_contiguous(memory_format=torch.channels_last))

    student, teacher = image_classifier(1), image_classifier(2)
    for model in (student, teacher):
        model.register_forward_pre_hook(look, with_kwargs=True)
    args = arguments(tmp_path, channels_last=True, max_steps=1)
    BornAgainTrainer(student, args, train_dataset=images(), teacher=teacher).train()
    assert layouts and all(layouts)
    for model in (student, teacher):
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)


def test_a_network_of_ones_own_is_saved_in_channels_last_and_resumed_to_the_bit(tmp_path):
    class Plain(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.convolution, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, pixel_values):
            return self.out(self.convolution(pixel_values).mean((2, 3)))

    weights = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        args = arguments(tmp_path, channels_last=True, save_strategy="steps", save_steps=2)
        trainer = BornAgainTrainer(Plain(1), args, train_dataset=images(), teacher=Plain(2))
        trainer.train(resume_from_checkpoint=resume)
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_learning_rate_drops_at_its_milestones(tmp_path):
    args = arguments(
        tmp_path, max_steps=10, lr_milestones=[0.3, 0.6, 0.8], lr_gamma=0.2, learning_rate=0.1, logging_steps=1
    )
    trainer = BornAgainTrainer(Network(1), args, train_dataset=vectors(), teacher=Network(2))
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [0.0008] * 2)


def test_milestones_come_after_warm_up(tmp_path):
    args = arguments(tmp_path, max_steps=8, lr_milestones=[0.75], warmup_steps=4, learning_rate=1.0, logging_steps=1)
    trainer = BornAgainTrainer(Network(1), args, train_dataset=vectors(), teacher=Network(2))
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.2, 0.2])


def test_decay_all_parameters_decays_all_of_them(tmp_path):
    model = image_classifier(1)
    for everything in (False, True):
        args = arguments(tmp_path, weight_decay=0.1, decay_all_parameters=everything)
        trainer = BornAgainTrainer(model, args, train_dataset=images(), teacher=image_classifier(2))
        groups = trainer.create_optimizer().param_groups
        decayed = sum(parameter.numel() for group in groups if group["weight_decay"] for parameter in group["params"])
        total = sum(parameter.numel() for parameter in model.parameters())
        assert (decayed == total) is everything


def test_evaluation_before_training_leaves_no_mark(tmp_path):
    weights, losses = [], []
    for evaluate_first in (False, True):
        student = image_classifier(1)
        args = arguments(tmp_path, bf16=True, learning_rate=0.05)
        trainer = BornAgainTrainer(
            student, args, train_dataset=images(), eval_dataset=images(), teacher=image_classifier(2)
        )
        if evaluate_first:
            trainer.evaluate()
            assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(student))
        trainer.train()
        assert student._is_accelerate_prepared
        losses.append(trainer.evaluate()["eval_loss"])
        weights.append([parameter.detach() for parameter in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert losses[0] == losses[1]


def test_a_teacher_that_underfits_is_warned_of(tmp_path, caplog):
    data, teacher = vectors(20, ignored=(5,)), Network(2)
    right = sum(
        teacher(row["x"])["logits"].argmax().item() == row["labels"].item() for row in data if row["labels"] != -100
    )
    for objective, warns in (("ban", True), ("dkpp", True), ("ban+l", False), ("cwtm", False)):
        caplog.clear()
        trainer = BornAgainTrainer(
            Network(1), arguments(tmp_path, objective=objective), train_dataset=data, teacher=teacher
        )
        with caplog.at_level(logging.WARNING, logger="born_again"):
            trainer.train()
        assert trainer.teacher_train_metrics == ({"accuracy": right / 19, "samples": 20} if warns else None)
        warned = [
            record.getMessage() for record in caplog.records if "sample of the training set" in record.getMessage()
        ]
        assert bool(warned) is warns
        if warns:
            assert f"{right / 19:.1%}" in warned[0] and "'ban+l'" in warned[0]


def test_the_teacher_is_evaluated_on_evenly_spaced_samples(tmp_path):
    teacher = Network(2)
    trainer = BornAgainTrainer(Network(1), arguments(tmp_path), train_dataset=vectors(20), teacher=teacher)
    assert trainer.evaluate_teacher(samples=5)["samples"] == 5
    seen = torch.cat(teacher.calls)
    assert torch.equal(seen, torch.stack([vectors(20)[row]["x"] for row in (0, 4, 8, 12, 16)]))


class Exploding(Network):
    """Its logits are NaN from the third step on."""

    def forward(self, x):
        outputs = super().forward(x)
        return {"logits": outputs["logits"] * (float("nan") if self.training and len(self.calls) > 2 else 1.0)}


@pytest.mark.parametrize("with_teacher", [True, False])
def test_nan_loss_stops_names_its_step_and_spares_the_checkpoint(tmp_path, with_teacher):
    args = arguments(
        tmp_path,
        max_steps=10,
        save_strategy="steps",
        save_steps=2,
        logging_steps=100,
        save_total_limit=1,
        stop_on_nonfinite=None if with_teacher else True,
    )
    student = Exploding(1) if with_teacher else ExplodingLoss(1)
    trainer = BornAgainTrainer(student, args, train_dataset=vectors(), teacher=Network(2) if with_teacher else None)
    with pytest.raises(FloatingPointError, match="loss: not finite at step 3 of 10"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


class ExplodingLoss(Network):
    def forward(self, x, labels=None):
        logits = super().forward(x)["logits"]
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss * float("nan") if len(self.calls) > 2 else loss, "logits": logits}


def test_infinite_gradient_of_a_finite_loss_does_not_reach_a_checkpoint(tmp_path):
    student = Network(1)
    student.out.weight.register_hook(lambda gradient: gradient * float("inf"))
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, logging_steps=100)
    trainer = BornAgainTrainer(student, args, train_dataset=vectors(), teacher=Network(2))
    with pytest.raises(FloatingPointError, match="weights: not finite after step 1 of 3"):
        trainer.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))
