"""Smoothed labels, and a target that goes from the teacher to the label: twins, micro-batches, resuming, refusals."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Network, arguments, sentences, sequence_classifier, token_classifier, vectors
from torch.utils.data import DataLoader
from transformers import Trainer

from born_again import BornAgainTrainer
from born_again.training import teacher_accuracy

SMOOTHED = {"label_smoothing_factor": 0.2}
CASES = {
    "ban+l": {**SMOOTHED, "label_weight": 0.7},
    "cwtm": SMOOTHED,
    "ban": {"teacher_annealing": True},
}


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def trained(folder, objective, resume=None, data=None, **changes):
    args = arguments(folder, objective=objective, **{"logging_steps": 1, **CASES[objective], **changes})
    rows = vectors(22, ignored=(3, 20)) if data is None else data
    trainer = BornAgainTrainer(Network(1), args, train_dataset=rows, eval_dataset=rows, teacher=Network(2))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("objective", CASES)
def test_weights_after_some_steps_are_those_of_plain_sgd_on_the_twin(tmp_path, objective):
    data, student, teacher = vectors(8, ignored=(2,)), Network(1), Network(2)
    trainer = trained(tmp_path, objective, data=data, lr_scheduler_type="constant")
    batch = next(iter(DataLoader(data, batch_size=8)))
    counted = batch["labels"] != -100
    x, labels = batch["x"][counted], batch["labels"][counted]
    p = teacher(x)["logits"].softmax(-1).detach()
    for step in range(4):
        z = student(x)["logits"]
        soft = -(p * z.log_softmax(-1)).sum(-1)
        hard = F.cross_entropy(z, labels, reduction="none", label_smoothing=0.0 if objective == "ban" else 0.2)
        if objective == "ban":  # (1 - a) x teacher + a x label, a = 0, 1/4, 2/4, 3/4
            target = (1 - step / 4) * p + step / 4 * F.one_hot(labels, z.shape[-1])
            loss = -(target * z.log_softmax(-1)).sum(-1).mean()
        elif objective == "ban+l":
            loss = (soft + 0.7 * hard).mean()
        else:
            loss = (hard * p.amax(-1)).sum() / p.amax(-1).sum()
        assert trainer.state.log_history[step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.5 * parameter.grad
    torch.testing.assert_close(weights_of(trainer), torch.cat([p.detach().flatten() for p in student.parameters()]))


@pytest.mark.parametrize("objective", CASES)
def test_eight_is_two_by_four_accumulated(tmp_path, objective):
    whole = trained(tmp_path / "a", objective)
    parts = trained(tmp_path / "b", objective, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-9, atol=1e-11)


def test_the_share_of_the_label_depends_on_the_step_alone(tmp_path):
    whole = trained(tmp_path / "a", "ban", save_strategy="steps", save_steps=2)
    resumed = trained(tmp_path / "a", "ban", resume=str(tmp_path / "a" / "checkpoint-2"))
    plain = trained(tmp_path / "b", "ban", teacher_annealing=False)
    assert torch.equal(weights_of(resumed), weights_of(whole)) and not torch.equal(
        weights_of(plain), weights_of(whole)
    )


@pytest.mark.parametrize(("build", "labels"), [(sequence_classifier, "sequence"), (token_classifier, "token")])
def test_without_a_teacher_labels_are_smoothed_as_by_trainer(tmp_path, build, labels):
    data, found = sentences(labels)[:16], []
    for kind, changes in ((Trainer, {}), (BornAgainTrainer, {}), (BornAgainTrainer, {"loss_normalization": "step"})):
        args = arguments(tmp_path, label_smoothing_factor=0.2, **changes)
        trainer = kind(build(1), args, train_dataset=data, eval_dataset=data)
        trainer.train()
        found.append((weights_of(trainer), trainer.evaluate()["eval_loss"]))
    (stock, smoothed_loss), (ours, _), (ours_by_step, loss) = found
    assert torch.equal(ours, stock)
    torch.testing.assert_close(ours_by_step, stock, rtol=1e-5, atol=1e-8)  # whose sums are in float32
    assert loss < smoothed_loss  # plain cross-entropy, where Trainer's is smoothed


def test_eval_loss_is_plain_cross_entropy(tmp_path):
    trainer = trained(tmp_path, "ban+l")
    batch = next(iter(DataLoader(trainer.eval_dataset, batch_size=22)))
    expected = F.cross_entropy(trainer.model.eval()(batch["x"])["logits"], batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_step_of_the_chunked_loss_has_the_same_settings(tmp_path):
    trainer = BornAgainTrainer(Network(1), arguments(tmp_path, teacher_annealing=True), teacher=Network(2))
    trainer.state.global_step, trainer.state.max_steps = 3, 4
    assert trainer._loss_settings()["label_share"] == 0.75


@pytest.mark.parametrize("annealing", [False, True])
def test_a_teacher_that_underfits_is_no_cause_for_a_warning_where_labels_take_over(tmp_path, caplog, annealing):
    trained(tmp_path, "ban", teacher_annealing=annealing)
    assert ("The teacher underfits" in caplog.text) != annealing
    assert math.isclose(teacher_accuracy.FITTED_ACCURACY, 0.98)


@pytest.mark.parametrize("objective", ["ban", "dkpp"])
def test_smoothed_labels_without_a_term_that_reads_them_are_refused(tmp_path, objective):
    args = arguments(tmp_path, objective=objective, label_smoothing_factor=0.1)
    with pytest.raises(
        ValueError,
        match=f"label_smoothing_factor: got 0.1 beside a teacher, expected 0: objective '{objective}' has no term "
        "with the labels; take 'ban\\+l' or 'cwtm'",
    ):
        BornAgainTrainer(Network(1), args, train_dataset=vectors(), teacher=copy.deepcopy(Network(2)))


def test_settings_out_of_range(tmp_path):
    args = arguments(tmp_path, objective="ban+l", label_smoothing_factor=1.5)
    with pytest.raises(ValueError, match="label_smoothing_factor: got 1.5 beside a teacher, expected 0 to 1"):
        BornAgainTrainer(Network(1), args, train_dataset=vectors(), teacher=Network(2))
    with pytest.raises(ValueError, match="teacher_annealing: got True, but objective 'ban\\+l' does not read it"):
        arguments(tmp_path, objective="ban+l", teacher_annealing=True)
