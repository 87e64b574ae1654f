"""Where a stock training survives and measures right, BornAgainTrainer does: loaders, losses of evaluation, labels."""

import inspect
import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, Network, arguments, language_model, llama, sentences, token_classifier, vectors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.metrics import classification_metrics
from born_again.training import step_loss


class LabelledNetwork(Network):
    """With a loss of its own, as stock Trainer needs."""

    def forward(self, x, labels=None):
        outputs = super().forward(x)
        return outputs if labels is None else {"loss": F.cross_entropy(outputs["logits"], labels), **outputs}


# ---- The loader that measures the teacher is no one else's ----


@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
def test_evaluations_after_the_teacher_was_measured_read_the_evaluation_set(tmp_path, kind):
    """transformers keeps the loader of get_eval_dataloader where workers are persistent."""
    data = sentences("next", 22)
    args = arguments(
        tmp_path,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        teacher_accuracy_samples=22,
        per_device_eval_batch_size=4,
    )
    trainer = kind(language_model(1), args, train_dataset=data, eval_dataset=data[:5], teacher=language_model(2))
    trainer.train()
    assert trainer.teacher_train_metrics is not None
    assert len(trainer.get_eval_dataloader().dataset) == 5
    row_losses, items = 0.0, 0
    for row in data[:5]:
        logits = trainer.model.eval()(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None])
        targets = row["labels"][1:]
        row_losses += F.cross_entropy(logits.logits[0, :-1], targets, reduction="sum", ignore_index=-100).item()
        items += int((targets != -100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(row_losses / items, rel=1e-10)


def test_persistent_workers_read_the_dataset_that_is_asked_for(tmp_path):
    """Trainer keeps one loader under "eval", and gives it for any dataset that is handed to evaluate()."""
    found = []
    for settings in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        args = arguments(tmp_path, **settings)
        trainer = BornAgainTrainer(LabelledNetwork(1), args, eval_dataset=vectors(13))
        results = [trainer.evaluate(data) for data in (None, vectors(20), None, {"eval": vectors(5), "b": vectors(9)})]
        kept = trainer.get_eval_dataloader()
        assert (trainer.get_eval_dataloader() is kept) == bool(settings)
        trainer.eval_dataset = {"eval": vectors(6), "b": vectors(7)}
        results.append(trainer.evaluate())
        found.append([{name: value for name, value in row.items() if name.endswith("loss")} for row in results])
    assert found[0] == found[1]


class Drawing(Dataset):
    """Rows that depend on every generator that a data pipeline draws from."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.rand()
        row = vectors(24)[index]
        return {**row, "x": row["x"] + noise}


@pytest.mark.parametrize("workers", [0, 1])
def test_measuring_the_teacher_draws_no_number_of_the_training(tmp_path, workers):
    weights = []
    for samples in (0, 20):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        args = arguments(tmp_path, teacher_accuracy_samples=samples, dataloader_num_workers=workers)
        trainer = BornAgainTrainer(Network(1, dropout=0.3), args, train_dataset=Drawing(), teacher=Network(2))
        trainer.train()
        assert (trainer.teacher_train_metrics is not None) == (samples > 0)
        weights.append(trainer.model.out.weight.detach())
    assert torch.equal(*weights)


class Stream(IterableDataset):
    """Rows that can be read once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


class StreamOfKnownLength(Stream):
    def __len__(self):
        return 16


@pytest.mark.parametrize("stream", [Stream, StreamOfKnownLength])
@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
def test_a_stream_is_left_to_the_training(tmp_path, kind, stream):
    args = arguments(tmp_path, max_steps=2)
    data = stream(sentences("next", 16))
    trainer = kind(language_model(1), args, train_dataset=data, teacher=language_model(2))
    trainer.in_lineage = True
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.teacher_train_metrics is None


class Epochs(Dataset):
    """Rows that are others in every epoch, which is where the loader says that it is."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 24

    def __getitem__(self, index):
        row = vectors(24)[index]
        return {**row, "x": row["x"] + self.epoch}


@pytest.mark.parametrize("kind", [Trainer, BornAgainTrainer])
def test_an_evaluation_of_the_training_set_does_not_move_its_epoch(tmp_path, kind):
    weights = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        data = Epochs()
        args = arguments(tmp_path, max_steps=9, **changes)
        trainer = kind(LabelledNetwork(1), args, train_dataset=data, eval_dataset={"train": data})
        trainer.train()
        weights.append(trainer.model.out.weight.detach())
    assert torch.equal(*weights) == (kind is BornAgainTrainer)


class Breaking(list):
    """A dataset that fails at its last row, once."""

    def __getitem__(self, index):
        if index == len(self) - 1 and not vars(self).get("failed"):
            self.failed = True
            raise OSError("unreadable")
        return super().__getitem__(index)


def test_metrics_of_an_evaluation_that_broke_off_are_forgotten(tmp_path):
    data = vectors(20)
    args = arguments(tmp_path, batch_eval_metrics=True)
    found = []
    for rows in (data, Breaking(data)):
        trainer = BornAgainTrainer(
            LabelledNetwork(1), args, eval_dataset=rows, compute_metrics=classification_metrics()
        )
        if isinstance(rows, Breaking):
            with pytest.raises(OSError, match="unreadable"):
                trainer.evaluate()
        found.append(trainer.evaluate())
    for name in ("eval_accuracy", "eval_nll", "eval_ece", "eval_loss"):
        assert found[0][name] == found[1][name]


@pytest.mark.parametrize("rows", [3, 19])
def test_no_row_is_dropped_where_the_teacher_is_measured(tmp_path, rows):
    data, teacher = vectors(rows), Network(2)
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=8)
    trainer = BornAgainTrainer(Network(1), args, train_dataset=data, teacher=teacher)
    right = sum(int(teacher(row["x"])["logits"].argmax() == row["labels"]) for row in data)
    assert trainer.evaluate_teacher() == {"accuracy": right / rows, "samples": rows}
    assert args.dataloader_drop_last


def test_measuring_the_teacher_changes_no_weight(tmp_path):
    found = []
    for samples in (0, 24):
        student = Network(1, dropout=0.3)
        args = arguments(tmp_path, teacher_accuracy_samples=samples)
        trainer = BornAgainTrainer(student, args, train_dataset=vectors(), teacher=Network(2))
        trainer.train()
        assert (trainer.teacher_train_metrics is None) == (samples == 0)
        found.append(student.out.weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize(("objective", "measured"), [("ban", True), ("dkpp", True), ("ban+l", False), ("cwtm", False)])
def test_the_teacher_is_measured_where_a_warning_can_come_of_it(tmp_path, objective, measured):
    trainer = BornAgainTrainer(
        Network(1), arguments(tmp_path, objective=objective), train_dataset=vectors(), teacher=Network(2)
    )
    trainer.train()
    assert (trainer.teacher_train_metrics is not None) == measured


def test_a_number_of_samples_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_accuracy_samples: got -1, expected 0 "):
        arguments(tmp_path, teacher_accuracy_samples=-1)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves(output) if isinstance(part, torch.Tensor)]
        self.numel = max(self.numel, *(part.numel() for part in tensors)) if tensors else self.numel
        return output


@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
def test_all_logits_of_a_large_vocabulary_are_never_there_at_once(tmp_path, monkeypatch, kind):
    words, rows, length = 3_000, 8, 10
    data = sentences("next", rows)

    def measured(limit):
        monkeypatch.setattr(step_loss, "CHUNKED_FROM", limit)
        trainer = kind(
            language_model(1, words), arguments(tmp_path), train_dataset=data, teacher=language_model(2, words)
        )
        with LargestTensor() as largest:
            return trainer.evaluate_teacher(), largest.numel

    full, size = measured(2**26)
    assert size >= rows * length * words
    chunked, size = measured(16 * 5 * words)
    assert size <= words * 16  # the output layer itself
    assert chunked == pytest.approx(full, rel=1e-12)


# ---- Losses of evaluation ----


@pytest.mark.parametrize("batch", [8, 4, 3])
def test_eval_loss_is_the_mean_over_items_whatever_the_batches(tmp_path, batch):
    """A batch whose labels are all -100 has no loss of 0, but none."""
    data = vectors(19, ignored=(8, 9, 10, 11, 12, 13, 14, 15, 3))
    student = Network(1)
    trainer = BornAgainTrainer(
        student,
        arguments(tmp_path, per_device_eval_batch_size=batch),
        train_dataset=data,
        eval_dataset=data,
        teacher=Network(2),
    )
    kept = [row for row in data if row["labels"] != -100]
    right = F.cross_entropy(
        student(torch.stack([row["x"] for row in kept]))["logits"], torch.stack([row["labels"] for row in kept])
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(right.item(), rel=1e-12)
    assert trainer.predict(data).metrics["test_loss"] == pytest.approx(right.item(), rel=1e-12)
    assert trainer.evaluate({"a": data, "b": data})["eval_b_loss"] == pytest.approx(right.item(), rel=1e-12)


def test_eval_loss_of_tokens_is_their_mean_and_no_mean_of_batches(tmp_path):
    data, student = sentences("token"), token_classifier(1)
    losses = []
    for batch in (8, 3):
        trainer = BornAgainTrainer(
            student,
            arguments(tmp_path, per_device_eval_batch_size=batch),
            train_dataset=data,
            eval_dataset=data,
            teacher=token_classifier(2),
        )
        losses.append(trainer.evaluate()["eval_loss"])
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labels = batch.pop("labels")
    logits = student.eval()(**batch).logits
    assert losses[0] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-12)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
def test_dataloader_drop_last_drops_nothing_of_an_evaluation(tmp_path, kind):
    found = []
    for drops in (False, True):
        args = arguments(tmp_path, dataloader_drop_last=drops)
        trainer = kind(language_model(1), args, eval_dataset=sentences("next", 11), teacher=language_model(2))
        predicted = trainer.predict(sentences("next", 3))
        assert len(predicted.predictions) == 3 and args.dataloader_drop_last == drops
        found.append((trainer.evaluate()["eval_loss"], predicted.metrics["test_loss"]))
    assert found[0] == found[1]


def test_an_evaluation_set_without_any_label_has_no_loss(tmp_path):
    data = vectors(6, ignored=range(6))
    trainer = BornAgainTrainer(
        Network(1), arguments(tmp_path), train_dataset=vectors(), eval_dataset=data, teacher=Network(2)
    )
    loss = trainer.evaluate()["eval_loss"]
    assert loss != loss


@pytest.mark.parametrize("teaches", [True, False])
def test_weights_do_not_depend_on_when_they_are_evaluated(tmp_path, teaches):
    found = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        student = Network(1, dropout=0.5)
        trainer = BornAgainTrainer(
            student,
            arguments(tmp_path, loss_normalization="step", **changes),
            train_dataset=vectors(),
            eval_dataset=vectors(8),
            teacher=Network(2) if teaches else None,
        )
        trainer.train()
        found.append(student.out.weight.detach())
    assert torch.equal(*found)


# ---- Labels ----


def test_labels_of_an_evaluation_are_named_by_their_column(tmp_path):
    data = [{"x": row["x"], "target": row["labels"] + 2} for row in vectors()]
    args = arguments(tmp_path, label_names=["target"])
    trainer = BornAgainTrainer(Network(1), args, eval_dataset=data, teacher=Network(2))
    for ask in (trainer.evaluate, lambda: trainer.predict(data)):
        with pytest.raises(ValueError, match="target: got [45] in a batch, expected class numbers 0 to 3"):
            ask()


@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
def test_a_batch_without_labels_is_named(tmp_path, kind):
    data = [{name: value for name, value in row.items() if name != "labels"} for row in sentences("next")]
    args = arguments(tmp_path, loss_normalization="step")
    with pytest.raises(ValueError, match="only the keys input_ids, .* expected 'labels' .* items count. Name"):
        kind(language_model(1), args, train_dataset=data).train()


def relabelled(make, rows: int = 24):
    return [{"x": row["x"], "labels": make(row["labels"])} for row in vectors(rows)]


@pytest.mark.slow_but_for("-1-ban-True", "4-ban+l-True", "255-cwtm-True", "4-ban-False", "-100000-dkpp-True")
@pytest.mark.parametrize("teaches", [True, False])
@pytest.mark.parametrize("objective", ["ban", "ban+l", "cwtm", "dkpp"])
@pytest.mark.parametrize("wrong", [-1, CLASSES, -100_000, 255])
def test_labels_that_are_no_classes_are_named(tmp_path, teaches, objective, wrong):
    data = vectors()
    data[5]["labels"] = torch.tensor(wrong)
    args = arguments(tmp_path, objective=objective, loss_normalization="step", num_train_epochs=1, max_steps=-1)
    trainer = BornAgainTrainer(
        Network(1), args, train_dataset=data, eval_dataset=data, teacher=Network(2) if teaches else None
    )
    expected = f"labels: got {wrong} in a batch, expected class numbers 0 to {CLASSES - 1}, or -100 for items"
    with pytest.raises(ValueError, match=expected):
        trainer.train()
    with pytest.raises(ValueError, match=expected):
        trainer.evaluate()


def test_labels_on_a_device_are_looked_at_where_the_loss_is_read(tmp_path, monkeypatch):
    """There a kernel must not meet them, which would end the process, and nothing may wait at every step."""
    from born_again.training.checks import LabelRange

    seen = []
    check = LabelRange.check
    monkeypatch.setattr(LabelRange, "see", _see_without_looking)
    monkeypatch.setattr(
        "born_again.objectives.fused.some_class", lambda labels, _, classes: labels.clamp(0, classes - 1)
    )
    monkeypatch.setattr(LabelRange, "check", lambda self: (seen.append(1), check(self)))
    monkeypatch.setattr(BornAgainTrainer, "_range_on_host", lambda self, labels: None)
    data = vectors()
    data[5]["labels"] = torch.tensor(77)
    args = arguments(tmp_path, logging_steps=3, max_steps=4, objective="ban+l")
    trainer = BornAgainTrainer(Network(1), args, train_dataset=data, teacher=Network(2))
    with pytest.raises(ValueError, match="labels: got 77 in a batch"):
        trainer.train()
    assert trainer.state.global_step == 3 and len(seen) == 1


def _see_without_looking(self, targets, classes):
    low, high = torch.aminmax(targets.where(targets != -100, 0))
    found = torch.stack([-low, high - (classes - 1)])
    self.unread = found if self.unread is None else self.unread.maximum(found)
    self._classes = classes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_any_integer_dtype_are_class_numbers(tmp_path, dtype):
    weights = []
    for data in (vectors(), relabelled(lambda label: label.to(dtype))):
        student = Network(1)
        BornAgainTrainer(
            student, arguments(tmp_path, objective="ban+l"), train_dataset=data, teacher=Network(2)
        ).train()
        weights.append(student.out.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "make",
    [lambda label: label.double(), lambda label: F.one_hot(label, CLASSES).float() * 0.9 + 0.025],
    ids=["float", "mixup"],
)
def test_labels_that_are_floats_are_refused(tmp_path, make):
    trainer = BornAgainTrainer(Network(1), arguments(tmp_path), train_dataset=relabelled(make), teacher=Network(2))
    with pytest.raises(
        ValueError, match="labels: got torch.float.* expected class numbers of an integer dtype.*mixup"
    ):
        trainer.train()


# ---- What stops a training ----


class Divergent(LabelledNetwork):
    """Its loss is NaN in one step only, without a gradient."""

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        if self.training and len(self.calls) == 2:
            outputs["loss"] = outputs["loss"].detach() * float("nan") + 0 * outputs["loss"]
            outputs["loss"] = torch.nan_to_num(outputs["loss"] - outputs["loss"].detach()) + float("nan")
        return outputs


@pytest.mark.parametrize("hides", [True, False])
def test_without_a_teacher_a_loss_that_is_not_finite_ends_nothing_unless_asked(tmp_path, hides):
    def trained(kind, **changes):
        args = arguments(tmp_path, logging_nan_inf_filter=hides, logging_steps=1, **changes)
        student = Divergent(1)
        trainer = kind(student, args, train_dataset=vectors())
        trainer.train()
        return student.out.weight.detach(), trainer.state.log_history

    theirs, their_log = trained(Trainer)
    ours, our_log = trained(BornAgainTrainer)
    assert torch.equal(theirs.nan_to_num(), ours.nan_to_num())
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (their_log, our_log)]
    assert torch.equal(*(torch.tensor(each).nan_to_num(-1) for each in losses))
    with pytest.raises(FloatingPointError, match="loss: not finite at step 2 of 4"):
        trained(BornAgainTrainer, stop_on_nonfinite=True)


def test_a_teacher_can_go_on_where_it_is_asked_to(tmp_path):
    student = Network(1)
    student.out.weight.register_hook(lambda gradient: gradient * float("inf"))
    args = arguments(tmp_path, stop_on_nonfinite=False, save_strategy="steps", save_steps=2)
    BornAgainTrainer(student, args, train_dataset=vectors(), teacher=Network(2)).train()
    assert (tmp_path / "checkpoint-4").is_dir()


def test_weights_are_looked_at_also_where_no_checkpoint_is_written(tmp_path):
    student = Network(1)
    student.out.weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer = BornAgainTrainer(student, arguments(tmp_path, max_steps=1), train_dataset=vectors(), teacher=Network(2))
    with pytest.raises(FloatingPointError, match="weights: not finite after step 1 of 1"):
        trainer.train()


class Masked(Network):
    """Holds an infinity on purpose."""

    def __init__(self, seed):
        super().__init__(seed)
        mask = torch.zeros(CLASSES, dtype=torch.float64)
        self.mask = nn.Parameter(mask.index_fill(0, torch.tensor([3]), -float("inf")), requires_grad=False)
        self.elsewhere = nn.Parameter(torch.ones(2, device="meta"), requires_grad=True)


def test_frozen_weights_and_those_that_are_elsewhere_are_not_looked_at(tmp_path):
    from born_again.training.checks import DivergenceGuard

    student = Masked(1)
    DivergenceGuard().check_weights(student, 1, 1)
    student.out.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="weights: not finite after step 3 of 9"):
        DivergenceGuard().check_weights(student, 3, 9)


# ---- Attempts, rebuilt students, other models ----


class OutOfMemoryAt(Network):
    """Fails as a device does whose memory is full, for more rows than fit; not in its first step."""

    def forward(self, x):
        if self.training and len(x) > 8 and len(self.calls) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


@pytest.mark.slow
def test_logged_metrics_of_an_attempt_that_was_given_up_are_forgotten(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(BornAgainTrainer, "_add_metrics", _recording_items(logged, BornAgainTrainer._add_metrics))
    args = arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, logging_steps=1, max_steps=1)
    trainer = BornAgainTrainer(OutOfMemoryAt(1), args, train_dataset=vectors(), teacher=Network(2))
    trainer.model.calls.append(None)  # the labels' probe is no step

    class FailOnce(TrainerCallback):
        failed = False

        def on_substep_end(self, *_, **__):
            pass

        def on_pre_optimizer_step(self, args, state, control, **_):
            if not FailOnce.failed:
                FailOnce.failed = True
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    trainer.model.calls.clear()
    trainer.add_callback(FailOnce())
    trainer.train()
    assert FailOnce.failed and trainer._train_batch_size < 16
    assert trainer.last_items == trainer._train_batch_size


def _recording_items(logged, add_metrics):
    def recording(self, metrics):
        add_metrics(self, metrics)
        self.last_items = int(self._metric_sums["items"])

    return recording


class Convolutional(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4, CLASSES)
        self.seen = []

    def forward(self, pixel_values):
        self.seen.append(pixel_values.is_contiguous(memory_format=torch.channels_last))
        return {"logits": self.out(self.convolution(pixel_values).mean((2, 3)))}


def images(rows: int = 16):
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 6, 6, generator=generator), "labels": torch.tensor(row % CLASSES)}
        for row in range(rows)
    ]


def test_a_student_that_model_init_makes_is_in_channels_last_too(tmp_path):
    students = []

    def model_init():
        students.append(Convolutional(1))
        return students[-1]

    args = arguments(tmp_path, channels_last=True, max_steps=2)
    trainer = BornAgainTrainer(args=args, model_init=model_init, train_dataset=images(), teacher=Convolutional(2))
    trainer.train()
    student = students[-1]
    assert len(students) > 1 and trainer.model is student
    assert student.convolution.weight.is_contiguous(memory_format=torch.channels_last) and all(student.seen)


def test_a_student_that_model_init_makes_is_checked_as_a_given_one_is(tmp_path):
    teacher, made = Network(2), []

    def model_init():
        made.append(1)
        return Network(1) if len(made) == 1 else teacher

    trainer = BornAgainTrainer(
        args=arguments(tmp_path), model_init=model_init, train_dataset=vectors(), teacher=teacher
    )
    with pytest.raises(ValueError, match="teacher: got the student itself"):
        trainer.train()


def test_an_evaluation_before_training_lets_the_users_other_models_be(tmp_path):
    trainer = BornAgainTrainer(
        Network(1), arguments(tmp_path), train_dataset=vectors(), eval_dataset=vectors(), teacher=Network(2)
    )
    other = trainer.accelerator.prepare_model(nn.Linear(2, 2))
    trainer.evaluate()
    assert trainer.accelerator._models == [other]


def test_an_evaluation_that_fails_leaves_nothing_for_the_next(tmp_path, caplog):
    data = vectors(12)
    trainer = BornAgainTrainer(
        Network(1), arguments(tmp_path), train_dataset=data, eval_dataset=data, teacher=Network(2)
    )
    right = trainer.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="labels: got 9"):
        trainer.evaluate([{**data[0], "labels": torch.tensor(9)}])
    assert trainer.evaluate()["eval_loss"] == right


def test_a_language_model_counts_the_labels_it_compares(tmp_path):
    data = sentences("next")
    with caplog_off():
        trainer = BornAgainTrainer(
            llama(1), arguments(tmp_path), train_dataset=data, eval_dataset=data, teacher=llama(2)
        )
    loss, tokens = 0.0, 0
    for row in data:
        logits = trainer.model.eval()(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits
        loss += F.cross_entropy(logits[0, :-1], row["labels"][1:], reduction="sum").item()
        tokens += int((row["labels"][1:] != -100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss / tokens, rel=1e-12)


class caplog_off:
    def __enter__(self):
        logging.disable(logging.WARNING)

    def __exit__(self, *_):
        logging.disable(logging.NOTSET)


# ---- The signature ----


@pytest.mark.parametrize("ours", [BornAgainTrainer, BornAgainLMTrainer])
def test_the_arguments_are_those_of_trainer_in_its_order(ours):
    parameters = list(inspect.signature(ours).parameters.values())
    positional = [own for own in parameters if own.kind is own.POSITIONAL_OR_KEYWORD]
    theirs = list(inspect.signature(Trainer).parameters.values())
    # A newer Trainer may take more, by keyword here; none that we name may be missing, moved or of another default.
    for own, upstream in zip(positional, theirs, strict=False):
        assert (own.name, own.kind, own.default) == (upstream.name, upstream.kind, upstream.default)
    assert 13 <= len(positional) <= len(theirs)
    assert [(own.name, own.kind) for own in parameters[len(positional) :]] == [
        ("teacher", inspect.Parameter.KEYWORD_ONLY),
        ("teacher_processing_class", inspect.Parameter.KEYWORD_ONLY),
        ("objective", inspect.Parameter.KEYWORD_ONLY),
        ("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]


def test_every_argument_reaches_trainer_under_its_name(tmp_path, monkeypatch):
    """Also one that only a newer Trainer has."""
    names = list(inspect.signature(BornAgainTrainer).parameters)[:-4]
    reached = {}

    class Reached(Exception):
        pass

    def init(self, *args, **kwargs):
        reached.update(signature.bind(self, *args, **kwargs).arguments)
        raise Reached

    signature = inspect.signature(Trainer.__init__)
    newer = signature.parameters["self"].replace(name="newer", kind=inspect.Parameter.KEYWORD_ONLY)
    signature = signature.replace(parameters=[*signature.parameters.values(), newer])
    monkeypatch.setattr(Trainer, "__init__", init)
    for kind in (BornAgainTrainer, BornAgainLMTrainer):
        with pytest.raises(Reached):
            kind(*names, newer="newer")
        assert {name: reached[name] for name in names} == {name: name for name in names}
        assert reached["newer"] == "newer"
