"""LSTM language models whose state goes in and comes out, so that a text can be read window by window.

Zaremba et al. 2014 (arXiv 1409.2329) with the embeddings tied to the softmax (Press and Wolf 2017, arXiv 1608.05859);
the paper's Penn Treebank LSTM is of this kind. The regularisers of AWD-LSTM (Merity et al. 2017, arXiv 1708.02182) are
there and off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from born_again.models.language_configs import IN_PACKAGE, CharCnnLstmConfig, LstmLMConfig
from born_again.models.lstm_precision import computes_lstm, lstm, requested_dtype

State = tuple[Tensor, ...]


@dataclass
class RecurrentLMOutput(ModelOutput):
    """What a recurrent language model returns.

    Args:
        loss: mean cross-entropy of the labels that are not -100, in nats; None without labels.
        logits: (batch, time, words).
        state: hidden and cell state after the last step, (h_0, c_0, h_1, c_1, ...), each (batch, units of the layer);
            `state` of the next window.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


# What generate() carries the state as: beam search may follow the beams in its past_key_values and nothing else.
_CARRIED = "past_key_values" if "past_key_values" in ALL_CACHE_NAMES else "state"


class LockedDropout(nn.Module):
    """Dropout whose mask is the same at every step of a window.

    Args:
        probability: of an element to be dropped.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, units) of any float dtype to the same."""
        if not self.training or self.probability == 0:
            return x
        mask = F.dropout(torch.ones_like(x[:, :1]), self.probability)  # (batch, 1, units)
        return x * mask


class LstmLayer(nn.LSTM):
    """One LSTM layer whose recurrent weights may be dropped while training.

    Where the machine has no LSTM in the dtype that autocast or the weights ask for, it computes in float32; what it
    returns has that dtype.

    Args:
        inputs: units below.
        units: of the layer.
        dropconnect: probability at which a recurrent weight is dropped, drawn once for a call.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, inputs: int, units: int, dropconnect: float = 0.0) -> None:
        super().__init__(inputs, units, batch_first=True)
        self.dropconnect = dropconnect

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Reads a window.

        Args:
            x: (batch, time, inputs).
            state: hidden and cell state, each (batch, units).

        Returns:
            (batch, time, units), and the state after the last step.
        """
        hidden, cell = (part.unsqueeze(0) for part in state)  # (1, batch, units)
        dropconnect = self.training and self.dropconnect > 0
        in_float32 = not computes_lstm(x.device, requested_dtype(x), torch.is_grad_enabled())
        if dropconnect or in_float32:
            # nn.LSTM keeps its own list of weights, so other ones cannot be put in their place.
            recurrent = F.dropout(self.weight_hh_l0, self.dropconnect) if dropconnect else self.weight_hh_l0
            weights = [self.weight_ih_l0, recurrent, self.bias_ih_l0, self.bias_hh_l0]
            out, h, c = lstm(x, (hidden, cell), weights, self.training, in_float32)  # pyright: ignore[reportCallIssue]
        else:
            out, (h, c) = super().forward(x, (hidden, cell))
        return out, (h.squeeze(0), c.squeeze(0))


class LstmStack(nn.Module):
    """LSTM layers with dropout at every connection that is not recurrent.

    Args:
        inputs: units of what is read.
        sizes: units of each layer.
        config: the rates.
        drop_inputs: whether config.dropout is applied to what is read, too.
    """

    def __init__(
        self, inputs: int, sizes: list[int], config: LstmLMConfig | CharCnnLstmConfig, drop_inputs: bool = True
    ) -> None:
        super().__init__()
        below = [inputs, *sizes[:-1]]
        self.layers = nn.ModuleList(
            LstmLayer(a, b, config.recurrent_dropconnect) for a, b in zip(below, sizes, strict=True)
        )
        self.sizes = sizes
        self.dropout = nn.Dropout(config.dropout)
        self.input_dropout = self.dropout if drop_inputs else nn.Identity()
        self.locked_embeddings = LockedDropout(config.locked_dropout_embeddings)
        self.locked_states = LockedDropout(config.locked_dropout_states)
        self.locked_outputs = LockedDropout(config.locked_dropout_outputs)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """(batch, time, inputs) and a state, or None for zeros, to (batch, time, sizes[-1]) and the next state."""
        if state is None:
            state = tuple(x.new_zeros(len(x), size) for size in self.sizes for _ in "hc")
        x = self.locked_embeddings(self.input_dropout(x))
        after: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            # Autocast may have left the state in another dtype than this window's activations.
            own = tuple(part.to(x.dtype) for part in state[2 * index : 2 * index + 2])
            x, own = layer(x, own)
            after += own
            locked = self.locked_outputs if index == len(self.layers) - 1 else self.locked_states
            x = locked(self.dropout(x))  # (batch, time, sizes[index])
        return x, tuple(after)


class RecurrentLM(PreTrainedModel, GenerationMixin):
    """Base of language models that read a text window by window, carrying a state.

    A subclass makes `stack` (an `LstmStack`) and `decoder` (to the words), and gives `embed`.
    """

    main_input_name = "input_ids"
    carries_state = True  # `state` of forward is the output's `state` of the window before: trainers hand it on
    _is_stateful = True
    stack: LstmStack
    decoder: nn.Linear

    def post_init(self) -> None:
        super().post_init()
        # What Trainer looks at to count labels: those of the transformers way are one fewer in each row.
        self.loss_type = "ForCausalLM" if self.config.shift_labels else None

    def embed(self, input_ids: Tensor) -> Tensor:
        """(batch, time) int64 to (batch, time, inputs of the stack)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentLMOutput | tuple:
        """Reads a window of every row.

        The rule for labels: labels[:, t] is the word that position t must predict, so a window's last position has the
        next window's first word. With `shift_labels`, of the config or given here, they are aligned with input_ids
        instead, and shifted here as transformers' own models shift them (the last position then predicts nothing).

        Args:
            input_ids: (batch, time), int64.
            attention_mask: (batch, time), 1 where there is a word; padding must stand on the right.
            state: of the window before, as returned; None for zeros.
            labels: (batch, time), int64, -100 for positions that do not count.
            num_items_in_batch: what the summed loss is divided by; the labels that count when None.
            return_dict: False for a tuple.
            **kwargs: shift_labels, True or False in place of config.shift_labels; the rest is ignored: transformers
                passes what it passes to every model.

        Raises:
            ValueError: padding on the left, which would go into the state; a state that is not of this batch or
                model; input_ids that are not (batch, time).
        """
        self._check(input_ids, attention_mask, state)
        hidden, state = self.stack(self.embed(input_ids), state)
        # An LSTM's output is a transposed view, for which a frozen bf16 softmax layer takes nine times as long on a
        # CPU.
        logits = self.decoder(hidden.contiguous())  # (batch, time, words)
        loss = None
        if labels is not None:
            # Not an argument by name: Trainer would take it for a column of labels, and find no batch that has it.
            shifts = kwargs.get("shift_labels")
            shifts = self.config.shift_labels if shifts is None else shifts
            targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shifts else labels
            loss = _mean_cross_entropy(logits, targets, num_items_in_batch)
        output = RecurrentLMOutput(loss=loss, logits=logits, state=state)
        return output.to_tuple() if return_dict is False else output

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, state: State | None) -> None:
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}, expected (batch, time); add a batch axis with "
                "input_ids[None]."
            )
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            if attention_mask.shape[1] > 1 and not bool(attention_mask[:, 0].all()):
                raise ValueError(
                    "attention_mask: got padding on the left, expected it on the right, since a recurrent state "
                    "would read it; use tokenizer.padding_side = 'right', or prompts of one length to generate."
                )
        if state is not None:
            expected = [(len(input_ids), size) for size in self.stack.sizes for _ in "hc"]
            if [tuple(part.shape) for part in state] != expected:
                raise ValueError(
                    f"state: got shapes {[tuple(part.shape) for part in state]}, expected {expected}; pass what the "
                    "model returned for the window before, with the same rows."
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            bound = 1 / math.sqrt(module.hidden_size)
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding | nn.Linear):
            init.uniform_(module.weight, -self.config.initializer_range, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)

    # ---- generate() ----

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The words that the state has not read yet; all of them where no state is carried.

        Raises:
            ValueError: a prompt with padding, which would be read before what is generated; a state to start from
                with use_cache=False.
        """
        if is_first_iteration:
            if attention_mask is not None and not bool(attention_mask.all()):
                raise ValueError(
                    "attention_mask: got padding, expected none, since a recurrent state would read it before what is "
                    "generated; generate from prompts of one length."
                )
            if state is not None and use_cache is False:
                raise ValueError(
                    "use_cache: got False with a state to start from, expected True, since the state is what is "
                    "carried; leave one of them out."
                )
            return {"input_ids": input_ids, "state": state}
        state = kwargs.get(_CARRIED, state)
        if use_cache is False or state is None:
            return {"input_ids": input_ids}
        return {"input_ids": input_ids[:, -1:], "state": state}

    def _update_model_kwargs_for_generation(
        self, outputs: RecurrentLMOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # From version 5.24 on transformers carries nothing that is not called "cache".
        return {
            **super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs),
            _CARRIED: outputs.state,
        }

    @staticmethod
    def _reorder_cache(state: State, beam_idx: Tensor) -> State:
        return tuple(part.index_select(0, beam_idx.to(part.device)) for part in state)


class LstmLMForCausalLM(RecurrentLM):
    """The LSTM language model of `LstmLMConfig`."""

    config_class = LstmLMConfig
    _tied_weights_keys = {"decoder.weight": "embeddings.weight"}

    def __init__(self, config: LstmLMConfig) -> None:
        super().__init__(config)
        embedding_size = config.embedding_size or config.hidden_size
        last = embedding_size if config.tie_word_embeddings else config.hidden_size
        sizes = [config.hidden_size] * (config.num_layers - 1) + [last]
        self.embeddings = nn.Embedding(config.vocab_size, embedding_size)
        self.stack = LstmStack(embedding_size, sizes, config)
        self.decoder = nn.Linear(last, config.vocab_size)
        if config.tie_word_embeddings:
            # One matrix is saved once, and Trainer need not warn that a checkpoint lacks the other.
            self._keys_to_ignore_on_save = ["decoder.weight"]
        self.post_init()

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embeddings(input_ids)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value


def _mean_cross_entropy(logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    if items is None:
        items = targets.ne(-100).sum().clamp_min(1)
    return total / items


if IN_PACKAGE:
    AutoModelForCausalLM.register(LstmLMConfig, LstmLMForCausalLM)
