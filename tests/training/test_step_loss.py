"""The chunked implementation in a training: weights, losses and metrics of the full one, and when each is chosen."""

import logging

import pytest
import torch
from accelerate.utils import DynamoBackend
from helpers import Network, arguments, language_model, llama, sentences, vectors
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerCallback

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.data.streams import TokenStreams, collate_windows
from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM
from born_again.objectives import OBJECTIVES
from born_again.training import step_loss

STREAMS, WINDOW = 4, 5
LOGGER = "born_again.training.step_loss"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last of them ragged, in every batch."""
    monkeypatch.setattr("born_again.objectives.chunked._CHUNK", 23 * 7 * 8)
    monkeypatch.setattr("born_again.objectives.fused._CPU_BLOCK", 23 * 2)


def trained(folder, implementation, build=language_model, teacher=None, resume=None, **changes):
    settings = {"max_steps": 3, "logging_steps": 1, "loss_implementation": implementation}
    trainer = BornAgainTrainer(
        build(1),
        arguments(folder, **{**settings, **changes}),
        train_dataset=sentences("next", rows=12),
        eval_dataset=sentences("next", rows=4),
        teacher=build(2) if teacher is None else teacher,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_same(ours, full, rtol=1e-10, atol=1e-12):
    assert ours._chunked is True and full._chunked is False
    torch.testing.assert_close(weights(ours), weights(full), rtol=rtol, atol=atol)
    assert len(ours.state.log_history) == len(full.state.log_history)
    for entry, expected in zip(ours.state.log_history, full.state.log_history, strict=True):
        for name, value in expected.items():
            if "runtime" not in name and "per_second" not in name:
                assert entry[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.slow_but_for("ban-tied-1", "ban+l-untied-2", "cwtm-tied-2", "dkpp-untied-1")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("build", [language_model, llama], ids=["tied", "untied"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_training_is_that_of_the_full_implementation(tmp_path, objective, build, accumulate):
    changes = {
        "objective": objective,
        "per_device_train_batch_size": 8 // accumulate,
        "gradient_accumulation_steps": accumulate,
        **({"temperature": 2.0, "label_weight": 0.5} if objective == "ban+l" else {}),
    }
    ours, full = (trained(tmp_path, implementation, build, **changes) for implementation in ("chunked", "full"))
    assert_same(ours, full)
    assert ours.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=1e-9)


def lstm(seed: int, units: int = 8) -> LstmLMForCausalLM:
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=23, hidden_size=units, dropout=0.3)).double()


@pytest.mark.slow_but_for("ban+l-2", "cwtm-1")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", ["label", "ban+l", "cwtm"])
def test_streams_with_a_carried_state_and_a_smaller_teacher(tmp_path, objective, accumulate):
    tokens = torch.randint(0, 23, (STREAMS * (4 * WINDOW + 3) - 2,), generator=torch.Generator().manual_seed(3))
    runs = []
    for implementation in ("chunked", "full"):
        args = arguments(
            tmp_path,
            objective="ban" if objective == "label" else objective,
            loss_implementation=implementation,
            per_device_train_batch_size=STREAMS,
            gradient_accumulation_steps=accumulate,
            max_steps=-1,
            num_train_epochs=2,
            remove_unused_columns=False,
            logging_steps=1,
        )
        runs.append(
            BornAgainLMTrainer(
                lstm(1),
                args,
                teacher=None if objective == "label" else lstm(2, units=6),
                data_collator=collate_windows,
                train_dataset=TokenStreams(tokens, STREAMS, WINDOW, before=0),
            )
        )
        runs[-1].train()
    assert_same(*runs)


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path):
    changes = {"objective": "dkpp", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(tmp_path, "chunked", **changes)
    resumed = trained(tmp_path, "chunked", resume=str(tmp_path / "checkpoint-2"), **changes)
    assert weights(resumed).equal(weights(whole))


def test_under_autocast(tmp_path):
    def build(seed):
        return language_model(seed).float()

    for objective in ("ban+l", "cwtm"):
        ours, full = (
            trained(tmp_path, implementation, build, objective=objective, bf16=True)
            for implementation in ("chunked", "full")
        )
        assert ours._chunked is True
        torch.testing.assert_close(weights(ours), weights(full), rtol=0, atol=5e-3)


def test_the_teacher_of_cwtm_is_called_once_a_batch(tmp_path):
    for accumulate in (1, 2):
        teacher = language_model(2)
        asked = []
        teacher.register_forward_hook(lambda *_: asked.append(1))  # noqa: B023
        trained(
            tmp_path,
            "chunked",
            teacher=teacher,
            objective="cwtm",
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
        )
        found_out = 2  # the two calls that find out how it ends
        assert len(asked) == found_out + accumulate


def soft_capped(seed: int) -> Gemma2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = Gemma2Config(vocab_size=23, final_logit_softcapping=0.05, pad_token_id=0, **sizes, **heads)
    return Gemma2ForCausalLM(config).double()


REASONS = {
    "soft cap": (soft_capped, None, "the student's logits are not the output of its output layer"),
    "soft cap of the teacher": (
        llama,
        lambda: soft_capped(2),
        "the teacher's logits are not the output of its output layer",
    ),
    "several teachers": (
        language_model,
        lambda: [language_model(2), language_model(3)],
        "the mean probabilities of several teachers",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_chunked_falls_back_and_is_refused_when_asked_for(tmp_path, case, caplog, monkeypatch):
    monkeypatch.setattr(step_loss, "CHUNKED_FROM", 1)
    build, teacher, reason = REASONS[case]
    with caplog.at_level(logging.INFO, LOGGER):
        fallen = trained(tmp_path, "auto", build, None if teacher is None else teacher())
    full = trained(tmp_path, "full", build, None if teacher is None else teacher())
    assert fallen._chunked is False and weights(fallen).equal(weights(full))
    (line,) = [record.message for record in caplog.records if record.name == LOGGER]
    assert f"full, since {reason}" in line
    with pytest.raises(ValueError, match=f"loss_implementation: got 'chunked', but {reason}.* expected 'auto'"):
        trained(tmp_path, "chunked", build, None if teacher is None else teacher())


def test_networks_without_an_output_layer_and_compiled_ones(tmp_path, monkeypatch):
    args = arguments(tmp_path, loss_implementation="chunked")
    trainer = BornAgainTrainer(Network(1), args, train_dataset=vectors(8), teacher=Network(2))
    with pytest.raises(ValueError, match="but the student has no output layer that is a plain nn.Linear"):
        trainer.train()
    trainer = BornAgainTrainer(
        language_model(1), args, train_dataset=sentences("next", rows=8), teacher=language_model(2)
    )
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator.state.dynamo_plugin, "backend", DynamoBackend.EAGER)
        with pytest.raises(ValueError, match="but a compiled network cannot skip its output layer"):
            trainer._choose_loss_implementation({})
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="but FSDP or DeepSpeed keep the output layer in pieces"):
        trainer._choose_loss_implementation({})


def test_the_implementation_follows_the_number_of_logits_and_is_logged_once(tmp_path, caplog, monkeypatch):
    assert trained(tmp_path, "auto")._chunked is False
    monkeypatch.setattr(step_loss, "CHUNKED_FROM", 8 * 10 * 23)
    caplog.clear()
    with caplog.at_level(logging.INFO, LOGGER):
        assert trained(tmp_path, "auto")._chunked is True
    lines = [record.message for record in caplog.records if record.name == LOGGER]
    assert lines == ["Loss implementation: chunked, logits of some rows at a time."]
    monkeypatch.setattr(step_loss, "CHUNKED_FROM", 8 * 10 * 23 + 1)
    with caplog.at_level(logging.INFO, LOGGER):
        trained(tmp_path, "auto")
    assert caplog.records[-1].message.endswith("full, since a batch has 1,840 logits, fewer than 1,841.")


def test_every_training_chooses_anew_and_evaluation_sees_logits(tmp_path):
    seen = []

    class Remember(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(trainer._chunked)

    trainer = trained(tmp_path, "chunked")
    trainer.add_callback(Remember())
    trainer.args.loss_implementation = "full"
    trainer.train()
    assert seen == [False] * 3
    trainer.args.loss_implementation = "chunked"
    trainer.train()
    assert trainer.predict(sentences("next", rows=4)).predictions.shape == (4, 10, 23)


def test_an_unknown_implementation_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="loss_implementation: got 'chunk', expected one of .*; did you mean 'chunked'"
    ):
        arguments(tmp_path, loss_implementation="chunk")


def test_the_old_name_of_the_argument_still_works(tmp_path):
    with pytest.warns(FutureWarning, match="loss_form is deprecated: use loss_implementation='full'"):
        args = arguments(tmp_path, loss_form="plain")
    assert args.weight_affecting()["loss_implementation"] == "full" and "loss_form" not in args.weight_affecting()
    with (
        pytest.warns(FutureWarning),
        pytest.raises(ValueError, match="loss_form: got 'full' beside loss_implementation 'chunked'"),
    ):
        arguments(tmp_path, loss_form="plain", loss_implementation="chunked")
