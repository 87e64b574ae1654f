"""Language models: created by name for a word-level vocabulary, and loaded from a folder or the Hub."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedModel

from born_again.models.language_configs import CharCnnLstmConfig, LstmLMConfig
from born_again.models.saved import check_index, check_settings, check_size, loading, read_settings

# Sizes of Zaremba et al. 2014 (arXiv 1409.2329); large with the paper's tied embeddings has 51.0 M parameters.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lstm-small": {"hidden_size": 200, "dropout": 0.2},
    "lstm-medium": {"hidden_size": 650, "dropout": 0.5},
    "lstm-large": {"hidden_size": 1500, "dropout": 0.65},
    "char-cnn-lstm": {},
    "gpt2-small": {},
    "test-lstm": {"hidden_size": 32, "dropout": 0.1},
}
_CONFIG_CLASSES: dict[str, type[PretrainedConfig]] = {"char-cnn-lstm": CharCnnLstmConfig, "gpt2-small": GPT2Config}

_VOCABULARY_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_CHARACTER_FIELDS = ("character_vocab_size", "max_word_length", "alphabet")
# Fields of a checkpoint, whose weights are not loaded; a student in its half precision would not train.
_CHECKPOINT_FIELDS = (
    "_name_or_path",
    "auto_map",
    "architectures",
    "dtype",
    "quantization_config",
    "transformers_version",
)


def create_language_model(name: str, words: Sequence[str], end: str = "<eos>", **model_args: Any) -> PreTrainedModel:
    """Creates an untrained causal language model for a word-level vocabulary.

    Args:
        name: one of `CONFIGURATIONS`, or a Hub repository or folder of any causal language model of transformers, of
            which only the configuration is used.
        words: of the vocabulary, by token id.
        end: the token that ends a sentence; if it is not in the vocabulary, the model has no special ids.
        **model_args: of the configuration, such as dropout.

    Returns:
        The model; its weights are drawn from torch's generator, so call set_seed first.

    Raises:
        ValueError: an unknown name, or an argument that the configuration does not have or refuses.
    """
    words = list(words)
    kind, values = _configuration(name)
    place = words.index(end) if end in words else None
    values = {**values, **check_model_args(kind, model_args), "bos_token_id": place, "eos_token_id": place}
    # transformers' embeddings give the padding token no gradient, and here it is the end of a sentence.
    values["pad_token_id"] = place if issubclass(kind, LstmLMConfig | CharCnnLstmConfig) else None
    try:
        if kind is CharCnnLstmConfig:
            from born_again.models.char_cnn_lstm import CharCnnLstmForCausalLM

            return CharCnnLstmForCausalLM.from_words(words, **values)
        config = kind.from_dict({**values, "vocab_size": len(words)})
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(
            f"model_args: got {model_args}, expected what the configuration of {kind.model_type!r} takes: {error}"
        ) from error
    return AutoModelForCausalLM.from_config(config)


def load_language_model(path_or_repo: str | os.PathLike[str], revision: str | None = None) -> PreTrainedModel:
    """Loads a causal language model, in eval mode, in float32, its weights from safetensors only.

    Args:
        path_or_repo: folder or Hub repository.
        revision: of the repository.

    Raises:
        FileNotFoundError: a folder that is missing, or without config.json or model.safetensors.
        OSError: the Hub has no such repository, or cannot be reached.
        ValueError: no causal language model of transformers or of this package, or weights that do not fit the
            configuration or cannot be read.
    """
    source = os.fspath(path_or_repo)
    if os.path.isdir(source):
        _check_files(Path(source))
        check_index(Path(source))
    elif os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(
            f"path_or_repo: {source!r} is not a folder, expected that of a generation, or a Hub repository as "
            "'namespace/name'; check the spelling."
        )
    with loading(source):
        if os.path.isdir(source):
            check_settings(read_settings(Path(source)), source)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            _check_stored(source, lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype="float32",
                use_safetensors=True,
                trust_remote_code=False,  # else it prompts the user
                ignore_mismatched_sizes=True,  # so that they are in the report
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise _unreadable(source, error) from error
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(f"{name} {tuple(got)} for {tuple(want)}" for name, got, want in report["mismatched_keys"])
    if missing or unexpected or mismatched:
        # transformers would fill in what is missing at random, with a warning.
        raise ValueError(
            f"path_or_repo: the weights of {source!r} do not fit its config.json, expected every weight; "
            f"missing: {missing[:5]}, unexpected: {unexpected[:5]}, of another shape: {mismatched[:5]} (the first 5 "
            f"of {len(missing)}, {len(unexpected)} and {len(mismatched)}). Save it again."
        )
    # auto_map names code in the repository, which will not be in the folder that this model is saved to.
    vars(model.config).pop("auto_map", None)
    return model.eval()


def _check_stored(source: str, build: Callable[[], PreTrainedModel]) -> None:
    try:
        check_size(build, Path(source))
    except SafetensorError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: SafetensorError) -> ValueError:
    return ValueError(
        f"path_or_repo: the weights of {source!r} cannot be read ({error}), expected a whole safetensors file; "
        "copy or download it again."
    )


def check_language_model(name: str, window: int = 1) -> None:
    """Validates the name of a model and its window before any data is read.

    Args:
        name: of the model.
        window: tokens of a window.

    Raises:
        ValueError: an unknown name; a window that is longer than the model's positions.
    """
    kind, values = _configuration(name)
    positions = getattr(kind.from_dict(dict(values)), "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ValueError(
            f"window: got {window}, expected at most the {positions} positions of {name!r}; use a shorter one."
        )


def is_recurrent(name: str) -> bool:
    """Whether the model of a name, folder or Hub repository is one of this package's LSTMs.

    Raises:
        ValueError: as `create_language_model`.
    """
    return issubclass(_configuration(name)[0], LstmLMConfig | CharCnnLstmConfig)


def _configuration(name: str) -> tuple[type[PretrainedConfig], dict[str, Any]]:
    """The class of the configuration, and its values except those of the vocabulary."""
    if name in CONFIGURATIONS:
        return _CONFIG_CLASSES.get(name, LstmLMConfig), CONFIGURATIONS[name]
    try:
        # Multimodal models contain a language model.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, StrictDataclassError) as error:
        near = difflib.get_close_matches(name, CONFIGURATIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CONFIGURATIONS)}."
        raise ValueError(
            f"model: got {name!r}, expected a name of this package, or a folder or Hub repository with the "
            f"config.json of a causal language model; {hint} ({str(error).splitlines()[0]})"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"model: {name!r} is a {config.model_type!r}, expected a causal language model, which "
            "AutoModelForCausalLM would load."
        )
    left_out = (*_VOCABULARY_FIELDS, *_CHARACTER_FIELDS, *_CHECKPOINT_FIELDS, "model_type")
    values = {key: value for key, value in config.to_dict().items() if key not in left_out}
    if "is_decoder" in values:
        values["is_decoder"] = True  # else encoders such as BERT see the tokens that they predict
    return type(config), values


def check_model_args(kind: type[PretrainedConfig], model_args: dict[str, Any]) -> dict[str, Any]:
    """Validates arguments of a configuration, and maps them to its own names.

    Raises:
        ValueError: one that the configuration does not have, or that follows from the vocabulary.
    """
    names = [field.name for field in dataclasses.fields(kind)] + list(kind.attribute_map)
    for name in model_args:
        if name in _VOCABULARY_FIELDS:
            raise ValueError(f"model_args: got {name!r}, which follows from the vocabulary; leave it out.")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(
                f"model_args: got {name!r}, which the configuration of {kind.model_type!r} does not have; "
                + (f"did you mean {near[0]!r}?" if near else f"see {kind.__name__}.")
            )
    return {kind.attribute_map.get(name, name): value for name, value in model_args.items()}


def _check_files(folder: Path) -> None:
    for choices in (("config.json",), ("model.safetensors", "model.safetensors.index.json")):
        if not any((folder / name).is_file() for name in choices):
            raise FileNotFoundError(
                f"path_or_repo: {str(folder)!r} has no {choices[0]}, expected the folder of a generation or what "
                "save_pretrained wrote. Pickled weights (pytorch_model.bin) are never loaded."
            )
