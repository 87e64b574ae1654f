"""Without a teacher: Trainer's loss by default, or that of a student, which counts every item of a step once."""

import copy

import pytest
import torch
from helpers import (
    Network,
    arguments,
    language_model,
    llama,
    sentences,
    sequence_classifier,
    token_classifier,
    vectors,
)
from torch.utils.data import DataLoader

from born_again import BornAgainTrainer

TASKS = {
    "vectors": (Network, lambda: vectors(22, ignored=(3, 20))),
    "sequence": (sequence_classifier, lambda: sentences("sequence")),
    "token": (token_classifier, lambda: sentences("token")),
    "next word": (language_model, lambda: sentences("next")),
    "next word of Llama": (llama, lambda: sentences("next")),
}


def trained(folder, build, data, **changes):
    args = arguments(folder, loss_normalization="step", **{"max_steps": 6, "logging_steps": 1, **changes})
    trainer = BornAgainTrainer(build(1), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return weights, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model, batch):
    """Mean cross-entropy over the items of a batch that count."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"})["logits"]
    labels = batch["labels"]
    if hasattr(model, "lm_head"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


@pytest.mark.slow_but_for("token", "next word")
@pytest.mark.parametrize("task", TASKS)
def test_eight_is_two_by_four_accumulated_and_the_slow_twin(tmp_path, task):
    """22 rows: the last step of an epoch is ragged, and so are its micro-batches; tokens are masked unevenly."""
    build, data = TASKS[task][0], TASKS[task][1]()
    weights, losses = trained(tmp_path, build, data)
    for size, accumulated in ((4, 2), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        other, other_losses = trained(tmp_path, build, data, **changes)
        torch.testing.assert_close(other, weights, rtol=1e-9, atol=1e-11)
        assert other_losses == pytest.approx(losses, rel=1e-4)

    first = data[:8]
    model = build(1)
    loss = by_hand(model, next(iter(DataLoader(first, batch_size=8))))
    loss.backward()
    for changes in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        after, (logged,) = trained(tmp_path, build, first, max_steps=1, learning_rate=1.0, **changes)
        assert logged == pytest.approx(loss.item(), rel=1e-4)
        stepped = [p.detach() if p.grad is None else p.detach() - p.grad for p in model.parameters()]
        torch.testing.assert_close(after, torch.cat([p.flatten() for p in stepped]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("task", TASKS)
def test_eval_loss_is_the_same_number_with_and_without_a_teacher(tmp_path, task):
    build, data = TASKS[task][0], TASKS[task][1]()
    found = []
    for teacher in (None, build(2)):
        for batch in (4, 8):
            args = arguments(tmp_path, loss_normalization="step", per_device_eval_batch_size=batch)
            trainer = BornAgainTrainer(build(1), args, eval_dataset=data, teacher=teacher)
            result = trainer.predict(data)
            found.append((trainer.evaluate()["eval_loss"], result.metrics["test_loss"], result.predictions))
    for here, there in ((found[0], found[2]), (found[1], found[3])):
        assert here[:2] == there[:2]
        torch.testing.assert_close(torch.tensor(here[2]), torch.tensor(there[2]), rtol=0, atol=0)


def test_trainers_own_normalisation_multiplies_by_the_accumulation_steps(tmp_path):
    """What "step" is for, and what a training without a teacher still does by default, as Trainer does."""
    data, losses = sentences("sequence", 8), {}
    for how in ("trainer", "step"):
        args = arguments(
            tmp_path,
            max_steps=1,
            logging_steps=1,
            loss_normalization=how,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )
        trainer = BornAgainTrainer(sequence_classifier(1), args, train_dataset=data)
        trainer.train()
        losses[how] = trainer.state.log_history[0]["loss"]
    assert losses["trainer"] == pytest.approx(4 * losses["step"], rel=1e-3)


def test_the_normalisation_can_be_set_before_training(tmp_path):
    data, found = sentences("sequence"), []
    for argument, then in (("step", None), ("trainer", "step"), ("trainer", None), ("step", "trainer")):
        args = arguments(
            tmp_path, loss_normalization=argument, per_device_train_batch_size=4, gradient_accumulation_steps=2
        )
        trainer = BornAgainTrainer(sequence_classifier(1), args, train_dataset=data)
        if then is not None:
            trainer.use_loss_normalization(then)
        trainer.train()
        found.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not found[0].equal(found[2])


def test_a_teacher_always_has_the_loss_of_the_step(tmp_path):
    found = []
    for how in ("trainer", "step"):
        args = arguments(
            tmp_path, loss_normalization=how, per_device_train_batch_size=4, gradient_accumulation_steps=2
        )
        trainer = BornAgainTrainer(Network(1), args, train_dataset=vectors(), teacher=copy.deepcopy(Network(2)))
        trainer.use_loss_normalization(how)
        trainer.train()
        found.append(trainer.model.out.weight.detach())
    assert torch.equal(*found)


def test_what_has_no_such_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_normalization: got 'steps', .*did you mean 'step'"):
        arguments(tmp_path, loss_normalization="steps")
    args = arguments(tmp_path, loss_normalization="step", label_smoothing_factor=1.5)
    with pytest.raises(
        ValueError, match="label_smoothing_factor: got 1.5 with loss_normalization 'step', expected 0 to 1"
    ):
        BornAgainTrainer(sequence_classifier(1), args)
    model = sequence_classifier(1)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(
        ValueError, match="problem_type: .* 'multi_label_classification' with loss_normalization 'step'"
    ):
        BornAgainTrainer(model, arguments(tmp_path, loss_normalization="step"))
    trainer = BornAgainTrainer(sequence_classifier(1), arguments(tmp_path))
    with pytest.raises(ValueError, match="loss_normalization: got 'mean', expected one of 'trainer', 'step'"):
        trainer.use_loss_normalization("mean")


def test_it_is_no_part_of_the_record_of_an_experiment(tmp_path):
    assert "loss_normalization" not in arguments(tmp_path, loss_normalization="step").weight_affecting()
