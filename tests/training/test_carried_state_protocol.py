"""Which networks carry a state: those that say so, and not those with an argument of that name."""

import logging

import pytest
import torch
from helpers import WORDS, arguments, language_model, sentences
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM, Trainer
from windows import STREAMS, lstm, streams, trainer, weights

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.lineage.evaluation import evaluate_language_model
from born_again.models.char_cnn_lstm import CharCnnLstmForCausalLM
from born_again.teacher import carries_state


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def rwkv(seed: int) -> RwkvForCausalLM:
    """A language model whose forward takes a `state`: a list that it writes into."""
    torch.manual_seed(seed)
    config = RwkvConfig(
        vocab_size=WORDS,
        hidden_size=8,
        attention_hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        context_length=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return RwkvForCausalLM(config).double()


class Adapter(nn.Module):
    """As PEFT wraps a network: it takes anything and hands it on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_base_model(self):
        return self.inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, input_ids=None, **kwargs):
        return self.inner(input_ids=input_ids, **kwargs)


class PublishedBefore(nn.Module):
    """What the code beside weights was before networks said it themselves."""

    def __init__(self):
        super().__init__()
        self.inner = lstm(1)
        self.config = self.inner.config

    def forward(self, input_ids, attention_mask=None, state=None, labels=None):
        return self.inner(input_ids, state=state)


class Own(nn.Module):
    carries_state = True

    def forward(self, input_ids, state=None):
        raise NotImplementedError


class OwnUnsaid(nn.Module):
    def forward(self, input_ids, state=None):
        raise NotImplementedError


def test_networks_say_whether_they_carry_a_state():
    char_cnn = CharCnnLstmForCausalLM.from_words(
        ["a", "b"], hidden_size=4, filter_widths=[1], filter_counts=[2], highway_layers=1
    )
    carrying = [lstm(1), char_cnn, Adapter(lstm(1)), Own(), PublishedBefore(), Adapter(PublishedBefore())]
    for network in carrying:
        assert carries_state(network) and carries_state(torch.compile(network)), type(network)
    assert lstm(1).carries_state is char_cnn.carries_state is True  # also in the copies of their code beside weights
    for network in (rwkv(1), language_model(1), Adapter(rwkv(1)), OwnUnsaid(), nn.Linear(1, 1)):
        assert not carries_state(network) and not carries_state(torch.compile(network)), type(network)


@pytest.mark.parametrize("ours", [BornAgainTrainer, BornAgainLMTrainer])
def test_rwkv_is_trained_as_trainer_trains_it(tmp_path, ours):
    rows = sentences("next")

    def trained(kind):
        training = kind(rwkv(1), arguments(tmp_path, max_steps=3), train_dataset=rows, eval_dataset=rows)
        training.train()
        return training

    found, expected = trained(ours), trained(Trainer)
    moved = (weights(found.model) - weights(rwkv(1))).abs().max()
    apart = (weights(found.model) - weights(expected.model)).abs().max()
    # transformers' own loss and RWKV's recurrence are computed in float32.
    assert moved > 1e-2 and apart < 1e-4 * moved, (moved, apart)


def test_rwkv_reads_every_window_of_a_text_on_its_own_and_is_told_apart_aloud(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ours = trainer(tmp_path, rwkv(1), rwkv(2), num_train_epochs=1)
    said = [record.message for record in caplog.records if "takes a `state`" in record.message]
    assert len(said) == 2 and "RwkvForCausalLM" in said[0] and "carries_state = True" in said[0]
    ours.train()
    model = ours.model.eval()
    data, total = streams(seed=5), 0.0
    with torch.no_grad():
        for window in range(data.windows):
            batch = data.__getitems__(range(window * STREAMS, (window + 1) * STREAMS))
            logits = model(batch["input_ids"]).logits
            total += nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    expected = pytest.approx(total.item() / data.token_count, rel=1e-9)
    assert ours.evaluate()["eval_nll"] == expected
    assert evaluate_language_model(model, data)["nll"] == expected


def test_nothing_is_said_of_networks_that_say_it_themselves(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, lstm(1), lstm(2))
    assert "takes a `state`" not in caplog.text
