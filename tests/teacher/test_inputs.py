"""Teacher and student of different kinds read one batch, each what is its own, under the name that it has there."""

import copy

import pytest
import timm
import torch
from helpers import CLASSES, WORDS, Network, arguments, language_model, sentences
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from born_again import BornAgainLMTrainer, BornAgainTrainer, create_image_classifier
from born_again.data.streams import TokenStreams, collate_windows
from born_again.teacher import FrozenTeacher
from born_again.teacher.inputs import NetworkInputs, cast_floating, input_dtype

TOKENS = 11


def bert(seed=2, labels=2):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=labels,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config)


def distilbert(seed=1):
    torch.manual_seed(seed)
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=TOKENS, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=12, num_labels=2
        )
    )


class Strict(nn.Module):
    """A student without **kwargs around a network of transformers."""

    def __init__(self):
        super().__init__()
        self.inner = distilbert()

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


class Recurrent(nn.Module):
    """A plain network that calls its ids by a name of its own."""

    def __init__(self, seed=1, classes=2):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(TOKENS, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.out = nn.Linear(16, classes)

    def forward(self, ids):
        return self.out(self.lstm(self.embed(ids))[0].mean(1))


def remembering(network):
    """A list of what a network is called with, its logits and its mode, one entry a call."""
    seen = []

    def see(module, args, kwargs, output):
        logits = output if isinstance(output, torch.Tensor) else output["logits"]
        seen.append((args, dict(kwargs), logits.detach().clone(), module.training))

    network.register_forward_hook(see, with_kwargs=True)
    return seen


def pairs(rows=24):
    """Sentence pairs whose label is where the second sentence begins, which token_type_ids alone tell."""
    generator = torch.Generator().manual_seed(3)
    data = []
    for row in range(rows):
        types = torch.zeros(8, dtype=torch.int64)
        types[3 + 2 * (row % 2) :] = 1
        ids = torch.randint(1, TOKENS, (8,), generator=generator)
        data.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones(8, dtype=torch.int64),
                "token_type_ids": types,
                "labels": torch.tensor(row % 2),
            }
        )
    return data


def as_datasets(rows):
    from datasets import Dataset

    return Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows]).with_format(
        "torch"
    )


def fitted_bert():
    """A teacher that has learned from token_type_ids what its labels are."""
    teacher, data = bert(), pairs()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    optimizer = torch.optim.Adam(teacher.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        teacher.eval()(**batch).loss.backward()
        optimizer.step()
    return teacher


STUDENTS = {"distilbert": distilbert, "no kwargs": Strict, "recurrent": Recurrent}


@pytest.mark.slow_but_for("rows-distilbert", "datasets-no kwargs")
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("kind", ["rows", "datasets"])
def test_columns_that_only_the_teacher_reads_reach_it_alone(tmp_path, student, kind):
    teacher, data = fitted_bert(), pairs()
    network = STUDENTS[student]()
    asked, read = remembering(teacher), remembering(network)
    rows = data if kind == "rows" else as_datasets(data)
    trainer = BornAgainTrainer(
        network, arguments(tmp_path), train_dataset=rows, eval_dataset=rows, teacher=[teacher, bert(5)]
    )
    trainer.train()
    trainer.evaluate()
    predicted = trainer.predict(rows if kind == "datasets" else data)
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in data]
    again = trainer.predict(unlabelled if kind == "rows" else rows.remove_columns("labels"))
    assert torch.equal(torch.tensor(predicted.predictions), torch.tensor(again.predictions))
    alone = copy.deepcopy(teacher)
    alone._forward_hooks.clear()
    assert len(asked) >= 4
    for _, inputs, logits, training in asked:
        assert not training and set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
        with torch.no_grad():
            assert torch.equal(alone(**inputs).logits, logits)
    for _, inputs, _, training in read:
        assert "token_type_ids" not in inputs and not (training and "labels" in inputs)
    assert any(call[3] for call in read) and any(not call[3] for call in read)


def test_the_training_accuracy_of_the_teacher_is_its_own(tmp_path):
    teacher = fitted_bert()
    for rows in (pairs(), as_datasets(pairs())):
        trainer = BornAgainTrainer(distilbert(), arguments(tmp_path), train_dataset=rows, teacher=teacher)
        assert trainer.evaluate_teacher() == {"accuracy": 1.0, "samples": 24}


def test_columns_found_before_the_teacher_came_are_found_again(tmp_path):
    class Early(BornAgainTrainer):
        def _take_teacher(self, teacher):
            self._set_signature_columns_if_needed()
            assert "token_type_ids" not in self._signature_columns
            super()._take_teacher(teacher)

    trainer = Early(distilbert(), arguments(tmp_path), train_dataset=pairs(), teacher=bert())
    assert "token_type_ids" in next(iter(trainer.get_train_dataloader()))


def test_without_a_teacher_the_columns_are_trainers(tmp_path):
    trainer = BornAgainTrainer(distilbert(), arguments(tmp_path), train_dataset=pairs())
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


def test_a_student_with_kwargs_sees_what_trainer_would_show_it(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert(4)

        def forward(self, input_ids, **kwargs):
            return self.inner(input_ids=input_ids, **kwargs)

    def collate(rows):  # as tokenizers pad: a mask is made where there is none
        batch = torch.utils.data.default_collate(rows)
        return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}

    for remove, names in ((True, {"input_ids", "attention_mask"}), (False, {*pairs()[0]} - {"labels"})):
        student = Wrapped()
        read = remembering(student)
        args = arguments(tmp_path, max_steps=1, remove_unused_columns=remove)
        BornAgainTrainer(student, args, train_dataset=pairs(), teacher=bert(), data_collator=collate).train()
        assert {name for call in read for name in call[1]} - {"labels"} == names  # which are tried out once


def test_the_teacher_cache_is_called_with_the_teachers_columns(tmp_path):
    class Named(list):
        emit_view_keys, view_count, cache_fingerprint = False, 24, "pairs"

        def __getitem__(self, index):
            row = super().__getitem__(index)
            return {**row, "view_keys": index} if self.emit_view_keys else row

    def collate(rows):
        import numpy as np

        keys = [row["view_keys"] for row in rows if "view_keys" in row]
        batch = torch.utils.data.default_collate(
            [{name: value for name, value in row.items() if name != "view_keys"} for row in rows]
        )
        return {**batch, "view_keys": np.array(keys)} if keys else batch

    weights = []
    for cache in ("off", "memory"):
        teacher, student = fitted_bert(), distilbert()
        args = arguments(tmp_path, max_steps=9, teacher_cache=cache, remove_unused_columns=False)
        trainer = BornAgainTrainer(student, args, train_dataset=Named(pairs()), teacher=teacher, data_collator=collate)
        trainer.train()
        assert trainer.teacher_train_metrics["accuracy"] == 1.0
        weights.append(student.classifier.weight.detach())
    assert torch.equal(*weights)


def test_an_input_that_no_batch_has_is_named_at_the_first(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert()

        def forward(self, input_ids, segments):
            return self.inner(input_ids=input_ids, token_type_ids=segments)

    trainer = BornAgainTrainer(distilbert(), arguments(tmp_path), train_dataset=pairs(), teacher=Pair())
    with pytest.raises(ValueError, match="teacher: the forward of Pair needs segments, and a batch has input_ids"):
        trainer.train()
    pictures = [{"pixel_values": torch.zeros(3, 8, 8), "x": torch.zeros(5), "labels": torch.tensor(0)}] * 8
    trainer = BornAgainTrainer(Network(1), arguments(tmp_path), train_dataset=pictures, teacher=bert())
    with pytest.raises(ValueError, match="teacher: the forward of Bert.* needs input_ids, and a batch has"):
        trainer.train()


# ---- Networks of different kinds ----


class Convolutions(nn.Module):
    """A plain network of convolutions, with normalisation first and last."""

    def __init__(self, seed=1, classes=CLASSES):
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.after = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, classes)

    def forward(self, image):
        return self.classifier(self.after(self.conv(self.norm(image))).relu().mean((2, 3)))


def timm_network(seed=1, classes=CLASSES):
    torch.manual_seed(seed)
    return timm.create_model("test_wide_resnet_cifar", num_classes=classes)


def wrapped_timm(seed=1, classes=CLASSES):
    torch.manual_seed(seed)
    return create_image_classifier(
        "test_wide_resnet_cifar", [f"LABEL_{index}" for index in range(classes)], (0.5,) * 3, (0.25,) * 3
    )


class Adapted(nn.Module):
    """As PEFT wraps a network: any arguments, and the network inside by get_base_model."""

    def __init__(self, network):
        super().__init__()
        self.base_model = network

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def pictures(rows=16, name="pixel_values"):
    generator = torch.Generator().manual_seed(2)
    return [
        {name: torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(row % CLASSES)}
        for row in range(rows)
    ]


IMAGE_NETWORKS = {
    "plain": Convolutions,
    "timm": timm_network,
    "transformers": wrapped_timm,
    "compiled": lambda seed: torch.compile(timm_network(seed), backend="eager"),
    "adapted timm": lambda seed: Adapted(timm_network(seed)),
    "sequential": lambda seed: nn.Sequential(Convolutions(seed)),
}


@pytest.mark.slow_but_for(
    "plain-timm",
    "timm-transformers",
    "transformers-compiled",
    "compiled-adapted timm",
    "adapted timm-sequential",
    "sequential-plain",
)
@pytest.mark.parametrize("teacher", IMAGE_NETWORKS)
@pytest.mark.parametrize("student", IMAGE_NETWORKS)
def test_image_networks_of_any_two_kinds(tmp_path, student, teacher):
    taught, network = IMAGE_NETWORKS[teacher](2), IMAGE_NETWORKS[student](1)
    args = arguments(tmp_path, max_steps=2)
    trainer = BornAgainTrainer(
        network, args, train_dataset=pictures(), eval_dataset=pictures(), teacher=[taught, timm_network(3)]
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(pictures()).predictions.shape == (16, CLASSES)


@pytest.mark.parametrize("remove", [True, False])
def test_a_column_with_the_students_name_reaches_a_teacher_of_transformers(tmp_path, remove):
    teacher, data = wrapped_timm(2), pictures(name="x")
    asked = remembering(teacher)
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=remove)
    BornAgainTrainer(timm_network(1), args, train_dataset=data, teacher=teacher).train()
    assert asked and all(set(call[1]) == {"pixel_values"} for call in asked)


def test_text_networks_of_different_kinds(tmp_path):
    for student, teacher in ((Recurrent(), bert()), (distilbert(), Recurrent(3)), (Recurrent(), Recurrent(3))):
        args = arguments(tmp_path, max_steps=2)
        trainer = BornAgainTrainer(student, args, train_dataset=pairs(), eval_dataset=pairs(), teacher=teacher)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0


def test_language_models_of_different_kinds_read_the_same_streams(tmp_path):
    class Plain(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.embed, self.out = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

        def forward(self, tokens):
            return self.out(self.embed(tokens))

    data = TokenStreams(torch.randint(WORDS, (4 * 7 * 6,), generator=torch.Generator().manual_seed(1)), 4, 7, before=0)
    for student, teacher in (
        (Plain(1), language_model(2).float()),
        (language_model(1).float(), Plain(2)),
        (Plain(1), [Plain(2), language_model(2).float()]),
    ):
        for cache in ("off", "memory"):
            args = arguments(
                tmp_path,
                per_device_train_batch_size=4,
                per_device_eval_batch_size=4,
                remove_unused_columns=False,
                teacher_cache=cache,
                max_steps=9,
            )
            trainer = BornAgainLMTrainer(
                student, args, train_dataset=data, data_collator=collate_windows, teacher=teacher
            )
            trainer.train()
            assert trainer.evaluate(data)["eval_perplexity"] > 1


def test_class_counts_of_timm_and_transformers_are_compared(tmp_path):
    for student, teacher in (
        (timm_network(), wrapped_timm(classes=3)),
        (wrapped_timm(), timm_network(classes=3)),
        (timm_network(), timm_network(classes=3)),
    ):
        with pytest.raises(ValueError, match="teacher: has 3 (classes|labels), the student 4"):
            BornAgainTrainer(student, arguments(tmp_path), teacher=teacher)


def test_class_counts_that_no_config_tells_are_compared_at_the_first_step(tmp_path):
    trainer = BornAgainTrainer(
        Convolutions(), arguments(tmp_path), train_dataset=pictures(), teacher=Convolutions(classes=3)
    )
    with pytest.raises(ValueError, match=r"teacher: gives logits of shape \(8, 3\) .* \(8, 4\).*teacher's 3 classes"):
        trainer.train()


def test_teachers_with_different_classes_are_refused_at_the_first_batch():
    teacher = FrozenTeacher([Convolutions(), Convolutions(classes=3)])
    with pytest.raises(ValueError, match=r"logits: got shapes \(2, 4\), \(2, 3\) from networks whose probabilities"):
        teacher({"image": torch.zeros(2, 3, 8, 8)})


def test_a_plain_language_model_is_taught_as_its_teacher_reads(tmp_path):
    class Plain(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(input_ids=ids).logits

    weights = []
    for wrap in (Plain, lambda network: network):
        student, teacher = language_model(1), language_model(2)
        args = arguments(tmp_path, objective="ban+l")
        data = [{name: value for name, value in row.items() if name != "attention_mask"} for row in sentences("next")]
        BornAgainTrainer(wrap(student), args, train_dataset=data, teacher=teacher).train()
        weights.append(student.lm_head.weight.detach())
    assert torch.equal(*weights)


def test_what_a_network_is_called_with():
    ids, mask, x = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 5)
    cases = [
        (lambda x: x, {"pixel_values": x}, {"x"}),
        (lambda ids: ids, {"input_ids": ids, "attention_mask": mask}, {"ids"}),
        (lambda ids, attention_mask=None: ids, {"input_ids": ids, "attention_mask": mask}, {"ids", "attention_mask"}),
        (lambda x=None: x, {"anything": x}, {"x"}),
        (lambda x, flag=False: x, {"input_ids": ids, "attention_mask": mask}, {"x"}),
        (lambda x, **more: x, {"pixel_values": x, "more": ids}, {"x", "more"}),
        (lambda **more: more, {"a": x, "b": ids}, {"a", "b"}),
        (lambda input_ids, extra=None: ids, {"input_ids": ids, "attention_mask": mask}, {"input_ids"}),
    ]
    for forward, batch, expected in cases:
        network = nn.Identity()
        network.forward = forward
        assert set(NetworkInputs(network, "teacher").of(batch)) == expected


@pytest.mark.parametrize(
    ("forward", "names", "needed"),
    [
        (lambda a, b: a, ("input_ids", "attention_mask"), "a, b"),
        (lambda ids, mask=None: ids, ("input_ids", "attention_mask"), "ids"),  # is the mask another's?
        (lambda x: x, ("pixel_values", "input_ids"), "x"),
        (lambda x: x, ("left", "right"), "x"),
        (lambda x: x, ("attention_mask",), "x"),
        (lambda input_ids, segments: input_ids, ("input_ids", "token_type_ids"), "segments"),
        (lambda extra, input_ids: extra, ("input_ids", "other"), "extra"),
    ],
)
def test_inputs_that_cannot_be_told_apart_are_refused(forward, names, needed):
    network = nn.Identity()
    network.forward = forward
    message = f"student: the forward of Identity needs {needed}, and a batch has {', '.join(names)}; expected"
    with pytest.raises(ValueError, match=message):
        NetworkInputs(network, "student").of(dict.fromkeys(names, torch.ones(2, 3)))


# ---- Precision ----


def plain_resnet(seed=1):
    torch.manual_seed(seed)
    return timm.create_model("resnet10t", num_classes=CLASSES)


class Recast(Convolutions):
    """Weights of 16 bits with norms in float32, as many checkpoints have them."""

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)
        self.norm.float(), self.after.float()
        return self


NARROW = {"norm first": Convolutions, "mixed": Recast, "resnet": plain_resnet, "wrapped": wrapped_timm}


@pytest.mark.parametrize("case", NARROW)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["autocast", "inference", "float32"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_teacher_of_convolutions_works_in_every_precision(case, stored, precision, autocast):
    network = NARROW[case]()
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in pictures(4)])}
    expected = FrozenTeacher(copy.deepcopy(network))(batch)
    network.to(stored)
    teacher = FrozenTeacher(network).set_precision(precision, autocast).to(torch.device("cpu"))
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = teacher(batch)
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.03 * expected.abs().max().item())


def test_inputs_are_cast_only_where_they_are_floating():
    network = Recast().to(torch.bfloat16)
    assert input_dtype(network) == torch.bfloat16
    assert input_dtype(nn.BatchNorm2d(3)) == torch.float32 and input_dtype(nn.Identity()) is None
    batch = {
        "pixel_values": torch.ones(2),
        "input_ids": torch.ones(2, dtype=torch.int64),
        "mask": torch.ones(2).bool(),
    }
    cast = cast_floating(batch, torch.bfloat16)
    assert [value.dtype for value in cast.values()] == [torch.bfloat16, torch.int64, torch.bool]
    assert all(a is b for a, b in zip(cast_floating(batch, None).values(), batch.values(), strict=True))
    assert cast_floating(batch, torch.float32)["pixel_values"] is batch["pixel_values"]


@pytest.mark.slow
def test_narrow_weights_that_are_trained_are_warned_of_once(tmp_path, caplog):
    def warnings(student, **options):
        caplog.clear()
        args = arguments(tmp_path, max_steps=2, **options.pop("changes", {}))
        trainer = BornAgainTrainer(student, args, train_dataset=pairs(), **options)
        trainer.train()
        return [record.message for record in caplog.records if "trained parameters" in record.message]

    teacher = bert(2).to(torch.bfloat16)
    config = copy.deepcopy(teacher.config)
    config.dtype = torch.bfloat16  # as from_pretrained leaves it
    student = AutoModelForSequenceClassification.from_config(config)
    (message,) = warnings(student, teacher=teacher)
    assert message.startswith(f"{len(list(student.parameters()))} trained parameters of the student, bert.embeddings.")
    assert "are torch.bfloat16: updates smaller than about 0.004 of a weight" in message
    assert "from_config(teacher.config, dtype=torch.float32)" in message
    (message,) = warnings(bert().to(torch.bfloat16), changes={"loss_normalization": "step"})
    # What the message advises, and what needs none: float32 weights, narrow ones that are frozen, and no teacher.
    config.dtype = torch.bfloat16
    student = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert not warnings(student, teacher=teacher, changes={"bf16": True})
    student = bert(1)
    student.bert.embeddings.to(torch.bfloat16).requires_grad_(False)
    assert not warnings(student, teacher=bert(2), changes={"bf16": True})
    assert not warnings(bert(1).to(torch.bfloat16))


# ---- Placement, and checks before changes ----


def test_an_offloaded_teacher_is_refused(tmp_path):
    import accelerate

    cases = [accelerate.cpu_offload(bert()), accelerate.disk_offload(bert(), str(tmp_path / "weights"))]
    cases += [bert().to("meta")]
    spread = bert()
    spread.hf_device_map = {"bert": 0, "classifier": "disk"}
    spread.classifier.to("meta")
    for teacher in [*cases, spread]:
        message = (
            "teacher: Bert.* is spread or offloaded by accelerate: it has .* without values in memory.*device_map={'"
        )
        with pytest.raises(ValueError, match=message):
            BornAgainTrainer(distilbert(), arguments(tmp_path), train_dataset=pairs(), teacher=[bert(), teacher])
    with pytest.raises(ValueError, match="and the device_map {'bert': 0, 'classifier': 'disk'}; expected all weights"):
        FrozenTeacher(spread)


def test_a_teacher_that_is_where_it_should_be_is_not_moved():
    class Fixed(Network):
        def to(self, *args, **kwargs):
            raise ValueError("quantised weights stay")

    teacher = FrozenTeacher(Fixed(1)).to(torch.device("cpu"))
    assert teacher({"x": torch.ones(2, 5, dtype=torch.float64)}).shape == (2, CLASSES)
    with pytest.raises(ValueError, match="teacher: Fixed cannot be moved to meta .quantised weights stay.; load it"):
        FrozenTeacher(Fixed(1)).to(torch.device("meta"))


def test_quantised_weights_are_not_widened():
    class Quantised(Network):
        def float(self):
            raise ValueError("`.float()` is not supported for quantized model")

    network = Quantised(1).half()
    with pytest.raises(ValueError, match="teacher_precision: got 'float32' for a teacher .Quantised. whose weights"):
        FrozenTeacher(network).set_precision("float32")


def refusals(folder):
    student = bert(1)
    yield "student itself", student, student, {}
    shared = bert(2)
    shared.classifier.weight = student.classifier.weight
    yield "shared", student, shared, {}
    yield "classes", student, bert(2, labels=3), {}
    yield "settings", student, bert(2), {"label_smoothing_factor": 0.1}
    yield "cache", student, bert(2), {"teacher_cache": "memory"}
    uncopyable = bert(2).half()
    uncopyable.kept = (number for number in range(3))  # a generator cannot be copied
    yield "copy", student, uncopyable, {"teacher_precision": "float32"}


def test_what_is_refused_is_left_as_it_was(tmp_path, monkeypatch):
    formats = []
    to = nn.Module.to
    monkeypatch.setattr(
        nn.Module, "to", lambda self, *a, **k: (formats.append(k.get("memory_format")), to(self, *a, **k))[1]
    )
    for name, student, teacher, changes in refusals(tmp_path):
        for network in (student, teacher):
            network.train().requires_grad_(True)
        args = arguments(tmp_path, channels_last=True, **changes)
        with pytest.raises(ValueError, match="teacher|label_smoothing"):
            BornAgainTrainer(student, args, train_dataset=pairs(), teacher=teacher)
        for network in (student, teacher):
            assert network.training and all(parameter.requires_grad for parameter in network.parameters()), name
    assert set(formats) == {None}
