"""The LSTM language model: windows, dropout, tying, labels, transformers' own machinery."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss

from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LockedDropout, LstmLayer, LstmLMForCausalLM

WORDS, ROWS, TIME = 11, 3, 10


def _model(seed: int = 0, **config) -> LstmLMForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "hidden_size": 6, "initializer_range": 1.0}
    return LstmLMForCausalLM(LstmLMConfig(**{**sizes, **config})).double().eval()


def _ids(rows: int = ROWS, time: int = TIME) -> torch.Tensor:
    return torch.randint(WORDS, (rows, time), generator=torch.Generator().manual_seed(1))


def _labels() -> torch.Tensor:
    labels = torch.randint(WORDS, (ROWS, TIME), generator=torch.Generator().manual_seed(2))
    labels[0, :4] = labels[2, 5] = -100
    return labels


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# ---- windows ----


@pytest.mark.parametrize("window", [1, 3, 4, 9, TIME])
@pytest.mark.parametrize("config", [{}, {"num_layers": 1}, {"num_layers": 3, "embedding_size": 4}], ids=str)
def test_windows_with_their_state_are_the_whole_text(window, config):
    model, ids, labels = _model(**config), _ids(), _labels()
    whole = model(ids, labels=labels)
    state, logits, total = None, [], 0.0
    for start in range(0, TIME, window):  # the last one may be shorter
        part = labels[:, start : start + window]
        out = model(ids[:, start : start + window], state=state, labels=part, num_items_in_batch=1)
        state, total = out.state, total + out.loss
        logits.append(out.logits)
    _close(torch.cat(logits, dim=1), whole.logits)
    _close(total / labels.ne(-100).sum(), whole.loss)
    for found, expected in zip(state, whole.state, strict=True):
        _close(found, expected)


def test_state_changes_what_follows_and_has_the_documented_shapes():
    model = _model(embedding_size=4)
    first = model(_ids())
    assert [tuple(part.shape) for part in first.state] == [(ROWS, 6), (ROWS, 6), (ROWS, 4), (ROWS, 4)]
    assert not torch.allclose(model(_ids(), state=first.state).logits, first.logits)


def test_gradient_flows_through_the_time_of_a_window_and_stops_at_a_detached_state():
    model, kept = _model(), []
    model.embeddings.register_forward_hook(lambda _, args, out: (out.retain_grad(), kept.append(out))[0])
    first = model(_ids())
    first.logits[:, -1].sum().backward(retain_graph=True)
    assert (kept[0].grad.abs().sum(-1) > 0).all()
    kept[0].grad = None
    model(_ids(), state=tuple(part.detach() for part in first.state)).logits[:, -1].sum().backward()
    assert kept[0].grad is None and (kept[1].grad.abs().sum(-1) > 0).all()


def test_state_of_another_dtype_is_read():
    model = _model().float()
    with torch.autocast("cpu", torch.bfloat16):
        state = model(_ids()).state
    assert state[0].dtype == torch.bfloat16
    assert model(_ids(), state=state).logits.dtype == torch.float32


# ---- dropout ----


def _through(model, module: nn.Module, runs: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What went in and came out of a module; ones go in, so that the mask comes out."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),)),
        module.register_forward_hook(lambda _, args, out: seen.append((args[0], out))),
    ]
    for _ in range(runs):
        model(_ids(time=50))
    for hook in hooks:
        hook.remove()
    return seen


def test_dropout_is_at_every_connection_that_is_not_recurrent_and_only_in_training():
    model = _model(dropout=0.5, num_layers=3).train()
    seen = _through(model, model.stack.dropout)
    assert len(seen) == 4  # embeddings, between layers twice, outputs
    for _, mask in seen:
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < mask.eq(0).double().mean() < 0.6
        assert not torch.equal(mask[:, 0], mask[:, 1])
    assert not torch.equal(model(_ids()).logits, model(_ids()).logits)
    plain = _model(num_layers=3)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(_ids()).logits, plain(_ids()).logits)
    assert torch.equal(plain.train()(_ids()).logits, plain.eval()(_ids()).logits)


@pytest.mark.parametrize(
    ("rate", "module", "calls"),
    [
        ("locked_dropout_embeddings", "locked_embeddings", 1),
        ("locked_dropout_states", "locked_states", 2),
        ("locked_dropout_outputs", "locked_outputs", 1),
    ],
)
def test_locked_dropout_has_one_mask_for_a_row_and_window(rate, module, calls):
    model = _model(num_layers=3, hidden_size=40, **{rate: 0.5}).train()
    seen = [mask for _, mask in _through(model, getattr(model.stack, module), runs=2)]
    assert len(seen) == 2 * calls
    for mask in seen:
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(mask, mask[:, :1].expand_as(mask))
        assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(seen[0], seen[calls])  # a new one for the next window
    others = {"locked_embeddings", "locked_states", "locked_outputs"} - {module}
    assert all(torch.equal(a, b) for name in others for a, b in _through(model, getattr(model.stack, name)))
    model.eval()
    assert all(torch.equal(a, b) for a, b in _through(model, getattr(model.stack, module)))


def test_locked_dropout_keeps_dtype_and_gradient():
    x = torch.ones(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    out = LockedDropout(0.5)(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(x.grad, out.detach())


def _layer(dropconnect: float) -> tuple[LstmLayer, nn.LSTM, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    layer = LstmLayer(5, 6, dropconnect).double()
    plain = nn.LSTM(5, 6, batch_first=True).double()
    plain.load_state_dict(layer.state_dict())
    return layer, plain, torch.randn(ROWS, TIME, 5).double(), tuple(torch.randn(2, ROWS, 6).double())


@pytest.mark.parametrize(("dropconnect", "training"), [(0.0, True), (0.0, False), (0.5, False)])
def test_layer_without_dropconnect_is_torchs_to_the_bit(dropconnect, training):
    assert LstmLayer(2, 2).dropconnect == 0
    layer, plain, x, state = _layer(dropconnect)
    out, (h, c) = layer.train(training)(x, state)
    expected, (expected_h, expected_c) = plain(x, (state[0][None], state[1][None]))
    assert torch.equal(out, expected)
    assert torch.equal(h, expected_h[0]) and torch.equal(c, expected_c[0])


def test_dropconnect_drops_recurrent_weights_once_for_a_call_and_trains_them():
    layer, plain, x, state = _layer(0.5)
    before = layer.weight_hh_l0.clone()
    set_seed(5)
    dropped = F.dropout(layer.weight_hh_l0.detach(), 0.5)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(dropped)
    expected, (expected_h, _) = plain(x, (state[0][None], state[1][None]))
    set_seed(5)
    out, (h, _) = layer.train()(x, state)
    _close(out, expected)
    _close(h, expected_h[0])
    assert not torch.equal(layer(x, state)[0], out)  # drawn anew for the next window
    assert torch.equal(layer.weight_hh_l0, before)
    out.sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad == 0, dropped == 0)
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_rates_of_the_config_reach_every_layer():
    model = _model(recurrent_dropconnect=0.25, num_layers=3)
    assert [layer.dropconnect for layer in model.stack.layers] == [0.25] * 3
    assert [layer.dropconnect for layer in _model().stack.layers] == [0, 0]
    assert not torch.equal(model.train()(_ids()).logits, model(_ids()).logits)


# ---- weights ----


@pytest.mark.parametrize(
    ("units", "parameters"), [(200, 2_653_200), (650, 13_280_400), (1500, 51_034_000)], ids=["small", "650", "1500"]
)
def test_parameters(units, parameters):
    with torch.device("meta"):
        model = LstmLMForCausalLM(LstmLMConfig(vocab_size=10_000, hidden_size=units))
    assert model.num_parameters() == parameters


def test_first_weights_follow_from_the_seed_and_lie_in_their_ranges():
    config = LstmLMConfig(vocab_size=500, hidden_size=25, embedding_size=20, tie_word_embeddings=False)
    models = []
    for seed in (3, 3, 4):
        set_seed(seed)
        models.append(LstmLMForCausalLM(config))
    same, other = ([torch.equal(a, b) for a, b in _pairs(models[0], model)] for model in models[1:])
    assert all(same)
    assert [name for name, equal in zip(models[0].state_dict(), other, strict=True) if equal] == ["decoder.bias"]
    for name, weight in models[0].named_parameters():
        bound = 0.2 if "stack" in name else 0.1
        if name == "decoder.bias":
            assert not weight.any()
        else:
            assert weight.abs().max() <= bound and weight.max() > 0.9 * bound and weight.min() < -0.9 * bound


def _pairs(one: nn.Module, other: nn.Module):
    return zip(one.state_dict().values(), other.state_dict().values(), strict=True)


@pytest.mark.parametrize("embedding_size", [None, 4])
def test_tied_weights_are_declared_and_one(embedding_size):
    model = _model(embedding_size=embedding_size)
    assert model.decoder.weight is model.embeddings.weight
    assert model.all_tied_weights_keys == {"decoder.weight": "embeddings.weight"}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    last = embedding_size or 6
    assert model.stack.sizes == [6, last] and model.stack.layers[1].hidden_size == last
    model(_ids(), labels=_labels()).loss.backward()
    assert model.embeddings.weight.grad.shape == (WORDS, last)


def test_untied_weights_are_two(tmp_path):
    model = _model(embedding_size=4, tie_word_embeddings=False)
    assert model.decoder.weight.shape == (WORDS, 6) and model.embeddings.weight.shape == (WORDS, 4)
    model.save_pretrained(tmp_path)
    assert {"decoder.weight", "embeddings.weight"} <= set(load_file(tmp_path / "model.safetensors"))
    loaded = LstmLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in _pairs(model, loaded))
    assert torch.equal(loaded(_ids()).logits, model(_ids()).logits)


def test_words_can_be_added():
    model = _model()
    model.resize_token_embeddings(WORDS + 2)
    assert model.config.vocab_size == WORDS + 2 and model.decoder.weight is model.embeddings.weight
    assert model(_ids()).logits.shape == (ROWS, TIME, WORDS + 2)


def test_tied_weights_are_stored_once_and_are_one_again(tmp_path):
    model = _model(embedding_size=4)
    model.save_pretrained(tmp_path)
    assert len({"decoder.weight", "embeddings.weight"} & set(load_file(tmp_path / "model.safetensors"))) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for again in (loaded, AutoModelForCausalLM.from_config(model.config)):
        assert again.decoder.weight is again.embeddings.weight
    _close(loaded(_ids()).logits, model(_ids()).logits)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_the_model(again):
    model = _model(recurrent_dropconnect=0.3)
    copied = again(model)
    assert copied.decoder.weight is copied.embeddings.weight
    assert copied.decoder.weight is not model.decoder.weight
    assert torch.equal(copied(_ids()).logits, model(_ids()).logits)


# ---- labels ----


def test_labels_are_what_each_position_must_predict():
    model, labels = _model(), _labels()
    out = model(_ids(), labels=labels)
    rows = out.logits.log_softmax(-1).flatten(0, 1)
    kept = [(row, label) for row, label in zip(rows, labels.flatten().tolist(), strict=True) if label != -100]
    assert len(kept) == ROWS * TIME - 5
    _close(out.loss, -sum(row[label] for row, label in kept) / len(kept))
    _close(model(_ids(), labels=labels, num_items_in_batch=7).loss, out.loss * len(kept) / 7)
    _close(model(_ids(), labels=labels, num_items_in_batch=torch.tensor(7)).loss, out.loss * len(kept) / 7)


@pytest.mark.parametrize("items", [None, 7])
def test_shifted_labels_are_those_of_transformers(items):
    by_config, by_argument, labels = _model(shift_labels=True), _model(), _labels()
    found = by_config(_ids(), labels=labels, num_items_in_batch=items)
    expected = ForCausalLMLoss(found.logits, labels, WORDS, num_items_in_batch=items)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6, check_dtype=False)  # theirs is float32
    again = by_argument(_ids(), labels=labels, num_items_in_batch=items, shift_labels=True)
    assert torch.equal(again.loss, found.loss)
    plain = by_config(_ids(), labels=labels, num_items_in_batch=items, shift_labels=False)
    assert torch.equal(plain.loss, by_argument(_ids(), labels=labels, num_items_in_batch=items).loss)


def test_labels_that_are_all_ignored_give_zero():
    loss = _model()(_ids(), labels=torch.full((ROWS, TIME), -100)).loss
    loss.backward()
    assert loss == 0


def test_loss_of_a_model_in_half_precision_is_float32():
    assert _model().bfloat16()(_ids(), labels=_labels()).loss.dtype == torch.float32


def test_output_as_a_tuple():
    out = _model()(_ids(), labels=_labels())
    loss, logits, state = _model()(_ids(), labels=_labels(), return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits) and len(state) == 4
    assert len(_model()(_ids(), return_dict=False)) == 2


# ---- what is refused ----


def test_padding_on_the_right_changes_nothing_before_it():
    model, mask = _model(), torch.ones(ROWS, TIME, dtype=torch.int64)
    mask[1, 6:] = 0
    labels = _labels().masked_fill(mask == 0, -100)
    found = model(_ids() * mask, attention_mask=mask, labels=labels)
    expected = model(_ids(), labels=labels)
    _close(found.logits[mask == 1], expected.logits[mask == 1])
    _close(found.loss, expected.loss)


def test_padding_on_the_left_is_refused():
    mask = torch.ones(ROWS, TIME, dtype=torch.int64)
    mask[1, :2] = 0
    with pytest.raises(ValueError, match="attention_mask: got padding on the left, expected it on the right.*'right'"):
        _model()(_ids(), attention_mask=mask)


def test_input_without_a_batch_is_refused():
    with pytest.raises(
        ValueError, match=r"input_ids: got shape \(10,\), expected \(batch, time\); .*input_ids\[None\]"
    ):
        _model()(_ids()[0])


@pytest.mark.parametrize(
    "change",
    [lambda state: state[:2], lambda state: tuple(part[:1] for part in state), lambda state: state[::-1]],
    ids=["layers", "rows", "order"],
)
def test_state_that_does_not_fit_is_refused(change):
    model = _model(embedding_size=4)
    with pytest.raises(ValueError, match=r"state: got shapes \[.*\], expected \[\(3, 6\), \(3, 6\), \(3, 4\), "):
        model(_ids(), state=change(model(_ids()).state))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "embedding_size", "num_layers"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_config_refuses_a_size(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected a whole number of 1 or more"):
        LstmLMConfig(**{name: value})


@pytest.mark.parametrize(
    "name",
    [
        "dropout",
        "locked_dropout_embeddings",
        "locked_dropout_states",
        "locked_dropout_outputs",
        "recurrent_dropconnect",
    ],
)
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_config_refuses_a_probability(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected a probability of 0 to below 1"):
        LstmLMConfig(**{name: value})


def test_config_comes_back_from_its_file(tmp_path):
    config = LstmLMConfig(
        vocab_size=7, hidden_size=5, embedding_size=3, dropout=0.1, locked_dropout_states=0.2, shift_labels=True
    )
    config.save_pretrained(tmp_path)
    again = LstmLMConfig.from_pretrained(tmp_path)
    assert again.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
    assert (again.embedding_size, again.shift_labels, again.num_hidden_layers) == (3, True, 2)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "lstm_lm" and written["recurrent_dropconnect"] == 0
    assert LstmLMConfig(hidden_size=9).embedding_size == 9
