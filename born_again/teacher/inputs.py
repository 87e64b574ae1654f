"""Which inputs a network reads, under which names, and in which dtype.

Teacher and student share the batches of a training and need not be of one family: a timm network calls its image `x`,
transformers calls it `pixel_values`; BERT reads token_type_ids, DistilBERT has none.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What transformers calls the images, token ids or sound that a network reads, and what may come beside them.
_MAIN = ("pixel_values", "input_ids", "input_values", "input_features")
_BESIDE = ("attention_mask", "token_type_ids", "position_ids")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
_FOR_DECODERS = "labels_for_decoders"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not those that quantised weights are kept in


class NetworkInputs:
    """How a network is called with a batch of named inputs.

    It is given those that its forward names, or all of them where its forward has **kwargs. A network whose first
    argument is its only missing one, and has a name of its own, such as the `x` of timm, gets the image, the token ids
    or the single tensor of the batch there.

    Args:
        network: of any kind; torch.compile, DistributedDataParallel and PEFT are looked through.
        role: "teacher" or "student", for the messages.

    Attributes:
        names: what its forward takes by name.
        takes_any: whether it has **kwargs.
    """

    def __init__(self, network: nn.Module, role: str) -> None:
        self.role, self._kind = role, type(network).__name__
        network = unwrapped(network)
        parameters = forward_parameters(network)
        named = {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        }
        self.names = tuple(named)
        self.takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self._required = [name for name, parameter in named.items() if parameter.default is inspect.Parameter.empty]
        self._tensors = [name for name, parameter in named.items() if parameter.default is None]  # that may be given
        main = getattr(network, "main_input_name", None)  # of transformers, where every argument has a default
        self._main = main if main in named and main in _MAIN else None
        self._first = self._main or next(iter(named), None)

    def main(self, batch: Mapping[str, Any]) -> Any:
        """The image, token ids or sound of a batch, under the name that this network gives it; None without."""
        return self.renamed(batch).get(self._first or "input_ids")

    @property
    def columns(self) -> tuple[str, ...]:
        """What of a dataset it may read: `names`, and images or ids for a first argument with a name of its own."""
        return self.names if self.takes_any or set(_MAIN) & set(self.names) else (*self.names, *_MAIN)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of its forward, by name: see `renamed`, without what it does not take."""
        named = self.renamed(batch)
        return {name: value for name, value in named.items() if self.takes_any or name in self.names}

    def renamed(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch whose image or ids have the name that this network gives them.

        Args:
            batch: named inputs, without labels.

        Raises:
            ValueError: the batch lacks an input, and which of its others is meant cannot be told.
        """
        missing = self._missing(batch)
        if not missing:
            return batch
        others = {name: value for name, value in batch.items() if name not in self.names and isinstance(value, Tensor)}
        source = self._meant(batch, others) if missing == [self._first] else None
        if source is None:
            raise ValueError(
                f"{self.role}: the forward of {self._kind} needs {', '.join(missing)}, and a batch has "
                f"{', '.join(batch) or 'no inputs'}; expected every input among them, or a network whose first "
                "argument alone has another name. Add the columns to the dataset (a tokenizer that makes them, "
                "remove_unused_columns=False where Trainer drops them, a data collator that passes them on), or name "
                "the arguments of forward as the columns are."
            )
        return {self._first if name == source else name: value for name, value in batch.items()}

    def _missing(self, batch: Mapping[str, Any]) -> list[str]:
        absent = [name for name in self._required if name not in batch]
        if absent or self._first is None:
            return absent
        given = [name for name in batch if name in self.names]
        if self._main is not None:
            return [] if {*_MAIN, "inputs_embeds"} & set(given) else [self._main]
        # All arguments have defaults: one that is given nothing would compute from nothing.
        return [] if given or self.takes_any else [self._first]

    def _meant(self, batch: Mapping[str, Any], others: Mapping[str, Tensor]) -> str | None:
        """The input that the first argument stands for, under another name."""
        if any(name in _MAIN for name in batch if name in self.names):
            return None  # it has its image or ids
        if (
            self._main is not None
        ):  # of transformers: another name for ids, or for images or sound, but not another kind
            ids = self._main == "input_ids"
            others = {
                name: value for name, value in others.items() if name not in _MAIN and value.is_floating_point() != ids
            }
        named = [name for name in others if name in _MAIN] or [name for name in others if name not in _BESIDE]
        beside = [name for name in others if name in _BESIDE]
        if beside and any(name not in batch for name in self._tensors if name != self._first):
            return None  # a mask, perhaps, under another name too
        return named[0] if len(named) == 1 else None


def makes_decoder_inputs(network: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a network is an encoder-decoder that makes of labels what its decoder reads, and a batch has none."""
    find = getattr(network, "get_output_embeddings", None)
    if not getattr(getattr(network, "config", None), "is_encoder_decoder", False) or find is None or find() is None:
        return False  # a classifier's decoder reads the input
    return all(batch.get(name) is None for name in _DECODER_INPUTS)


def decoder_inputs(network: nn.Module, batch: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """The decoder inputs that an encoder-decoder makes of its labels, where a batch has none.

    Args:
        network: that torch.compile may have been given.
        batch: named inputs.
        labels: (batch, time), int64.

    Returns:
        {"decoder_input_ids": (batch, time)}, as DataCollatorForSeq2Seq has them made; empty for other networks, and
        where how they are made is not known.
    """
    if labels.dim() != 2 or not makes_decoder_inputs(network, batch):
        return {}
    if hasattr(network, "prepare_decoder_input_ids_from_labels"):
        return {"decoder_input_ids": network.prepare_decoder_input_ids_from_labels(labels=labels)}
    base = unwrapped(network)
    shift = getattr(sys.modules[type(base).__module__], "shift_tokens_right", None)
    if shift is None:
        return {}
    start = base.config.decoder_start_token_id
    return {"decoder_input_ids": shift(labels, base.config.pad_token_id, start)}


def with_labels_for_decoders(networks: Iterable[nn.Module], batch: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """A batch of which `with_decoder_inputs` makes, for each of these networks, what its decoder reads."""
    if labels.dim() != 2 or not any(makes_decoder_inputs(network, batch) for network in networks):
        return batch
    return {**batch, _FOR_DECODERS: labels}


def with_decoder_inputs(network: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch in which the network's own decoder inputs stand for the labels of `with_labels_for_decoders`."""
    if _FOR_DECODERS not in batch:
        return batch
    without = {name: value for name, value in batch.items() if name != _FOR_DECODERS}
    return {**without, **decoder_inputs(network, without, batch[_FOR_DECODERS])}


def unwrapped(network: nn.Module) -> nn.Module:
    """The network that torch.compile, DataParallel, DistributedDataParallel or PEFT were given."""
    while True:
        if hasattr(network, "_orig_mod"):
            network = network._orig_mod
        elif isinstance(network, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif hasattr(network, "get_base_model"):
            network = network.get_base_model()
        else:
            return network


def forward_parameters(network: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the forward of a network takes.

    A network that hands its inputs on to others says in its `forward_signature` what those take.
    """
    network = unwrapped(network)
    signature = getattr(network, "forward_signature", None)
    return (signature or inspect.signature(network.forward)).parameters


def input_dtype(network: nn.Module) -> torch.dtype | None:
    """What floating inputs of a network are to be: the dtype of its first weight with two axes or more.

    Not of any parameter: normalisation is often kept in float32 beside narrower weights, and reads either.

    Returns:
        None for a network without floating parameters.
    """
    first = None
    for parameter in network.parameters():
        if parameter.dtype in _DTYPES:
            if parameter.dim() > 1:
                return parameter.dtype
            first = first or parameter.dtype
    return first


def cast_floating(inputs: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Inputs with their floating tensors in a dtype; ids, masks of integers and what is no tensor stay as they are."""
    return {
        name: value.to(dtype)
        if dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
