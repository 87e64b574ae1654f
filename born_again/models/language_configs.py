"""Configurations of the recurrent language models, known to transformers' Auto classes.

They stand apart from the networks because importing a config is cheap and importing transformers' PreTrainedModel is
not: the networks are imported and registered when the first config is made, which comes before any Auto class could
look for them.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers import AutoConfig, PretrainedConfig

# False in the copy of this file that is published beside weights. There config.json names the classes and nothing is
# registered, since what is registered stands for every repository's models, also those whose code is newer.
IN_PACKAGE = __name__ == "born_again.models.language_configs"


class _RecurrentConfig(PretrainedConfig):
    """What both recurrent language models have in common; see `LstmLMConfig`."""

    # The state is for the next window, not for a table of predictions.
    keys_to_ignore_at_inference = ["state"]
    attribute_map = {"num_hidden_layers": "num_layers"}
    _network = ""

    vocab_size: int = 10000
    hidden_size: int = 200
    num_layers: int = 2
    dropout: float = 0.0
    locked_dropout_embeddings: float = 0.0
    locked_dropout_states: float = 0.0
    locked_dropout_outputs: float = 0.0
    recurrent_dropconnect: float = 0.0
    shift_labels: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_sizes("vocab_size", "hidden_size", "num_layers")
        for name in ("dropout", *(n for n in self.__dict__ if n.startswith(("locked_dropout", "recurrent_drop")))):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a probability of 0 to below 1.")
        if IN_PACKAGE:
            importlib.import_module(self._network)

    def _check_sizes(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number of 1 or more.")


class LstmLMConfig(_RecurrentConfig):
    """Of `LstmLMForCausalLM`.

    Args:
        vocab_size: words.
        hidden_size: units of a layer.
        embedding_size: of a word; hidden_size when None. With tied weights the last layer has this size.
        num_layers: LSTM layers.
        dropout: probability at the non-recurrent connections: embeddings, between layers, outputs (Zaremba et al.
            2014, arXiv 1409.2329), drawn for every element.
        locked_dropout_embeddings: probability at the embeddings, one mask for all steps of a window (variational
            dropout; this and the two below are "locked" as in Merity et al. 2017, arXiv 1708.02182).
        locked_dropout_states: the same between layers.
        locked_dropout_outputs: the same at the outputs of the last layer.
        recurrent_dropconnect: probability at which recurrent weights are dropped, drawn once for a window.
        initializer_range: embeddings are drawn uniformly from +- this; LSTM weights from +- 1/sqrt(units), biases of
            the softmax are 0.
        shift_labels: False: labels[:, t] is the word that position t must predict. True: labels are aligned with
            input_ids, and the model shifts them as transformers' own models do.
        tie_word_embeddings: one matrix for embeddings and softmax.

    Raises:
        ValueError: a size below 1, or a probability outside [0, 1).
    """

    model_type = "lstm_lm"
    _network = "born_again.models.lstm_lm"

    embedding_size: int | None = None
    initializer_range: float = 0.1
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        self._check_sizes("hidden_size", "embedding_size")
        super().__post_init__(**kwargs)


class CharCnnLstmConfig(_RecurrentConfig):
    """Of `CharCnnLstmForCausalLM`; the default is the large model of Kim et al. 2016 (arXiv 1508.06615, table 2).

    The small one has hidden_size=300, filter_widths=[1, 2, 3, 4, 5, 6], filter_counts=[25, 50, 75, 100, 125, 150] and
    highway_layers=1.

    Args:
        vocab_size: words.
        character_vocab_size: characters, with those for padding, start and end of a word.
        max_word_length: columns of the character table: the longest word with its start and end, and no fewer than
            the widest filter.
        character_embedding_size: of a character.
        filter_widths: characters that a filter of each kind reads.
        filter_counts: filters of each kind; their sum is the size of a word.
        highway_layers: between the filters and the LSTM.
        alphabet: the character of each id; kept for people, and checked where words are given again.
        hidden_size: units of a layer.
        num_layers: LSTM layers.
        dropout: probability between LSTM layers and at the outputs, drawn for every element; as in the paper there is
            none between highway and LSTM.
        locked_dropout_embeddings: probability at the LSTM's inputs, one mask for all steps of a window; this and the
            next three as in `LstmLMConfig`.
        locked_dropout_states: the same between layers.
        locked_dropout_outputs: the same at the outputs of the last layer.
        recurrent_dropconnect: probability at which recurrent weights are dropped, drawn once for a window.
        initializer_range: everything is drawn uniformly from +- this, but for the biases of the highway gates: -2.
        shift_labels: as in `LstmLMConfig`.
        tie_word_embeddings: False; words have no embeddings to tie.

    Raises:
        ValueError: a size below 1; a probability outside [0, 1); filter_widths and filter_counts of different lengths;
            a filter wider than the table; an alphabet of another size; tied embeddings.
    """

    model_type = "char_cnn_lstm"
    _network = "born_again.models.char_cnn_lstm"

    hidden_size: int = 650
    dropout: float = 0.5
    initializer_range: float = 0.05
    character_vocab_size: int = 51
    max_word_length: int = 21
    character_embedding_size: int = 15
    filter_widths: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    filter_counts: list[int] | tuple[int, ...] = (50, 100, 150, 200, 200, 200, 200)
    highway_layers: int = 2
    alphabet: list[str] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.filter_widths, self.filter_counts = [*self.filter_widths], [*self.filter_counts]
        self._check_sizes("character_vocab_size", "max_word_length", "character_embedding_size", "highway_layers")
        self._check_filters()
        if self.alphabet is not None and len(self.alphabet) != self.character_vocab_size:
            raise ValueError(
                f"alphabet: got {len(self.alphabet)} characters, expected the {self.character_vocab_size} of "
                "character_vocab_size; pass both as character_table gives them."
            )
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings: got True, expected False, since words are read as characters and have no "
                "embeddings; use LstmLMConfig to tie them."
            )
        super().__post_init__(**kwargs)

    def _check_filters(self) -> None:
        for name in ("filter_widths", "filter_counts"):
            values = getattr(self, name)
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise ValueError(f"{name}: got {values}, expected one or more whole numbers of 1 or more.")
        if len(self.filter_widths) != len(self.filter_counts):
            raise ValueError(
                f"filter_counts: got {len(self.filter_counts)} numbers {self.filter_counts}, expected one for each of "
                f"the {len(self.filter_widths)} filter_widths {self.filter_widths}; make them equally long."
            )
        if max(self.filter_widths) > self.max_word_length:
            raise ValueError(
                f"max_word_length: got {self.max_word_length}, expected at least the widest of filter_widths, "
                f"{max(self.filter_widths)}; raise it (shorter words are padded) or leave the filter out."
            )


if IN_PACKAGE:
    AutoConfig.register(LstmLMConfig.model_type, LstmLMConfig)
    AutoConfig.register(CharCnnLstmConfig.model_type, CharCnnLstmConfig)
