"""The language model that reads characters: its table of words, its sizes, and that a file has all of it."""

import copy
import pickle
import string

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from born_again.models.char_cnn_lstm import CharCnnLstmForCausalLM, Highway, character_table
from born_again.models.language_configs import CharCnnLstmConfig

VOCABULARY = ["<unk>", "a", "cat", "the", "mathematics", "sat", "N", "it", "dog"]
SMALL = {
    "hidden_size": 6,
    "character_embedding_size": 4,
    "filter_widths": [1, 2, 5],
    "filter_counts": [3, 4, 5],
    "initializer_range": 0.5,
}
ROWS, TIME = 3, 8


def _model(seed: int = 0, **config) -> CharCnnLstmForCausalLM:
    torch.manual_seed(seed)
    return CharCnnLstmForCausalLM.from_words(VOCABULARY, **{**SMALL, **config}).double().eval()


def _unfilled(**config) -> CharCnnLstmForCausalLM:
    return CharCnnLstmForCausalLM(CharCnnLstmConfig(**{**_model().config.to_dict(), **config}))


def _ids(rows: int = ROWS, time: int = TIME) -> torch.Tensor:
    return torch.randint(len(VOCABULARY), (rows, time), generator=torch.Generator().manual_seed(1))


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# ---- the table ----


def test_table_spells_every_word():
    table, alphabet = character_table(["cab", "a", ""])
    assert alphabet == ["<padding>", "<start>", "<end>", "a", "b", "c"]
    assert table.dtype == torch.int64
    assert table.tolist() == [[1, 5, 3, 4, 2], [1, 3, 2, 0, 0], [1, 2, 0, 0, 0]]
    wider, same = character_table(["cab", "a", ""], max_word_length=7)
    assert same == alphabet and torch.equal(wider, F.pad(table, (0, 2)))


def test_word_that_is_too_long_is_refused():
    match = "words: 'mathematics' takes 13 places with its start and end, expected at most the max_word_length of 12; "
    with pytest.raises(ValueError, match=match + "give max_word_length=13"):
        character_table(VOCABULARY, max_word_length=12)
    with pytest.raises(ValueError, match=match):
        CharCnnLstmForCausalLM.from_words(VOCABULARY, max_word_length=12)


def test_sizes_follow_from_the_words():
    model = _model()
    table, alphabet = character_table(VOCABULARY)
    assert torch.equal(model.characters, table)
    config = model.config
    assert (config.vocab_size, config.character_vocab_size) == (9, len(alphabet))
    assert (config.max_word_length, config.alphabet) == (13, alphabet)
    assert CharCnnLstmForCausalLM.from_words(VOCABULARY, **SMALL, max_word_length=20).characters.shape == (9, 20)


def test_words_shorter_than_the_widest_filter():
    model = CharCnnLstmForCausalLM.from_words(["a", "b"], **{**SMALL, "filter_widths": [1, 2, 7]})
    assert model.characters.shape == (2, 7)
    assert model(torch.tensor([[0, 1]])).logits.isfinite().all()


def test_words_can_be_set_later():
    model, filled = _unfilled(), _model()
    with pytest.raises(RuntimeError, match=r"characters: got an empty table, .*model\.set_words\(words\).*from_words"):
        model(_ids())
    model.set_words(VOCABULARY)
    model.load_state_dict(filled.float().state_dict())
    assert torch.equal(model.eval()(_ids()).logits, filled(_ids()).logits)


def test_words_of_another_number_are_refused():
    with pytest.raises(ValueError, match="words: got 8, expected the 9 of config.vocab_size; .*from_words"):
        _unfilled().set_words(VOCABULARY[:-1])


def test_words_of_other_characters_are_refused():
    with pytest.raises(ValueError, match="words: got 19 characters .*, expected the 20 of .*character_vocab_size=19"):
        _unfilled(alphabet=None).set_words([word.replace("N", "a") for word in VOCABULARY])
    changed = [word.replace("N", "M") for word in VOCABULARY]
    with pytest.raises(ValueError, match="words: got the characters .*'M'.*, expected those of config.alphabet.*'N'"):
        _unfilled().set_words(changed)
    free = _unfilled(alphabet=None)
    free.set_words(changed)
    assert free.config.alphabet == character_table(changed)[1]


def test_table_is_looked_at_once():
    model, looks = _model(), []
    model._has_words = False
    table = model.characters

    class Table:
        def __getitem__(self, index):
            looks.append(index) if isinstance(index, tuple) else None
            return table[index]

    del model._buffers["characters"]
    model.characters = Table()
    model(_ids())
    model(_ids())
    assert len(looks) == 1


# ---- the network ----


def _plain_word(model: CharCnnLstmForCausalLM, word: int) -> torch.Tensor:
    """One word, filter by filter and place by place, as the paper writes it."""
    letters = model.cnn.embeddings.weight[model.characters[word]]  # (max_word_length, character_embedding_size)
    found = []
    for one in model.cnn.filters:
        (width,) = one.kernel_size
        for kernel, bias in zip(one.weight, one.bias, strict=True):  # (character_embedding_size, width)
            places = range(len(letters) - width + 1)
            found.append(max(torch.tanh((letters[at : at + width].T * kernel).sum() + bias) for at in places))
    y = torch.stack(found)
    for highway in model.cnn.highways:
        gate = torch.sigmoid(highway.gate.weight @ y + highway.gate.bias)
        y = gate * torch.relu(highway.transform.weight @ y + highway.transform.bias) + (1 - gate) * y
    return y


def test_words_are_those_of_the_formulas_and_computed_once_each():
    model, seen = _model(), []
    model.cnn.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    found = model.embed(_ids())
    assert seen == [len(_ids().unique())] and seen[0] < ROWS * TIME
    expected = torch.stack([torch.stack([_plain_word(model, word) for word in row]) for row in _ids().tolist()])
    _close(found, expected)


def test_gradients_are_those_of_every_word_apart():
    model = _model()
    plain = copy.deepcopy(model)
    model(_ids(), labels=_ids()).loss.backward()
    plain.embed = lambda ids: plain.cnn(plain.characters[ids.flatten()]).unflatten(0, ids.shape)
    plain(_ids(), labels=_ids()).loss.backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        _close(found.grad, expected.grad)
    assert not model.cnn.embeddings.weight.grad[0].any()  # padding
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("window", [1, 3, 5, TIME])
def test_windows_with_their_state_are_the_whole_text(window):
    model, ids = _model(), _ids()
    whole = model(ids, labels=ids)
    state, logits, total = None, [], 0.0
    for start in range(0, TIME, window):
        part = ids[:, start : start + window]
        out = model(part, state=state, labels=part, num_items_in_batch=1)
        state, total = out.state, total + out.loss
        logits.append(out.logits)
    _close(torch.cat(logits, dim=1), whole.logits)
    _close(total / ids.numel(), whole.loss)


def test_dropout_is_between_layers_and_at_the_outputs_but_not_before_the_lstm():
    model, read, seen = _model(num_layers=3).train(), [], []
    model.stack.layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model.stack.dropout.register_forward_hook(lambda _, args, out: seen.append(out))
    model(_ids())
    assert torch.equal(read[0], model.embed(_ids()))
    assert len(seen) == 3 and all(0 < out.eq(0).double().mean() < 1 for out in seen)
    assert CharCnnLstmConfig().dropout == 0.5
    seen.clear()
    assert torch.equal(model.eval()(_ids()).logits, model(_ids()).logits)
    assert not any(out.eq(0).any() for out in seen)


def _ptb_like() -> list[str]:
    """10,000 words of at most 19 characters, of 48 different ones."""
    characters = (string.ascii_letters + string.digits)[:48]
    words = [characters[i % 48] + characters[i // 48 % 48] + characters[i // 48 // 48] for i in range(9_999)]
    return [*words, "x" * 19]


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({}, 19_373_165),
        (
            {
                "hidden_size": 300,
                "filter_widths": [1, 2, 3, 4, 5, 6],
                "filter_counts": [25, 50, 75, 100, 125, 150],
                "highway_layers": 1,
            },
            5_312_515,
        ),
    ],
    ids=["large", "small"],
)
def test_parameters_of_the_paper(config, parameters):
    with torch.device("meta"):  # set_words fills nothing here
        model = CharCnnLstmForCausalLM.from_words(_ptb_like(), **config)
    assert model.num_parameters() == parameters
    assert model.characters.shape == (10_000, 21) and model.config.character_vocab_size == 51
    assert sum(model.config.filter_counts) == model.stack.layers[0].input_size
    large = CharCnnLstmConfig()
    assert (sum(large.filter_counts), large.vocab_size, large.max_word_length) == (1_100, 10_000, 21)


def test_first_weights_follow_from_the_seed_and_lie_in_their_range():
    models = []
    for seed in (3, 3, 4):
        set_seed(seed)
        models.append(CharCnnLstmForCausalLM.from_words(VOCABULARY, hidden_size=30))
    pairs = [list(zip(models[0].parameters(), other.parameters(), strict=True)) for other in models[1:]]
    assert all(torch.equal(a, b) for a, b in pairs[0])
    kept = [
        name for (name, a), (_, b) in zip(models[0].named_parameters(), pairs[1], strict=True) if torch.equal(a, b)
    ]
    assert kept == ["cnn.highways.0.gate.bias", "cnn.highways.1.gate.bias"]
    for name, weight in models[0].named_parameters():
        if name in kept:
            assert (weight == -2).all()
        else:
            assert weight.abs().max() <= 0.05 and weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.4), name
    assert not models[0].cnn.embeddings.weight[0].any()
    assert isinstance(models[0].cnn.highways[0], Highway)


# ---- saved, moved, copied ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_table_comes_back_from_the_folder(dtype, tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["characters"].dtype == torch.int64 and stored["decoder.weight"].dtype == torch.float64
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.characters.dtype == torch.int64 and torch.equal(loaded.characters, model.characters)
    assert loaded.dtype == dtype and loaded.config.alphabet == model.config.alphabet
    assert loaded(_ids()).logits.dtype == dtype
    if dtype == torch.float64:
        _close(loaded(_ids()).logits, model(_ids()).logits)


def test_folder_of_a_model_without_words_asks_for_them(tmp_path):
    _unfilled().save_pretrained(tmp_path)
    loaded = CharCnnLstmForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="characters: got an empty table"):
        loaded(_ids())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["characters"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = CharCnnLstmForCausalLM.from_pretrained(tmp_path)
    assert not loaded.characters.any()
    with pytest.raises(RuntimeError, match="characters: got an empty table"):
        loaded(_ids())


def test_table_stays_whole_numbers_where_the_model_changes_its_dtype():
    model = _model()
    for changed in (model.float(), model.double(), model.to(torch.bfloat16), model.to("meta")):
        assert changed.characters.dtype == torch.int64
    assert model.characters.device.type == "meta"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_the_model(again):
    copied = again(_model())
    assert copied._has_words and torch.equal(copied(_ids()).logits, _model()(_ids()).logits)


# ---- transformers' own machinery ----


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_state_is_that_without(beams):
    model = _model(initializer_range=3.0, hidden_size=16)
    with torch.no_grad():
        for weight in model.stack.parameters():
            weight.mul_(8)  # so that it does not say the same word for ever
    settings = {"max_new_tokens": 10, "num_beams": beams, "do_sample": False}
    carried = model.generate(_ids(), **settings)
    assert torch.equal(carried, model.generate(_ids(), use_cache=False, **settings))
    assert len(carried[:, TIME:].unique()) > 2


def test_transformers_trainer_takes_a_step(tmp_path):
    model = _model(dropout=0.0)
    plain = copy.deepcopy(model)
    ids, labels = _ids(rows=4), _ids(rows=4)
    labels[0, :5] = -100
    arguments = TrainingArguments(
        str(tmp_path),
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    Trainer(model, arguments, train_dataset=rows).train()
    plain(ids, labels=labels).loss.backward()
    for found, start in zip(model.parameters(), plain.parameters(), strict=True):
        _close(found.detach(), start.detach() - 0.5 * start.grad)
    assert torch.equal(model.characters, plain.characters)


# ---- the config ----


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0, expected a whole number of 1 or more"),
        ({"character_vocab_size": 0}, "character_vocab_size: got 0, expected a whole number of 1 or more"),
        ({"max_word_length": -1}, "max_word_length: got -1, expected a whole number of 1 or more"),
        ({"character_embedding_size": 0}, "character_embedding_size: got 0, expected a whole number of 1 or more"),
        ({"highway_layers": 0}, "highway_layers: got 0, expected a whole number of 1 or more"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected a probability of 0 to below 1"),
        ({"filter_widths": []}, r"filter_widths: got \[\], expected one or more whole numbers"),
        ({"filter_counts": [0, 2, 3]}, r"filter_counts: got \[0, 2, 3\], expected one or more whole numbers"),
        ({"filter_counts": [2, 3]}, r"filter_counts: got 2 numbers \[2, 3\], expected one for each of the 3 filter_w"),
        ({"max_word_length": 4}, "max_word_length: got 4, expected at least the widest of filter_widths, 5; raise it"),
        ({"alphabet": ["a", "b"]}, "alphabet: got 2 characters, expected the 51 of character_vocab_size; .*_table"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: got True, expected False, .*LstmLMConfig to tie"),
    ],
    ids=str,
)
def test_config_refuses(config, match):
    with pytest.raises(ValueError, match=match):
        CharCnnLstmConfig(**{**SMALL, **config})


def test_config_comes_back_from_its_file(tmp_path):
    config = _model(locked_dropout_states=0.25, shift_labels=True).config
    config.save_pretrained(tmp_path)
    again = CharCnnLstmConfig.from_pretrained(tmp_path)
    assert again.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
    assert again.filter_widths == [1, 2, 5] and again.model_type == "char_cnn_lstm"
    assert CharCnnLstmConfig().filter_widths == [1, 2, 3, 4, 5, 6, 7]


def test_outputs_are_a_linear_layer_of_their_own():
    model = _model()
    assert isinstance(model.get_output_embeddings(), nn.Linear) and not model.all_tied_weights_keys
