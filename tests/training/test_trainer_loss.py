"""The loss of a step: equal to a slow twin, whatever the micro-batches, for every objective and task."""

import copy
import math

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
from transformers import Trainer, TrainingArguments

from born_again import BornAgainTrainer
from born_again.objectives import OBJECTIVES, objective_items, objective_items_and_metrics, permute_all_but_argmax

TASKS = {
    "vectors": (Network, lambda: vectors(22, ignored=(3, 20))),
    "sequence": (sequence_classifier, lambda: sentences("sequence")),
    "token": (token_classifier, lambda: sentences("token")),
    "next word": (language_model, lambda: sentences("next")),
}


def gradients_of_first_step(trainer):
    """Runs one epoch of one step at a time and gives the gradient that the first optimizer step saw."""
    seen = {}

    def keep(optimizer, args, kwargs):
        if not seen:
            seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    return seen


def step_loss_by_hand(student, teacher, batch, objective, label_weight=1.0, shuffle=None):
    """The paper's losses over one batch, item by item; `shuffle` permutes a teacher's row for DKPP."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    z, labels = student(**inputs)["logits"], batch["labels"]
    with torch.no_grad():
        t = teacher(**inputs)["logits"]
    if isinstance(student, type(language_model(0))):
        z, t, labels = z[:, :-1], t[:, :-1], labels[:, 1:]
    total, weight = 0.0, 0.0
    rows = zip(z.reshape(-1, z.shape[-1]), t.reshape(-1, t.shape[-1]), labels.reshape(-1), strict=True)
    for student_row, teacher_row, label in rows:
        if label == -100:
            continue
        log_q, p = student_row.log_softmax(-1), teacher_row.softmax(-1)
        if objective == "dkpp":
            p = shuffle(p)
        soft, hard = -(p * log_q).sum(), -log_q[label]
        item = {"ban": soft, "dkpp": soft, "ban+l": soft + label_weight * hard, "cwtm": p.max() * hard}[objective]
        total = total + item
        weight = weight + (p.max() if objective == "cwtm" else 1.0)
    return total / weight


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("task", TASKS)
def test_gradient_of_a_step_equals_the_slow_twin(tmp_path, objective, task):
    build, data = TASKS[task][0], TASKS[task][1]()[:8]
    student, teacher = build(1), build(2).eval()
    args = arguments(tmp_path, objective=objective, max_steps=1, **fixed(objective))
    trainer = BornAgainTrainer(copy.deepcopy(student), args, train_dataset=data, teacher=copy.deepcopy(teacher))
    seen = gradients_of_first_step(trainer)

    batch = next(iter(DataLoader(data, batch_size=8)))
    loss = step_loss_by_hand(student.train(), teacher, batch, objective, shuffle=shuffle_as(args.seed))
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)


def fixed(objective):
    """DKPP's permutation fixed, so that it is the same whatever draws it."""
    return {"permutation": "fixed"} if objective == "dkpp" else {}


def shuffle_as(seed):
    def shuffle(row):
        return permute_all_but_argmax(row.unsqueeze(0), "fixed", torch.Generator().manual_seed(seed)).squeeze(0)

    return shuffle


@pytest.mark.slow_but_for(
    "vectors-ban", "vectors-ban+l", "vectors-cwtm", "vectors-dkpp", "token-cwtm", "next word-ban+l"
)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("task", TASKS)
def test_eight_is_two_by_four_accumulated(tmp_path, objective, task):
    """22 rows: the last step of an epoch is ragged, and so are its micro-batches; tokens are masked unevenly."""
    build, data = TASKS[task][0], TASKS[task][1]()
    weights, losses = [], []
    for size, accumulated in ((8, 1), (4, 2), (2, 4)):
        args = arguments(
            tmp_path,
            objective=objective,
            max_steps=6,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            logging_steps=1,
        )
        trainer = BornAgainTrainer(build(1), args, train_dataset=data, teacher=build(2))
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6
    for other, other_losses in zip(weights[1:], losses[1:], strict=True):
        torch.testing.assert_close(other, weights[0], rtol=1e-9, atol=1e-11)
        assert other_losses == pytest.approx(losses[0], rel=1e-5)


def test_label_weight_and_temperature_reach_the_loss(tmp_path):
    data = vectors(8)
    batch = next(iter(DataLoader(data, batch_size=8)))
    student, teacher = Network(1), Network(2)
    args = arguments(tmp_path, objective="ban+l", label_weight=0.25, temperature=3.0, max_steps=1)
    trainer = BornAgainTrainer(copy.deepcopy(student), args, train_dataset=data, teacher=copy.deepcopy(teacher))
    seen = gradients_of_first_step(trainer)
    z, t = student(batch["x"])["logits"], teacher(batch["x"])["logits"].detach()
    soft = -((t / 3).softmax(-1) * (z / 3).log_softmax(-1)).sum(-1).mean() * 9
    hard = torch.nn.functional.cross_entropy(z, batch["labels"])
    (soft + 0.25 * hard).backward()
    torch.testing.assert_close(seen["out.weight"], student.out.weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("returns", ["dict", "tuple", "tensor"])
def test_networks_may_return_a_dict_a_tuple_or_a_tensor(tmp_path, returns):
    data, results = vectors(16), []
    for kind in (returns, "dict"):
        trainer = BornAgainTrainer(
            Network(1, kind), arguments(tmp_path), train_dataset=data, eval_dataset=data, teacher=Network(2, kind)
        )
        trainer.train()
        predicted = trainer.predict(data)
        logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        results.append((trainer.model.out.weight.detach(), trainer.evaluate()["eval_loss"], torch.tensor(logits)))
    (weight, loss, logits), (other_weight, other_loss, other_logits) = results
    assert torch.equal(weight, other_weight) and loss == other_loss and torch.equal(logits, other_logits)


def test_both_networks_see_the_same_tensors_once_each(tmp_path):
    for objective in OBJECTIVES:
        student, teacher = Network(1), Network(2)
        args = arguments(
            tmp_path, objective=objective, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
        )
        trainer = BornAgainTrainer(student, args, train_dataset=vectors(16), teacher=teacher)
        trainer.evaluate_teacher = lambda: None
        trainer.train()
        assert len(student.calls) == len(teacher.calls) == 4
        assert all(torch.equal(a, b) for a, b in zip(student.calls, teacher.calls, strict=True))


def test_labels_are_handed_to_the_student_once_and_in_no_step(tmp_path):
    student = sequence_classifier(1)
    given = []
    student.register_forward_pre_hook(lambda module, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    trainer = BornAgainTrainer(
        student,
        arguments(tmp_path, objective="ban+l"),
        train_dataset=sentences("sequence"),
        teacher=sequence_classifier(2),
    )
    trainer.train()
    trainer.evaluate(sentences("sequence"))
    assert given[1] == {"input_ids", "attention_mask", "labels"}  # to find out what it does with them
    assert len(given) > 4 and all(names == {"input_ids", "attention_mask"} for names in given[:1] + given[2:])


def test_several_teachers_teach_as_their_mean_probability(tmp_path):
    data = vectors(8)
    batch = next(iter(DataLoader(data, batch_size=8)))
    student, teachers = Network(1), [Network(2), Network(3), Network(4)]
    trainer = BornAgainTrainer(
        copy.deepcopy(student), arguments(tmp_path, max_steps=1), train_dataset=data, teacher=copy.deepcopy(teachers)
    )
    seen = gradients_of_first_step(trainer)
    p = torch.stack([teacher(batch["x"])["logits"].softmax(-1) for teacher in teachers]).mean(0).detach()
    (-(p * student(batch["x"])["logits"].log_softmax(-1)).sum(-1).mean()).backward()
    torch.testing.assert_close(seen["hidden.weight"], student.hidden.weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_without_a_teacher_it_is_trainer_to_the_bit(tmp_path, accumulated):
    data, weights, logs = sentences("sequence"), [], []
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulated,
        "max_steps": 5,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    for kind, args in (
        (Trainer, TrainingArguments(str(tmp_path), **settings)),
        (BornAgainTrainer, TrainingArguments(str(tmp_path), **settings)),
        (
            BornAgainTrainer,
            arguments(tmp_path, **settings, optim="adamw_torch_fused", learning_rate=5e-5, max_grad_norm=1.0, seed=42),
        ),
    ):
        trainer = kind(sequence_classifier(1), args, train_dataset=data, eval_dataset=data)
        trainer.train()
        trainer.evaluate()
        weights.append([p.detach() for p in trainer.model.parameters()])
        timeless = ("runtime", "per_second")
        logs.append(
            [{k: v for k, v in entry.items() if not k.endswith(timeless)} for entry in trainer.state.log_history]
        )
    for other, log in zip(weights[1:], logs[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))
        assert log == logs[0]


@pytest.mark.parametrize(
    ("build", "labels"), [(sequence_classifier, "sequence"), (token_classifier, "token"), (llama, "next")]
)
def test_evaluate_and_predict_report_plain_cross_entropy_as_trainer_does(tmp_path, build, labels):
    data = sentences(labels)
    # In one batch, since Trainer's is a mean over batches.
    plain = Trainer(build(1), arguments(tmp_path, per_device_eval_batch_size=len(data)), eval_dataset=data)
    expected, predicted = plain.evaluate()["eval_loss"], plain.predict(data)
    for objective in OBJECTIVES:
        trainer = BornAgainTrainer(
            build(1), arguments(tmp_path, objective=objective), eval_dataset=data, train_dataset=data, teacher=build(2)
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
        result = trainer.predict(data)
        assert result.metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(torch.tensor(result.predictions), torch.tensor(predicted.predictions))
        assert (result.label_ids == predicted.label_ids).all()


def test_labels_of_gpt2_are_shifted_though_trainer_counts_them_unshifted(tmp_path):
    data = sentences("next")[:8]
    model = language_model(1)
    trainer = BornAgainTrainer(model, arguments(tmp_path), eval_dataset=data, teacher=language_model(2))
    batch = next(iter(DataLoader(data, batch_size=8)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_a_step_of_ignored_items_changes_nothing(tmp_path):
    data = vectors(8, ignored=tuple(range(8)))
    for objective in OBJECTIVES:
        student = Network(1)
        before = copy.deepcopy(student.state_dict())
        trainer = BornAgainTrainer(
            student, arguments(tmp_path, objective=objective), train_dataset=data, teacher=Network(2)
        )
        trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_every_eighth_step_is_watched_and_the_one_that_is_logged(tmp_path, monkeypatch):
    seen = []
    watch = BornAgainTrainer._add_metrics
    monkeypatch.setattr(
        BornAgainTrainer, "_add_metrics", lambda self, terms: seen.append(self.state.global_step) or watch(self, terms)
    )
    args = arguments(tmp_path, max_steps=20, logging_steps=10, per_device_train_batch_size=2, num_train_epochs=9)
    trainer = BornAgainTrainer(Network(1), args, train_dataset=vectors(8), teacher=Network(2))
    trainer.train()
    assert seen == [0, 8, 9, 16, 19]
    assert sum("kd_loss" in entry for entry in trainer.state.log_history) == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_watching_changes_no_bit_of_loss_and_gradient(objective):
    student, teacher = torch.randn(50, 1000), 2 * torch.randn(50, 1000)
    labels = torch.randint(0, 1000, (50,)).where(torch.arange(50) % 7 != 0, -100)
    found = []
    for items in (objective_items, objective_items_and_metrics):
        logits = student.clone().requires_grad_()
        losses, weights = items(objective, logits, teacher, labels, generator=torch.Generator().manual_seed(1))[:2]
        (losses * weights).sum().backward()
        found.append((losses.detach(), logits.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_logged_terms_are_means_over_the_items_since_the_last_log(tmp_path):
    data = vectors(8, ignored=(2,))
    student, teacher = Network(1), Network(2)
    batch = next(iter(DataLoader(data, batch_size=8)))
    args = arguments(tmp_path, max_steps=2, logging_steps=2, learning_rate=0.0, per_device_train_batch_size=2,
                     gradient_accumulation_steps=4)  # fmt: skip
    trainer = BornAgainTrainer(student, args, train_dataset=data, teacher=teacher)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    counted = batch["labels"] != -100
    z, t, y = (
        value[counted] for value in (student(batch["x"])["logits"], teacher(batch["x"])["logits"], batch["labels"])
    )
    q, p = z.softmax(-1), t.softmax(-1)
    on_target = torch.nn.functional.one_hot(y, z.shape[-1]).bool()
    expected = {
        "ce_loss": -q.log()[on_target].mean(),
        "kd_loss": (p * (p / q).log()).sum(-1).mean(),
        "teacher_agreement": (z.argmax(-1) == t.argmax(-1)).double().mean(),
        "teacher_entropy": -(p * p.log()).sum(-1).mean(),
        "importance_weight_norm": (q - p)[on_target].abs().mean(),
        "dark_knowledge_norm": (q - p).masked_fill(on_target, 0).norm(dim=-1).mean(),
    }
    for name, value in expected.items():
        assert math.isclose(logged[name], value.item(), rel_tol=1e-9), name
    assert logged["loss"] == pytest.approx(logged["kd_loss"] + logged["teacher_entropy"], rel=1e-6)
