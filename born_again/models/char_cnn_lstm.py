"""The LSTM language model that reads words as characters: Kim et al. 2016 (arXiv 1508.06615).

Filters over a word's characters, the maximum over their places, highway layers, an LSTM whose state is carried from
window to window, and a softmax over words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init

from born_again.models.language_configs import IN_PACKAGE, CharCnnLstmConfig
from born_again.models.lstm_lm import LstmStack, RecurrentLM

_PADDING, _START, _END = range(3)
_MARKS = ["<padding>", "<start>", "<end>"]


def character_table(words: Sequence[str], max_word_length: int | None = None) -> tuple[Tensor, list[str]]:
    """Spells words in ids of characters.

    Args:
        words: the word of each id.
        max_word_length: columns; those of the longest word with its start and end when None.

    Returns:
        The table, (words, max_word_length) int64, a row being start, characters, end, and 0 for padding; and the
        alphabet: the character of each id, padding, start and end first, then sorted.

    Raises:
        ValueError: a word that is longer than max_word_length with its start and end.
    """
    alphabet = [*_MARKS, *sorted(set().union(*words))]
    ids = {character: index for index, character in enumerate(alphabet[len(_MARKS) :], len(_MARKS))}
    longest = max(words, key=len, default="")
    needed = len(longest) + 2
    length = needed if max_word_length is None else max_word_length
    if needed > length:
        raise ValueError(
            f"words: {longest!r} takes {needed} places with its start and end, expected at most the "
            f"max_word_length of {length}; give max_word_length={needed} or leave the word out."
        )
    rows = [[_START, *(ids[c] for c in word), _END] + [_PADDING] * (length - len(word) - 2) for word in words]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length), alphabet


class HighwayGate(nn.Linear):
    """A linear layer whose biases start at -2, so that a highway layer at first passes on most of what it reads."""


class Highway(nn.Module):
    """x to gate * relu(transform) + (1 - gate) * x (Srivastava et al. 2015, arXiv 1505.00387).

    Args:
        size: of x and of what comes out.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(size, size)
        self.gate = HighwayGate(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) of any float dtype to the same."""
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.transform(x)) + (1 - gate) * x


class CharCnn(nn.Module):
    """Words from their characters.

    Args:
        config: the sizes.
    """

    def __init__(self, config: CharCnnLstmConfig) -> None:
        super().__init__()
        size = config.character_embedding_size
        self.embeddings = nn.Embedding(config.character_vocab_size, size, padding_idx=_PADDING)
        self.filters = nn.ModuleList(
            nn.Conv1d(size, count, width)
            for width, count in zip(config.filter_widths, config.filter_counts, strict=True)
        )
        self.highways = nn.Sequential(*(Highway(sum(config.filter_counts)) for _ in range(config.highway_layers)))

    def forward(self, characters: Tensor) -> Tensor:
        """(words, max_word_length) int64 to (words, sum of filter_counts)."""
        x = self.embeddings(characters).transpose(1, 2)  # (words, character_embedding_size, max_word_length)
        # The maximum over places before tanh is the one after it. Padding has places too, as in the paper's code.
        maxima = [one(x).amax(2) for one in self.filters]  # each (words, filters)
        return self.highways(torch.tanh(torch.cat(maxima, dim=1)))


class CharCnnLstmForCausalLM(RecurrentLM):
    """The character-aware language model of `CharCnnLstmConfig`; input_ids are ids of words.

    Which characters a word has is in the buffer `characters`, (vocab_size, max_word_length) int64, which is saved with
    the weights. `from_words` makes a model with it filled; a model made from its config has it empty, and cannot be
    called before `set_words`.
    """

    config_class = CharCnnLstmConfig
    characters: Tensor

    def __init__(self, config: CharCnnLstmConfig) -> None:
        super().__init__(config)
        self.register_buffer("characters", torch.zeros(config.vocab_size, config.max_word_length, dtype=torch.int64))
        self._has_words = False
        self.cnn = CharCnn(config)
        sizes = [config.hidden_size] * config.num_layers
        self.stack = LstmStack(sum(config.filter_counts), sizes, config, drop_inputs=False)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @classmethod
    def from_words(cls, words: Sequence[str], **config_args: Any) -> CharCnnLstmForCausalLM:
        """A new model of these words.

        Args:
            words: the word of each id.
            **config_args: of `CharCnnLstmConfig`; sizes that follow from the words may be left out.

        Raises:
            ValueError: as `CharCnnLstmConfig` and `set_words`.
        """
        table, alphabet = character_table(words)
        widest = max(config_args.get("filter_widths", CharCnnLstmConfig.filter_widths), default=1)
        sizes = {
            "vocab_size": len(words),
            "character_vocab_size": len(alphabet),
            "max_word_length": max(table.shape[1], widest),
        }
        model = cls(CharCnnLstmConfig(**{**sizes, **config_args}))
        model.set_words(words)
        return model

    def set_words(self, words: Sequence[str]) -> None:
        """Fills the character table, and config.alphabet.

        Args:
            words: the word of each id.

        Raises:
            ValueError: not vocab_size words; one that is too long for the table; not character_vocab_size
                characters, or other ones than config.alphabet where it is set.
        """
        if len(words) != self.config.vocab_size:
            raise ValueError(
                f"words: got {len(words)}, expected the {self.config.vocab_size} of config.vocab_size; pass the word "
                "of every id, or make a model of these words with CharCnnLstmForCausalLM.from_words."
            )
        table, alphabet = character_table(words, self.config.max_word_length)
        if len(alphabet) != self.config.character_vocab_size:
            raise ValueError(
                f"words: got {len(alphabet)} characters with padding, start and end, expected the "
                f"{self.config.character_vocab_size} of config.character_vocab_size; give "
                f"character_vocab_size={len(alphabet)}."
            )
        if self.config.alphabet not in (None, alphabet):
            raise ValueError(
                f"words: got the characters {alphabet}, expected those of config.alphabet, {self.config.alphabet}, "
                "which the embeddings are of; pass the words that the model was made with, or make a new model with "
                "CharCnnLstmForCausalLM.from_words."
            )
        self.config.alphabet = alphabet
        self.characters.copy_(table)
        self._has_words = True

    def embed(self, input_ids: Tensor) -> Tensor:
        """(batch, time) int64 to (batch, time, sum of filter_counts).

        Raises:
            RuntimeError: the character table is empty.
        """
        self._check_words()
        # No randomness here, so a word is the same wherever it stands: each is computed once.
        words, places = torch.unique(input_ids, return_inverse=True)
        return F.embedding(places, self.cnn(self.characters[words]))

    def _check_words(self) -> None:
        # Looking at the table makes the host wait for the device, so only until it is found filled.
        if not self._has_words:
            self._has_words = bool(self.characters[:, 0].all())
        if not self._has_words:
            raise RuntimeError(
                "characters: got an empty table, expected the characters of every word; call "
                "model.set_words(words), or make the model with CharCnnLstmForCausalLM.from_words(words)."
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding | nn.Conv1d | nn.Linear | nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -self.config.initializer_range, self.config.initializer_range)
        if isinstance(module, nn.Embedding):
            init.zeros_(module.weight[_PADDING])
        elif isinstance(module, HighwayGate):
            init.constant_(module.bias, -2.0)
        elif module is self:
            init.zeros_(self.characters)  # where a file lacks it; one that was read is left alone

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder


if IN_PACKAGE:
    AutoModelForCausalLM.register(CharCnnLstmConfig, CharCnnLstmForCausalLM)
