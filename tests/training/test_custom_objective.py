"""A function as objective: the gradients of the built-in ones, the same normalisation, and what is refused."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import Network, arguments, language_model, sentences, token_classifier, vectors

from born_again import BornAgainTrainer
from born_again.objectives import OBJECTIVES
from born_again.training.item_losses import custom_name


def ban(student_logits, teacher_logits, labels):
    losses = -(teacher_logits.softmax(-1) * student_logits.log_softmax(-1)).sum(-1)
    return losses, torch.ones_like(losses)


def ban_with_labels(student_logits, teacher_logits, labels):
    losses, weights = ban(student_logits, teacher_logits, labels)
    return losses + F.nll_loss(student_logits.log_softmax(-1), labels, reduction="none"), weights


def cwtm(student_logits, teacher_logits, labels):
    return F.cross_entropy(student_logits, labels, reduction="none"), teacher_logits.softmax(-1).amax(-1)


def of_the_student(student_logits, teacher_logits, labels):
    """Weights that are known once the student has seen the item, and not before."""
    losses, _ = ban(student_logits, teacher_logits, labels)
    return losses, 1 - student_logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


FUNCTIONS = {"ban": ban, "ban+l": ban_with_labels, "cwtm": cwtm}
TASKS = {
    "vectors": (Network, lambda: vectors(22, ignored=(3, 16, 17, 18, 19, 20, 21))),
    "token": (token_classifier, lambda: sentences("token")),
    "next word": (language_model, lambda: sentences("next")),
}


def trained(folder, function=None, task="vectors", teacher_seed=2, **changes):
    build, data = TASKS[task][0], TASKS[task][1]()
    args = arguments(folder, max_steps=6, logging_steps=1, **changes)
    trainer = BornAgainTrainer(
        build(1), args, train_dataset=data, teacher=build(teacher_seed), objective=function, eval_dataset=data
    )
    trainer.train()
    return trainer


def found_by(trainer):
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return weights, torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


PARTS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["8", "2 x 4"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("objective", FUNCTIONS)
def test_a_built_in_objective_as_a_function_trains_the_same_weights(tmp_path, objective, task, parts):
    ours = trained(tmp_path, FUNCTIONS[objective], task, **parts)
    for found, expected in zip(
        found_by(ours), found_by(trained(tmp_path, task=task, objective=objective, **parts)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert ours.evaluate()["eval_loss"] > 0
    logged = [entry for entry in ours.state.log_history if "kd_loss" in entry]
    assert len(logged) == 6


@pytest.mark.parametrize("task", TASKS)
def test_weights_of_the_student_are_normalised_over_the_whole_step(tmp_path, task):
    whole = found_by(trained(tmp_path, of_the_student, task, max_grad_norm=0.1))
    for size, accumulated in ((4, 2), (1, 8)):
        parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        found = found_by(trained(tmp_path, of_the_student, task, max_grad_norm=0.1, **parts))
        torch.testing.assert_close(found[0], whole[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[1], whole[1], rtol=1e-5, atol=1e-6)


def test_a_step_of_items_without_weight_changes_nothing(tmp_path):
    def none(student_logits, teacher_logits, labels):
        losses, weights = ban(student_logits, teacher_logits, labels)
        return losses, 0 * weights

    before = torch.cat([parameter.detach().flatten() for parameter in Network(1).parameters()])
    for parts in ({}, PARTS):
        weights, losses = found_by(trained(tmp_path, none, weight_decay=0.0, **parts))
        assert torch.equal(weights, before) and torch.equal(losses, torch.zeros(6))


def test_resumed_it_trains_the_same_weights(tmp_path):
    whole = trained(tmp_path, of_the_student, save_strategy="steps", save_steps=3, **PARTS)
    again = BornAgainTrainer(
        Network(1), whole.args, train_dataset=whole.train_dataset, teacher=Network(2), objective=of_the_student
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(found_by(again)[0], found_by(whole)[0])


def test_it_is_given_the_items_that_count_in_float32_or_wider(tmp_path):
    seen = []

    def look(student_logits, teacher_logits, labels):
        seen.append((student_logits.shape, teacher_logits.shape, labels.tolist(), student_logits.dtype))
        assert student_logits.requires_grad and not teacher_logits.requires_grad
        return ban(student_logits, teacher_logits, labels)

    data = vectors(8, ignored=(1, 2))
    args = arguments(tmp_path, max_steps=1, bf16=True)
    BornAgainTrainer(Network(1).float(), args, train_dataset=[{**row, "x": row["x"].float()} for row in data],
                     teacher=Network(2).float(), objective=look).train()  # fmt: skip
    ((shape, teacher_shape, labels, dtype),) = seen
    assert shape == teacher_shape == (6, 4) and dtype == torch.float32
    assert sorted(labels) == sorted(int(row["labels"]) for row in data if row["labels"] != -100)


def test_without_a_teacher_it_is_unused_and_the_loss_implementation_is_the_full_one(tmp_path):
    data = vectors(8)
    trainer = BornAgainTrainer(
        Network(1), arguments(tmp_path, loss_normalization="step"), train_dataset=data, objective=of_the_student
    )
    trainer.train()
    with pytest.raises(ValueError, match="got 'chunked', but the objective is a function of all logits"):
        trained(tmp_path, ban, "next word", loss_implementation="chunked")


def test_names():
    assert custom_name(ban) == f"custom: {ban.__module__}.ban"
    assert custom_name(functools.partial(ban, labels=3)) == f"custom: {ban.__module__}.ban(labels=3)"
    assert custom_name(Network(1)).endswith(".Network")


def returning(change):
    def wrong(student_logits, teacher_logits, labels):
        return change(*ban(student_logits, teacher_logits, labels))

    return wrong


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda losses, weights: losses, TypeError, "wrong returned Tensor, expected per-item losses and weights"),
        (lambda losses, weights: (losses,), TypeError, "wrong returned 1 values, expected per-item losses and weig"),
        (lambda losses, weights: (losses, 1.0), TypeError, "wrong returned weights of type float"),
        (lambda losses, weights: (losses.mean(), weights), ValueError,
         r"wrong returned losses of shape \(\), expected .* of shape \([0-9],\): one for each row"),
        (lambda losses, weights: (losses, weights[:, None]), ValueError, r"returned weights of shape \([0-9], 1\)"),
        (lambda losses, weights: (losses, weights > 0), TypeError, r"weights of dtype torch.bool, .*call .float\(\)"),
        (lambda losses, weights: (losses.detach(), weights), ValueError, "returned losses without a gradient"),
        (lambda losses, weights: (losses, weights.to("meta")), ValueError, "returned weights on meta, expected cpu"),
        (lambda losses, weights: (losses / 0, weights), ValueError, "returned losses with inf in the first batch"),
        (lambda losses, weights: (losses, weights * float("nan")), ValueError, "returned weights with nan"),
        (lambda losses, weights: (losses, -weights), ValueError, "returned weights with -1.0 in the first batch"),
    ],
)  # fmt: skip
def test_what_a_function_may_not_return(tmp_path, change, error, message):
    with pytest.raises(error, match=f"objective: .*{message}"):
        trained(tmp_path, returning(change), teacher_seed=3)


def test_a_loss_that_becomes_nan_later_stops_the_training(tmp_path):
    calls = []

    def late(student_logits, teacher_logits, labels):
        calls.append(1)
        losses, weights = ban(student_logits, teacher_logits, labels)
        return losses * (float("nan") if len(calls) == 3 else 1), weights

    with pytest.raises(FloatingPointError, match="loss: not finite at step 3 of 6"):
        trained(tmp_path, late)


@pytest.mark.parametrize(
    ("objective", "changes", "error", "message"),
    [
        ("ban+l", {}, TypeError, "objective: got 'ban\\+l', expected a function of .*BornAgainTrainingArguments"),
        (lambda z, t: z, {}, TypeError, "objective: custom: .*<lambda> cannot be called with \\(student_logits"),
        (ban, {"objective": "cwtm"}, ValueError, "objective: got 'cwtm' beside a function as objective"),
        (ban, {"temperature": 2.0}, ValueError, "temperature: got 2.0 beside a function as objective"),
        (ban, {"label_smoothing_factor": 0.1}, ValueError, "expected 0: a function as objective is given the labels"),
    ],
)
def test_what_cannot_be_an_objective(tmp_path, objective, changes, error, message):
    assert {*FUNCTIONS} < {*OBJECTIVES}
    with pytest.raises(error, match=message):
        trained(tmp_path, objective, **changes)
