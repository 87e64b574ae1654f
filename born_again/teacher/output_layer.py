"""The output layer of a language model, separated from the layers before it.

Over a large vocabulary logits are large and hidden states small. The teacher cache stores hidden states, and the
chunked loss over 128,000 tokens computes logits from them, some rows at a time. Both need the model without its output
layer, and to know that logits are the output of that layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from born_again.teacher import logits_of


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that gives a language model's logits, or None where there is none, or no plain nn.Linear."""
    find = getattr(model, "get_output_embeddings", None)
    layer = None if find is None else find()
    return layer if type(layer) is nn.Linear else None


@contextmanager
def without_output_layer(model: nn.Module) -> Iterator[nn.Linear]:
    """Inside, a model's "logits" are what its output layer would have been given: (..., hidden).

    Whatever wraps the model for distributed training may be called meanwhile: in the graph of what comes out the
    layer's parameters are there, as DistributedDataParallel expects of parameters that will have a gradient.

    Args:
        model: with an `output_layer`; unwrapped.

    Yields:
        The layer, with its weight (vocabulary, hidden) and bias (vocabulary,) or None.
    """
    layer = output_layer(model)
    before = vars(layer).get("forward")
    layer.forward = partial(_pass_by, layer)
    try:
        yield layer
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


@torch.no_grad()
def ends_in_output_layer(
    model: nn.Module, inputs: Mapping[str, Any], call: Callable[[Mapping[str, Any]], Any] | None = None
) -> bool:
    """Whether the logits are the output of the output layer alone, checked by running the model on a batch.

    False for what follows the layer in some models, such as a soft cap (Gemma 2) or a scale, and for several heads.

    Args:
        model: unwrapped; of any mode, which it keeps.
        inputs: a batch that the model can be called with.
        call: calls the model with the batch where that takes more than `model(**inputs)`.
    """
    call = call or (lambda batch: model(**batch))
    layer = output_layer(model)
    if layer is None:
        return False
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        logits = logits_of(call(inputs))
        with without_output_layer(model):
            hidden = logits_of(call(inputs))
        # Accelerate widens what a network under autocast gives, but not what its layer gives here.
        return hidden.shape[-1] == layer.in_features and torch.equal(logits, layer(hidden).to(logits.dtype))
    finally:
        for module, training in modes.items():
            module.training = training


def _pass_by(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return _PassBy.apply(hidden, layer.weight, layer.bias)


class _PassBy(torch.autograd.Function):
    """Hidden states as they are, with the parameters in their graph but without a gradient for them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad_hidden):
        return grad_hidden, None, None
