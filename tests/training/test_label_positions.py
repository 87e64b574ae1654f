"""Each network has its own decoder inputs, and all of them predict, at each position, the token that the label is."""

import logging

import pytest
import torch
from encoder_decoders import bart, data_of, t5, xlnet
from helpers import WORDS, arguments, language_model, sentences
from torch import nn
from torch.utils.data import DataLoader
from transformers import BartForCausalLM, BartForConditionalGeneration

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.teacher.inputs import decoder_inputs
from born_again.training.label_positions import labels_behind


class Plain(nn.Module):
    """A causal language model whose forward knows no labels, and no arguments but its ids."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(WORDS, 8).double(), nn.Linear(8, WORDS).double()
        self.seen = []

    def forward(self, input_ids):
        self.seen.append(input_ids)
        return self.out(self.embed(input_ids).cumsum(1))


def built(folder, student, teacher, data, kind=BornAgainTrainer, **changes):
    return kind(
        student,
        arguments(folder, **{"max_steps": 1, "objective": "ban", **changes}),
        teacher=teacher,
        train_dataset=data,
        eval_dataset=data,
    )


def trained(*args, **changes):
    ours = built(*args, **changes)
    ours.train()
    return ours


def shifted(data):
    """Labels that are the token after each position."""
    return [{**row, "labels": nn.functional.pad(row["labels"][1:], (0, 1), value=-100)} for row in data]


def remembered(network):
    given = []
    network.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs.get("decoder_input_ids")), with_kwargs=True
    )
    return given


# ---- Decoder inputs ----


@pytest.mark.parametrize("precision", ["autocast", "inference"])
@pytest.mark.parametrize(
    "build", [lambda seed: bart(BartForConditionalGeneration, seed), xlnet], ids=["same", "another kind"]
)
def test_every_network_reads_its_own_decoder_inputs(tmp_path, build, precision):
    student = build(1)
    teachers = [bart(BartForConditionalGeneration, seed, decoder_start_token_id=seed) for seed in (5, 6)]
    data = data_of("next")
    batch = next(iter(DataLoader(data, batch_size=8)))
    labels = batch.pop("labels")
    for teacher in teachers:
        teacher.eval()
    with torch.no_grad():
        answers = [teacher(**batch, **decoder_inputs(teacher, batch, labels)).logits for teacher in teachers]
    p = torch.stack([answer.softmax(-1) for answer in answers]).mean(0)
    own = decoder_inputs(student, batch, labels)
    log_q = student.train()(**batch, **own).logits.log_softmax(-1)
    expected = -(p * log_q).sum(-1)[labels != -100].mean().item()
    given = remembered(student)
    ours = trained(tmp_path, student, teachers, data, logging_steps=1, teacher_precision=precision)
    assert ours.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert all(ids is None or ids[:, 0].eq(2).all() for ids in given)
    assert ours.evaluate()["eval_loss"] > 0


def test_decoder_inputs_made_for_another_network_are_refused(tmp_path):
    student = bart(BartForConditionalGeneration, 1)
    data = [
        {**row, "decoder_input_ids": student.prepare_decoder_input_ids_from_labels(row["labels"][None])[0]}
        for row in data_of("next")
    ]
    message = r"decoder_input_ids, .* BartFor\w+ \(the student\) with \[2, .*the teacher.* with \[5, "
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, student, bart(BartForConditionalGeneration, 2, decoder_start_token_id=5), data)
    trained(tmp_path, student, bart(BartForConditionalGeneration, 2), data)


def test_a_teacher_whose_decoder_inputs_are_not_known_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(
        "transformers.models.t5.modeling_t5.T5ForConditionalGeneration.prepare_decoder_input_ids_from_labels"
    )
    with pytest.raises(ValueError, match="teacher: T5ForCond.* is an encoder-decoder, and how it makes"):
        trained(tmp_path, xlnet(1), t5(2), data_of("next"))


# ---- Positions ----


@pytest.mark.parametrize(
    ("student", "teacher"), [(xlnet, language_model), (language_model, xlnet)], ids=["causal teacher", "other"]
)
def test_a_teacher_that_predicts_other_positions_is_refused(tmp_path, student, teacher):
    network = student(1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    message = "teacher: .*GPT2LMHeadModel predicts .* the token after it, and .*XLNetLMHeadModel that of the position"
    ours = built(tmp_path, network, teacher(2), sentences("next"))
    for run in (ours.train, ours.evaluate):
        with pytest.raises(ValueError, match=message):
            run()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    plain = [language_model(2), xlnet(3)]
    with pytest.raises(ValueError, match="the teacher, GPT2LMHead.* predicts .* the teacher, XLNetLMHead"):
        trained(tmp_path, Plain(), plain, sentences("next"))


@pytest.mark.parametrize(
    ("teacher", "shifts"), [(language_model, True), (lambda seed: bart(BartForCausalLM, seed), False)]
)
def test_what_a_teacher_does_tells_of_a_plain_student(tmp_path, teacher, shifts):
    data = sentences("next")
    assert trained(tmp_path, Plain(), teacher(2), data if shifts else shifted(data))._shifts_labels is shifts
    # Labels of the token after each position are right for both kinds.
    if not shifts:
        ours = trained(tmp_path, teacher(1), language_model(2), shifted(data))
        assert ours._shifts_labels is False


# ---- Labels that are the input ----


@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
@pytest.mark.parametrize("teacher", [None, Plain])
def test_a_plain_network_that_would_learn_to_copy_is_refused(tmp_path, kind, teacher):
    teacher, student = teacher and teacher(2), Plain()
    with pytest.raises(ValueError, match=r"labels: are the token ids that Plain reads .*labels\[:, :-1\] = input_ids"):
        trained(tmp_path, student, teacher, sentences("next"), kind, loss_normalization="step")
    ours = trained(tmp_path, student, teacher, shifted(sentences("next")), kind, loss_normalization="step")
    assert not ours._shifts_labels and student.seen  # though its batches have an attention_mask


def test_what_may_be_meant_is_warned_of(tmp_path, caplog):
    masked = [{**row, "input_ids": torch.where(row["input_ids"] % 3 == 0, 1, row["input_ids"])}
              for row in sentences("next")]  # fmt: skip
    cases = (
        (xlnet, sentences("next"), "XLNetLMHeadModel reads at the same positions, which its own loss does not shift"),
        (language_model, shifted(sentences("next")), "GPT2LMHeadModel shifts them once more"),
        (xlnet, masked, None),
        (language_model, sentences("next"), None),
        (lambda seed: bart(BartForConditionalGeneration, seed), data_of("next"), None),
    )
    for build, data, said in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "born_again.training.trainer"):
            trained(tmp_path, build(1), build(2), data)
        found = [record.message for record in caplog.records if record.message.startswith("labels: are")]
        assert [said in text for text in found] == ([True] if said else [])


def test_few_labels_tell_nothing():
    ids = torch.arange(10, 30)[None]
    assert labels_behind(ids, ids.clone()) == 0
    assert labels_behind(ids, ids.where(ids < 18, -100)) == 0
    assert labels_behind(ids, ids.where(ids < 17, -100)) is None
    assert labels_behind(ids, ids + 1) == 1
    assert labels_behind(ids.float(), ids) is None and labels_behind(None, ids) is None
