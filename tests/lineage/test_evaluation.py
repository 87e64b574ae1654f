"""A language model's evaluation is one forward over the text, however it is cut into windows."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import WORDS, language_model

from born_again.data.streams import TokenStreams
from born_again.lineage.evaluation import evaluate_language_model
from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM

TOKENS, BEFORE = 37, 3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def lstm(dropout: float = 0.0) -> LstmLMForCausalLM:
    torch.manual_seed(0)
    # Wide weights, so that a state that is lost shows.
    config = LstmLMConfig(vocab_size=WORDS, hidden_size=6, initializer_range=1.0, dropout=dropout)
    return LstmLMForCausalLM(config).double()


def text(count: int = TOKENS) -> torch.Tensor:
    return torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(1))


def streams(count: int, window: int, tokens: torch.Tensor | None = None) -> TokenStreams:
    return TokenStreams(text() if tokens is None else tokens, count, window, before=BEFORE)


@torch.no_grad()
def one_forward(model: torch.nn.Module, tokens: torch.Tensor, count: int) -> float:
    """Nats per token of every stream read whole, its first word predicted from the word before it."""
    length = -(-len(tokens) // count)
    inputs = torch.cat([torch.tensor([BEFORE]), tokens[:-1]])
    total = 0.0
    for start in range(0, len(tokens), length):
        part = slice(start, start + length)
        logits = copy.deepcopy(model).eval()(inputs[None, part]).logits[0]
        total += F.cross_entropy(logits, tokens[part], reduction="sum").item()
    return total / len(tokens)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("window", [1, 3, 7, 8])
def test_windows_with_a_carried_state_are_one_forward(count, window):
    """37 is no multiple of 2 or 5: the last stream ends in padding, which is no token."""
    found = evaluate_language_model(lstm(), streams(count, window))
    assert found.keys() == {"nll", "perplexity", "tokens"}
    assert found["nll"] == pytest.approx(one_forward(lstm(), text(), count), abs=1e-10)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]), rel=1e-12)
    assert found["tokens"] == TOKENS and type(found["tokens"]) is int


def test_streams_forget_what_another_stream_holds():
    """So one stream is the exact reading, and more are not the same."""
    nll = [evaluate_language_model(lstm(), streams(count, 7))["nll"] for count in (1, 2, 5)]
    assert abs(nll[0] - nll[1]) > 1e-4 and abs(nll[1] - nll[2]) > 1e-4


def test_a_model_without_a_state_sees_the_window_only():
    model = language_model(0)
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights than a new model's, so that the context tells
            parameter.mul_(5)
    nll = {}
    for window in (2, 5, 12):
        parts = TokenStreams(text(), 1, window, before=BEFORE)
        nll[window] = evaluate_language_model(model, parts)["nll"]
        total = 0.0
        with torch.no_grad():
            for item in parts:
                logits = model(item["input_ids"][None]).logits[0]
                total += F.cross_entropy(logits, item["labels"], reduction="sum").item()
        assert nll[window] == pytest.approx(total / TOKENS, abs=1e-10)
    assert abs(nll[2] - nll[5]) > 1e-4 and abs(nll[5] - nll[12]) > 1e-4


def test_one_window_of_a_model_without_a_state_is_one_forward():
    tokens = text(12)
    found = evaluate_language_model(language_model(0), streams(1, 12, tokens))
    assert found["nll"] == pytest.approx(one_forward(language_model(0), tokens, 1), abs=1e-10)


def test_ignored_labels_are_read_and_not_counted():
    data, whole = streams(1, 7), streams(1, 7)
    data._labels = data._labels.clone()
    data._labels[:, 5:20] = -100
    found = evaluate_language_model(lstm(), data)
    inputs = torch.cat([torch.tensor([BEFORE]), text()[:-1]])
    with torch.no_grad():
        logits = lstm().eval()(inputs[None]).logits[0]
    expected = F.cross_entropy(logits, data._labels[0], ignore_index=-100).item()
    assert found["tokens"] == TOKENS - 15 and found["nll"] == pytest.approx(expected, abs=1e-10)
    assert found["nll"] != evaluate_language_model(lstm(), whole)["nll"]


def test_dropout_is_off_and_nothing_of_the_training_changes():
    model = lstm(dropout=0.5).train()
    model(text()[None], labels=text()[None]).loss.backward()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random = torch.get_rng_state()
    found = evaluate_language_model(model, streams(2, 7))
    assert torch.equal(torch.get_rng_state(), random)
    assert found["nll"] == pytest.approx(one_forward(lstm(), text(), 2), abs=1e-10)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a.grad, b) for a, b in zip(model.parameters(), gradients, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_precision_is_that_of_the_weights():
    nll = evaluate_language_model(lstm(), streams(1, 7))["nll"]
    single = evaluate_language_model(lstm().float(), streams(1, 7))["nll"]
    assert single != nll and single == pytest.approx(nll, abs=1e-5)


def test_a_perplexity_that_overflows_is_infinite():
    model = lstm()
    with torch.no_grad():
        model.decoder.bias[int(text()[0])] = -1e6
    found = evaluate_language_model(model, streams(1, 7))
    assert found["perplexity"] == math.inf and 1000 < found["nll"] < math.inf
