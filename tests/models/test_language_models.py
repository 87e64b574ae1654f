"""Language models by name or from a configuration, untrained, and back from their folder."""

import json
import pickle
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)

from born_again.models.char_cnn_lstm import CharCnnLstmForCausalLM
from born_again.models.language_configs import CharCnnLstmConfig, LstmLMConfig
from born_again.models.language_models import (
    CONFIGURATIONS,
    check_language_model,
    create_language_model,
    load_language_model,
)
from born_again.models.lstm_lm import LstmLMForCausalLM

WORDS = ["the", "cat", "<eos>", "sat", "on", "a", "mat", "<unk>", "N", "of"]
EOS = WORDS.index("<eos>")
GPT2 = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CHAR = {"hidden_size": 8, "filter_widths": [1, 2], "filter_counts": [3, 4], "character_embedding_size": 5}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def _gpt2(seed: int = 5) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, **GPT2))


def _tiny(name: str, folder, seed: int = 0, **model_args) -> PreTrainedModel:
    """A network of one of the three kinds, small."""
    if name == "gpt2":
        _gpt2().config.save_pretrained(folder / "gpt2")
        name = str(folder / "gpt2")
    torch.manual_seed(seed)
    return create_language_model(name, WORDS, **({**CHAR} if name == "char-cnn-lstm" else {}), **model_args)


KINDS = ["test-lstm", "char-cnn-lstm", "gpt2"]


def _ids(words: int = len(WORDS)) -> torch.Tensor:
    return torch.randint(words, (2, 6), generator=torch.Generator().manual_seed(1))


def _same_weights(one: PreTrainedModel, other: PreTrainedModel) -> list[bool]:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    return [torch.equal(ours[name], theirs[name]) for name in ours]


# ---- by name ----


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_name_is_a_model_of_the_words(name):
    check_language_model(name)
    with torch.device("meta"):
        model = create_language_model(name, WORDS)
    assert isinstance(model, PreTrainedModel) and model.training
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == len(WORDS)
    assert model.config.eos_token_id == model.config.bos_token_id == EOS
    assert model.generation_config.eos_token_id == EOS
    for key, value in CONFIGURATIONS[name].items():
        assert getattr(model.config, key) == value


@pytest.mark.parametrize(
    ("name", "parameters"), [("lstm-small", 2_653_200), ("lstm-medium", 13_280_400), ("lstm-large", 51_034_000)]
)
def test_parameters_at_the_words_of_penn_treebank(name, parameters):
    with torch.device("meta"):
        assert create_language_model(name, [str(number) for number in range(10_000)]).num_parameters() == parameters


def test_gpt2_small_is_gpt2_but_for_its_words():
    with torch.device("meta"):
        model = create_language_model("gpt2-small", WORDS)
        own = GPT2LMHeadModel(GPT2Config())
    assert type(model) is GPT2LMHeadModel and model.config.pad_token_id is None
    assert own.num_parameters() - model.num_parameters() == (50_257 - len(WORDS)) * 768


def test_an_end_that_is_no_word_leaves_no_special_id_of_another_vocabulary():
    for name in ("gpt2-small", "test-lstm"):
        with torch.device("meta"):
            config = create_language_model(name, WORDS, end="</s>").config
        assert config.bos_token_id is config.eos_token_id is config.pad_token_id is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_the_weights(kind, tmp_path):
    first = _tiny(kind, tmp_path, seed=3)
    torch.rand(100)
    same, other = _same_weights(first, _tiny(kind, tmp_path, seed=3)), _same_weights(first, _tiny(kind, tmp_path, 4))
    assert all(same) and not all(other)


def test_weights_are_those_of_the_class_itself():
    torch.manual_seed(3)
    expected = LstmLMForCausalLM(LstmLMConfig(vocab_size=len(WORDS), **CONFIGURATIONS["test-lstm"]))
    torch.manual_seed(3)
    assert all(_same_weights(create_language_model("test-lstm", WORDS), expected))


# ---- from a configuration ----


def test_a_folder_gives_its_configuration_and_not_its_weights(tmp_path):
    """Nor their precision: the weights of the folder are of bfloat16."""
    _gpt2().bfloat16().save_pretrained(tmp_path)
    check_language_model(str(tmp_path))
    torch.manual_seed(3)
    model = create_language_model(str(tmp_path), WORDS)
    torch.manual_seed(3)
    expected = GPT2LMHeadModel(GPT2Config(**{**GPT2, "vocab_size": len(WORDS)}))
    assert all(_same_weights(model, expected))
    assert model.dtype == torch.float32 and model.config.eos_token_id == EOS and not model.name_or_path
    block = load_file(tmp_path / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].float()
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight, block)


@pytest.mark.parametrize("kind", ["test-lstm", "char-cnn-lstm"])
def test_a_generation_folder_gives_a_model_of_other_words(kind, tmp_path):
    first = _tiny(kind, tmp_path, locked_dropout_states=0.25)
    first.save_pretrained(tmp_path)
    words = ["<eos>", "zebra", "questionable"]
    model = create_language_model(str(tmp_path), words)
    assert type(model) is type(first) and model.config.locked_dropout_states == 0.25
    assert model.config.hidden_size == first.config.hidden_size and model.config.eos_token_id == 0
    assert model(_ids(3)).logits.shape == (2, 6, 3)
    if kind == "char-cnn-lstm":
        expected = CharCnnLstmForCausalLM.from_words(words, **CHAR)
        assert torch.equal(model.characters, expected.characters) and model.config.alphabet == expected.config.alphabet


def test_the_end_of_a_sentence_is_trained_where_padding_would_not_be(tmp_path):
    LlamaConfig(vocab_size=23, pad_token_id=3, **SIZES).save_pretrained(tmp_path)
    model = create_language_model(str(tmp_path), WORDS)
    model(torch.full((1, 3), EOS)).logits.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[EOS].any()


def test_an_encoder_is_made_causal(tmp_path):
    BertConfig(vocab_size=23, **SIZES).save_pretrained(tmp_path)
    model = create_language_model(str(tmp_path), WORDS).eval()
    ids = _ids()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % len(WORDS)
    found, other = model(ids).logits, model(changed).logits
    assert torch.equal(found[:, :-1], other[:, :-1]) and not torch.equal(found[:, -1], other[:, -1])


def test_of_a_model_that_sees_too_the_language_model_is_taken(tmp_path):
    text = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 23}
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = create_language_model(str(tmp_path), WORDS)
    assert model.get_output_embeddings().weight.shape == (len(WORDS), 16)
    assert not any("vision" in name for name, _ in model.named_parameters())


# ---- model_args ----


@pytest.mark.parametrize("config", [LstmLMConfig, CharCnnLstmConfig, GPT2Config])
def test_every_field_of_a_configuration_may_be_given_and_no_method(config):
    name = {LstmLMConfig: "test-lstm", CharCnnLstmConfig: "char-cnn-lstm", GPT2Config: "gpt2-small"}[config]
    words = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
    spelling = {"character_vocab_size", "max_word_length", "alphabet"}
    not_fields = {"_name_or_path", "model_type", "output_attentions", "transformers_version"}
    with torch.device("meta"):
        for field, value in config().to_dict().items():
            if field not in words | spelling | not_fields:
                assert getattr(create_language_model(name, WORDS, **{field: value}).config, field) == value
    for method in ("to_dict", "save_pretrained", "attribute_map"):
        with pytest.raises(ValueError, match=f"model_args: got '{method}', which the configuration of"):
            create_language_model(name, WORDS, **{method: 1})


def test_a_name_that_transformers_maps_sets_what_it_maps_to():
    with torch.device("meta"):
        assert len(create_language_model("test-lstm", WORDS, num_hidden_layers=3).stack.layers) == 3
        model = create_language_model("gpt2-small", WORDS, num_hidden_layers=2, hidden_size=24)
    assert len(model.transformer.h) == 2 and model.config.n_embd == 24


def test_a_hidden_size_that_is_given_sizes_the_words_too():
    with torch.device("meta"):
        assert create_language_model("lstm-small", WORDS, hidden_size=7).config.embedding_size == 7


@pytest.mark.parametrize(
    ("name", "model_args", "message"),
    [
        ("test-lstm", {"droput": 0.1}, "got 'droput', which the configuration of 'lstm_lm' does not .*mean 'dropout'"),
        ("gpt2-small", {"xyzzy": 0.1}, "got 'xyzzy', which the configuration of 'gpt2' does not have; see GPT2Config"),
        ("test-lstm", {"vocab_size": 5}, "got 'vocab_size', which follows from the vocabulary; leave it out"),
        ("gpt2-small", {"eos_token_id": 5}, "got 'eos_token_id', which follows from the vocabulary; leave it out"),
        ("char-cnn-lstm", {"pad_token_id": 5}, "got 'pad_token_id', which follows from the vocabulary; leave it out"),
        ("test-lstm", {"dropout": "much"}, "got {'dropout': 'much'}, expected what the configuration of 'lstm_lm'"),
        ("gpt2-small", {"n_layer": "two"}, "got {'n_layer': 'two'}, expected what the configuration of 'gpt2' takes"),
        ("char-cnn-lstm", {"dropout": "much"}, "got {'dropout': 'much'}, expected what .* 'char_cnn_lstm' takes"),
    ],
)
def test_refused_model_args(name, model_args, message):
    with pytest.raises(ValueError, match=f"model_args: {message}"):
        create_language_model(name, WORDS, **model_args)


def test_a_rate_out_of_range_is_refused_by_name_and_from_a_folder(tmp_path):
    LstmLMConfig(vocab_size=3, hidden_size=4).save_pretrained(tmp_path)
    for name in ("test-lstm", str(tmp_path)):
        with pytest.raises(ValueError, match="dropout: got 1.5, expected a probability"):
            create_language_model(name, WORDS, dropout=1.5)


# ---- refused names ----


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpt2-smal", "did you mean 'gpt2-small'"),
        ("lstm_small", "did you mean 'lstm-small'"),
        ("no-such/repository", "there are lstm-small, lstm-medium"),
        ("/no/such/folder", "there are lstm-small, lstm-medium"),
    ],
)
def test_an_unknown_name_is_refused_at_once(name, hint):
    start = time.perf_counter()
    for refuse in (check_language_model, lambda name: create_language_model(name, WORDS)):
        with pytest.raises(ValueError, match=f"model: got '{name}', expected a name of this package, or.*; {hint}"):
            refuse(name)
    assert time.perf_counter() - start < 5


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'vit', expected a causal language model, which AutoModelForCausalLM"):
        check_language_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json"),
        ("{", "is not a valid JSON file"),
        ('{"model_type": "lstm_lm", "hidden_size": 0}', "hidden_size: got 0, expected a whole number"),
        ('{"model_type": "gpt2", "n_layer": "two"}', "n_layer"),
    ],
)
def test_a_folder_whose_configuration_cannot_be_read_is_refused(config, message, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"(?s)model: got .*, expected a name of this package.*\(.*{message}"):
        check_language_model(str(tmp_path))


def test_code_beside_a_configuration_is_not_run(tmp_path, monkeypatch):
    config = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # Nobody is asked either.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for refuse in (check_language_model, load_language_model):
        with pytest.raises(ValueError, match="custom code"):
            refuse(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# ---- back from a folder ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back_to_the_bit(kind, tmp_path):
    model = _tiny(kind, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    before = torch.get_rng_state()
    loaded = load_language_model(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(model) and not loaded.training
    assert all(_same_weights(model, loaded))
    assert torch.equal(loaded(_ids()).logits, model.eval()(_ids()).logits)


def test_weights_in_half_precision_come_back_in_float32(tmp_path):
    model = _gpt2().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(_same_weights(model.float(), loaded))


def test_weights_in_several_files_come_back(tmp_path):
    model = _gpt2()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert all(_same_weights(model, load_language_model(tmp_path)))


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_never_loaded(tmp_path):
    model = _tiny("test-lstm", tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "ran")))
    assert all(_same_weights(model, load_language_model(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors, .*pytorch_model.bin\) are never loaded"):
        load_language_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_whole_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="path_or_repo: '.*nowhere' is not a folder, expected that of a gener"):
        load_language_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="path_or_repo: .* has no config.json, expected the folder of a gener"):
        load_language_model(tmp_path)
    start = time.perf_counter()
    with pytest.raises(OSError, match="couldn't connect"):
        load_language_model("no-such/repository")
    assert time.perf_counter() - start < 5


def test_a_folder_of_another_model_is_not_loaded(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="ViTConfig"):
        load_language_model(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    _tiny("test-lstm", tmp_path).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    bias = whole["decoder.bias"]
    for change, message in (
        ({"decoder.bias": None}, r"missing: \['decoder.bias'\], unexpected: \[\], of another shape: \[\]"),
        ({"extra": bias.clone()}, r"missing: \[\], unexpected: \['extra'\].*the first 5 of 0, 1 and 0"),
        ({"decoder.bias": bias[:3].clone()}, r"of another shape: \['decoder.bias \(3,\) for \(10,\)'\]"),
    ):
        weights = {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None}
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=f"path_or_repo: the weights of .* do not fit its config.json, .*{message}"
        ):
            load_language_model(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the weights of .* cannot be read .*expected a whole safetensors file; copy"):
        load_language_model(tmp_path)


def test_the_tied_matrix_is_one_after_loading(tmp_path):
    _tiny("test-lstm", tmp_path).save_pretrained(tmp_path)
    for model in (load_language_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_window_longer_than_the_positions_of_a_model_is_refused():
    check_language_model("gpt2-small", 1024)
    check_language_model("lstm-small", 100_000)
    with pytest.raises(ValueError, match="window: got 1025, expected at most the 1024 positions of 'gpt2-small'"):
        check_language_model("gpt2-small", 1025)
