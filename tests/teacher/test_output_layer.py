"""A language model without its output layer."""

import pytest
import torch
from helpers import Network, language_model, llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from born_again import LstmLMConfig, LstmLMForCausalLM
from born_again.teacher.output_layer import ends_in_output_layer, output_layer, without_output_layer

IDS = torch.arange(20).reshape(2, 10)


def lstm() -> LstmLMForCausalLM:
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=23, embedding_size=8, hidden_size=8, dropout=0.5))


def soft_capped(cap: float | None) -> Gemma2ForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=23, final_logit_softcapping=cap, **sizes, **heads))


@pytest.mark.parametrize("make", [lambda: language_model(0), lambda: llama(0), lstm, lambda: soft_capped(None)])
def test_the_layer_applied_to_what_it_would_have_been_given_gives_the_logits(make):
    model = make().eval()
    logits = model(input_ids=IDS).logits
    with without_output_layer(model) as layer:
        hidden = model(input_ids=IDS).logits
    assert hidden.shape == (2, 10, layer.in_features)
    assert torch.equal(layer(hidden), logits)
    assert torch.equal(model(input_ids=IDS).logits, logits)  # it is back
    assert ends_in_output_layer(model, {"input_ids": IDS})


def test_a_gradient_reaches_hidden_states_and_layer():
    model = language_model(0)
    model(input_ids=IDS).logits.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with without_output_layer(model) as layer:
        hidden = model(input_ids=IDS).logits
    layer(hidden).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


def test_a_soft_cap_behind_the_layer_is_noticed():
    assert not ends_in_output_layer(soft_capped(0.01), {"input_ids": IDS})


def test_the_layer_is_put_back_after_an_error():
    model = language_model(0)
    with pytest.raises(RuntimeError, match="in between"), without_output_layer(model):
        raise RuntimeError("in between")
    assert "forward" not in vars(output_layer(model))


def test_looking_changes_neither_mode_nor_random_numbers():
    model = lstm().train()
    model.stack.dropout.eval()
    before = torch.get_rng_state()
    assert ends_in_output_layer(model, {"input_ids": IDS})
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.stack.dropout.training


def test_networks_without_such_a_layer():
    assert output_layer(Network(0)) is None
    assert not ends_in_output_layer(Network(0), {"x": torch.zeros(2, 5, dtype=torch.float64)})
