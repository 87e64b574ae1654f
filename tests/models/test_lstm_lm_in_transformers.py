"""The LSTM language model in the hands of transformers: its Trainer, and generate()."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM

WORDS, ROWS, TIME = 11, 3, 10


def _model(seed: int = 0, **config) -> LstmLMForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "hidden_size": 6, "initializer_range": 1.0}
    return LstmLMForCausalLM(LstmLMConfig(**{**sizes, **config})).double().eval()


def _ids(rows: int = ROWS, time: int = TIME) -> torch.Tensor:
    return torch.randint(WORDS, (rows, time), generator=torch.Generator().manual_seed(1))


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# ---- Trainer ----


def _trainer(model, folder, rows, **changes) -> Trainer:
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{**settings, **changes},
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("shifts", [True, False])
def test_transformers_trainer_takes_a_step_with_every_label_counted_once(shifts, tmp_path):
    model = _model(shift_labels=shifts)
    plain = copy.deepcopy(model)
    ids, labels = _ids(rows=4), _ids(rows=4)
    labels[0, :7] = labels[3, 2:4] = -100  # so that both halves of the step count otherwise
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    trainer = _trainer(model, tmp_path, rows)
    assert model.loss_type == ("ForCausalLM" if shifts else None)
    trainer.train()
    plain(ids, labels=labels).loss.backward()
    for found, start in zip(model.parameters(), plain.parameters(), strict=True):
        _close(found.detach(), start.detach() - 0.5 * start.grad)


def test_transformers_trainer_evaluates(tmp_path):
    model, ids = _model(), _ids(rows=4)
    trainer = _trainer(model, tmp_path, [{"input_ids": row, "labels": row} for row in ids])
    assert trainer.label_names == ["labels"]
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape == (4, TIME, WORDS)  # the state is not a prediction
    assert found.metrics["test_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-6)
    assert model.config.keys_to_ignore_at_inference == ["state"]


# ---- generate() ----


def _talker(**config) -> LstmLMForCausalLM:
    """A model with weights so large that it does not say the same word for ever."""
    model = _model(hidden_size=16, initializer_range=3.0, tie_word_embeddings=False, **config)
    with torch.no_grad():
        for weight in model.stack.parameters():
            weight.mul_(8)
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_state_is_that_without(beams):
    model = _talker(num_layers=3)
    settings = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
    lengths = []
    model.stack.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    carried = model.generate(_ids(), **settings)
    assert lengths == [TIME] + [1] * 11
    assert torch.equal(carried, model.generate(_ids(), use_cache=False, **settings))
    assert torch.equal(carried[:, :TIME], _ids()) and len(carried[:, TIME:].unique()) > 2
    if beams == 1:
        text = _ids()
        for _ in range(12):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(carried, text)


def test_generation_samples():
    model = _model()
    torch.manual_seed(0)
    texts = model.generate(_ids(rows=1), do_sample=True, max_new_tokens=20, num_return_sequences=2)
    assert texts.shape == (2, TIME + 20) and not torch.equal(texts[0], texts[1])


def test_generation_goes_on_from_a_state():
    model, ids = _talker(), _ids()
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    state = model(ids[:, :6]).state
    found = model.generate(ids[:, 6:], state=state, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected[:, 6:])


def test_generation_refuses_what_it_would_read_wrongly():
    model, mask = _model(), torch.ones(ROWS, TIME, dtype=torch.int64)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="attention_mask: got padding, expected none.*prompts of one length"):
        model.generate(_ids(), attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="use_cache: got False with a state to start from, expected True"):
        model.generate(_ids(), state=model(_ids()).state, use_cache=False, max_new_tokens=2)
