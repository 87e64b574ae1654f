"""What a network does with labels, and that nothing of it is lost where the trainer computes the loss."""

import copy

import pytest
import torch
from encoder_decoders import bart, data_of, t5, xlnet
from helpers import WORDS, Network, arguments, language_model, llama, sentences, sequence_classifier, vectors
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.training.network_loss import NetworkLoss, network_loss


def mixtral(seed):
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=12, output_router_logits=True,
        router_aux_loss_coef=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the others have no float64
    return MixtralForCausalLM(config).double()


SEEN = {
    "an encoder-decoder": (lambda seed: bart(BartForConditionalGeneration, seed), "next"),
    "one that raises without labels": (t5, "next"),
    "one that classifies": (lambda seed: bart(BartForSequenceClassification, seed), "sequence"),
    "a causal language model that shifts nothing": (lambda seed: bart(BartForCausalLM, seed), "next"),
    "another": (xlnet, "next"),
    "an early one that shifts": (language_model, "next"),
    "experts": (mixtral, "next"),
}


def gradients(trainer):
    seen = {}

    def keep(optimizer, *_):
        if not seen:
            seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    return seen


@pytest.mark.slow_but_for("an encoder-decoder", "one that classifies", "an early one that shifts")
@pytest.mark.parametrize("case", SEEN)
def test_loss_and_gradient_are_those_of_the_network_itself(tmp_path, case):
    """One step of one batch, where Trainer's own normalisation has no fault."""
    build, labels = SEEN[case]
    data, found = data_of(labels), {}
    for kind, how in ((Trainer, "trainer"), (BornAgainTrainer, "step"), (BornAgainLMTrainer, "trainer")):
        if labels == "sequence" and kind is BornAgainLMTrainer:
            continue
        args = arguments(tmp_path, loss_normalization=how, max_steps=1, logging_steps=1, gradient_accumulation_steps=1)
        trainer = kind(build(1), args, train_dataset=data)
        found[kind] = gradients(trainer), trainer.state.log_history[0]["loss"]
    # GPT-2's is divided by a count of unshifted labels in Trainer, so the network itself is called.
    model = build(1).train()
    loss = model(**next(iter(DataLoader(data, batch_size=8)))).loss
    loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for kind, (seen, logged) in found.items():
        if kind is Trainer and case == "an early one that shifts":
            continue
        assert logged == pytest.approx(loss.item(), rel=1e-3)
        assert seen.keys() == own.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("case", SEEN)
def test_eval_loss_is_the_cross_entropy_of_the_network(tmp_path, case):
    build, labels = SEEN[case]
    data = data_of(labels)
    trainer = BornAgainTrainer(build(1), arguments(tmp_path), train_dataset=data, eval_dataset=data, teacher=build(2))
    outputs = build(1).eval()(**next(iter(DataLoader(data, batch_size=8))))
    auxiliary = outputs.get("aux_loss")
    expected = outputs.loss.item() - (0 if auxiliary is None else 0.5 * auxiliary.item())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("build", [lambda seed: bart(BartForConditionalGeneration, seed), t5])
def test_student_and_teacher_of_an_encoder_decoder_read_the_labels_shifted_to_the_right(tmp_path, build):
    data = data_of("next")
    student, teacher = build(1), build(2)
    batch = next(iter(DataLoader(data, batch_size=8)))
    given = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: given[name].append(kwargs.get("decoder_input_ids")), with_kwargs=True
        )
    trainer = BornAgainTrainer(
        student, arguments(tmp_path, max_steps=1, objective="ban"), train_dataset=data, teacher=teacher
    )
    before = copy.deepcopy(student)
    seen = gradients(trainer)
    expected = before.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    for name in given:
        assert expected.shape == given[name][-1].shape
        assert sorted(expected.tolist()) == sorted(given[name][-1].tolist())

    counted = batch["labels"] != -100
    inputs = {name: value for name, value in batch.items() if name != "labels"} | {"decoder_input_ids": expected}
    with torch.no_grad():
        p = build(2).eval()(**inputs).logits.softmax(-1)
    loss = -(p * before(**inputs).logits.log_softmax(-1)).sum(-1)[counted].mean()
    loss.backward()
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize("loss_implementation", ["full", "chunked"])
@pytest.mark.parametrize("taught", [False, True])
def test_the_auxiliary_loss_counts_by_the_items_of_its_micro_batch(tmp_path, loss_implementation, taught):
    data = data_of("next")
    student, teacher = mixtral(1), mixtral(2)
    args = arguments(
        tmp_path, objective="ban", max_steps=1, loss_implementation=loss_implementation, loss_normalization="step",
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer = BornAgainTrainer(
        copy.deepcopy(student), args, train_dataset=data, teacher=copy.deepcopy(teacher) if taught else None
    )
    order = list(trainer.get_train_dataloader())
    seen = gradients(trainer)
    total, items = 0.0, 0
    for batch in order:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs, labels = student.train()(**inputs), batch["labels"][:, 1:]
        log_q, counted = outputs.logits[:, :-1].log_softmax(-1), labels != -100
        if taught:
            with torch.no_grad():
                p = teacher.eval()(**inputs).logits[:, :-1].softmax(-1)
            losses = -(p * log_q).sum(-1)[counted]
        else:
            losses = -log_q[counted].gather(1, labels[counted].unsqueeze(1))
        total = total + losses.sum() + counted.sum() * 0.5 * outputs.aux_loss
        items += counted.sum()
    (total / items).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert any("gate" in name and gradient.abs().max() > 0 for name, gradient in seen.items())


# ---- What is found out, and that finding out changes nothing ----


def batch_of(labels="next"):
    batch = next(iter(DataLoader(data_of(labels), batch_size=8)))
    return batch, batch.pop("labels")


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (llama, NetworkLoss(True)),
        (language_model, NetworkLoss(True)),
        (lambda seed: bart(BartForCausalLM, seed), NetworkLoss(False)),
        (mixtral, NetworkLoss(True, 0.5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_class_does_is_found_in_every_dtype(build, found, dtype):
    assert network_loss(build(1).to(dtype), *batch_of()) == found


def test_finding_out_leaves_the_network_and_the_random_numbers_as_they_were():
    model = sequence_classifier(1).train()
    model.bert.eval()
    model.dropout.p = 0.5
    batch, labels = batch_of("sequence")
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model.config.to_dict()
    assert network_loss(model, batch, labels) == NetworkLoss(False)
    assert model.training and not model.bert.training and model.config.to_dict() == before[2]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


def test_wrapped_and_compiled_networks_are_asked_too():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    assert network_loss(Wrapped(language_model(1)), *batch_of()) == NetworkLoss(True)
    assert network_loss(torch.compile(llama(1), backend="eager"), *batch_of()) == NetworkLoss(True)
    batch = next(iter(DataLoader(vectors(8), batch_size=8)))
    labels = batch.pop("labels")
    assert network_loss(Network(1), batch, labels) == NetworkLoss()
    assert network_loss(Wrapped(Network(1)), batch, labels) == NetworkLoss()  # which takes no labels


def test_logits_that_tell_nothing_leave_the_name_of_the_class_to_tell(tmp_path):
    model = llama(1)
    nn.init.zeros_(model.lm_head.weight)
    assert network_loss(model, *batch_of()) == NetworkLoss(None)
    data = sentences("next", 8)
    teacher = llama(2)
    trainer = BornAgainTrainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data, teacher=teacher)
    batch, labels = batch_of()
    assert trainer._split_labels({**batch, "labels": labels})[1].equal(labels)
    assert trainer._shifts_labels


def test_labels_that_are_all_ignored_in_the_first_row_do_not_matter():
    batch, labels = batch_of()
    labels[0] = -100
    assert network_loss(llama(1), batch, labels) == NetworkLoss(True)
    assert network_loss(bart(BartForCausalLM, 1), batch, labels) == NetworkLoss(False)


# ---- What is refused ----


class WithOwnLoss(nn.Module):
    """A classifier whose forward adds a term of its own where it is given labels."""

    def __init__(self, seed, logits_too=False):
        super().__init__()
        self.network, self.logits_too = Network(seed), logits_too

    def forward(self, x, labels=None):
        logits = self.network(x)["logits"]
        if labels is None:
            return {"logits": logits}
        if self.logits_too:
            logits = logits + nn.functional.one_hot(labels, logits.shape[-1])
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss if self.logits_too else loss + 0.1 * logits.square().mean(), "logits": logits}


def test_a_loss_of_its_own_is_refused_before_the_first_step(tmp_path):
    data = vectors(8)
    for student, message in (
        (WithOwnLoss(1), r"model: WithOwnLoss computes a loss of \d.\d+ where the cross-entropy of its logits is"),
        (WithOwnLoss(1, logits_too=True), "model: WithOwnLoss gives other logits when it is given labels"),
    ):
        before = copy.deepcopy(student.state_dict())
        for teacher in (Network(2), None):
            args = arguments(tmp_path, loss_normalization="step")
            trainer = BornAgainTrainer(student, args, train_dataset=data, eval_dataset=data, teacher=teacher)
            for run in (trainer.train, trainer.evaluate):
                with pytest.raises(ValueError, match=message):
                    run()
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_an_encoder_decoder_whose_decoder_inputs_are_not_known_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(
        "transformers.models.t5.modeling_t5.T5ForConditionalGeneration.prepare_decoder_input_ids_from_labels"
    )
    data = data_of("next")
    trainer = BornAgainTrainer(t5(1), arguments(tmp_path), train_dataset=data, teacher=t5(2))
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration is an encoder-decoder .* expected decoder_input_ids"
    ):
        trainer.train()
    with_inputs = [{**row, "decoder_input_ids": row["input_ids"]} for row in data]
    BornAgainTrainer(t5(1), arguments(tmp_path), train_dataset=with_inputs, teacher=t5(2)).train()


def test_ligers_fused_loss_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.use_liger_kernel = True
    with pytest.raises(
        ValueError, match="use_liger_kernel: got True beside a teacher, expected False: its fused loss"
    ):
        BornAgainTrainer(llama(1), args, teacher=llama(2))
    with pytest.raises(ValueError, match="use_liger_kernel: got True in BornAgainLMTrainer"):
        BornAgainLMTrainer(llama(1), args)


def test_a_student_that_is_not_where_the_batch_is_is_asked_later(tmp_path):
    """As with bf16_full_eval, where Trainer moves it only when the training begins."""
    data = data_of("next")
    trainer = BornAgainTrainer(mixtral(1), arguments(tmp_path), train_dataset=data, teacher=mixtral(2))
    batch, labels = batch_of()
    student = trainer.model
    trainer.model = mixtral(1).to("meta")
    trainer._split_labels({**batch, "labels": labels})
    assert trainer._network_loss is None and trainer._shifts_labels
    trainer.model = student
    trainer._split_labels({**batch, "labels": labels})
    assert trainer._network_loss == NetworkLoss(True, 0.5)
