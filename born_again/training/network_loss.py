"""How a network of transformers uses labels, detected by calling it with some.

A trainer that computes the loss does not hand labels to the network. What the network would have done with them has
to be known: whether it shifts them by one position, which decoder inputs it makes of them, and what it adds to the
cross-entropy. Names of classes tell none of it for certain.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from born_again.objectives import IGNORED, widened
from born_again.teacher import logits_of
from born_again.teacher.inputs import decoder_inputs, forward_parameters, makes_decoder_inputs, unwrapped

# By what share a network's own loss may differ from the cross-entropy of its logits: rounding, in their dtype.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}
_ROUNDING_OF_NARROW = 2e-2
_AUXILIARY_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
_POSITIONS = 64


@dataclass(frozen=True)
class NetworkLoss:
    """How a network's own loss comes from its logits and labels.

    Args:
        shifts_labels: whether the logits at position i are compared with the label at i + 1; None where a batch
            cannot tell: the network takes no labels, computes no loss, or gives the same logits at every position.
        auxiliary_weight: what the `aux_loss` in its outputs is multiplied by before it is added; 0 without one.
    """

    shifts_labels: bool | None = None
    auxiliary_weight: float = 0.0


@torch.no_grad()
def network_loss(
    network: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    name: str = "labels",
    call: Callable[..., Any] | None = None,
) -> NetworkLoss:
    """Compares a network's own loss, on one sample in evaluation mode, with the cross-entropy of its logits.

    Leaves the network as it was, and the random number generators.

    Args:
        network: unwrapped.
        inputs: a batch as the network is called with it, without labels, on its device.
        labels: those of the batch, int64.
        name: of the argument by which the network's forward takes them.
        call: what is called with keyword arguments, where that is not the network itself.

    Raises:
        ValueError: the network does something else with labels than such a loss.
    """
    parameters = forward_parameters(network)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if name not in parameters and not takes_any:
        return NetworkLoss()
    call = call or network
    inputs = {key: first_row(value, len(labels)) for key, value in inputs.items()}
    labels = labels[:1]
    kind = type(unwrapped(network)).__name__
    with _evaluating(network), torch.random.fork_rng([labels.device] if labels.device.type == "cuda" else []):
        derived = decoder_inputs(network, inputs, labels.clamp_min(0))
        try:
            logits = logits_of(call(**inputs, **derived))
        except Exception as error:
            if derived or not makes_decoder_inputs(network, inputs):
                raise
            raise ValueError(
                f"model: {kind} is an encoder-decoder that gives no logits for {', '.join(inputs)} alone ({error}), "
                "and how it makes decoder inputs of labels is not known; expected decoder_input_ids in the batch, "
                "which are the labels shifted to the right."
            ) from error
        if labels.shape != logits.shape[:-1]:
            return NetworkLoss()  # refused where both are put together
        probe = labels.clamp_min(0) if derived else _probe_labels(logits, labels, inputs.get("attention_mask"))
        try:
            outputs = call(**inputs, **{name: probe})
        except Exception as error:
            if name not in parameters:
                return NetworkLoss()  # hands its arguments on to something that takes no labels
            raise ValueError(
                f"model: {kind} fails when it is given {name} ({error}), so what it does with them is not known; "
                f"expected a loss from the batch that it gives logits for, or a forward without {name}."
            ) from error
    loss, own_logits, auxiliary = _parts(outputs)
    if loss is None:
        return NetworkLoss()
    rounding = _ROUNDING.get(logits.dtype, _ROUNDING_OF_NARROW)
    if own_logits.shape != logits.shape or not torch.allclose(own_logits, logits, rounding, rounding):
        raise ValueError(
            f"model: {kind} gives other logits when it is given {name}, which the trainer reads here and not the "
            "network; expected logits that do not depend on them. What the network makes of its labels has to be in "
            "the batch: the decoder_input_ids of an encoder-decoder, as DataCollatorForSeq2Seq(tokenizer, model) adds."
        )
    shifts = (False, True) if logits.dim() == 3 and logits.shape[1] > 1 else (False,)
    entropies = [_cross_entropy(logits, probe, shift) for shift in shifts]
    rounding *= max(1.0, abs(loss))
    for weight in (0.0,) if auxiliary is None else (*_auxiliary_weights(network), 0.0):
        added = weight * (auxiliary or 0.0)
        distances = [abs(loss - added - entropy) for entropy in entropies]
        if min(distances) <= rounding:
            sure = len(shifts) == 1 or abs(entropies[0] - entropies[1]) > 2 * rounding
            return NetworkLoss(shifts[distances.index(min(distances))] if sure else None, weight)
    shifted = f", {entropies[1]:.4f} with labels shifted by one" if len(shifts) == 2 else ""
    raise ValueError(
        f"model: {kind} computes a loss of {loss:.4f} where the cross-entropy of its logits is {entropies[0]:.4f}"
        f"{shifted}: it adds something to it, or scales it, which would be lost where the trainer computes the loss; "
        f"expected the mean cross-entropy, plus aux_loss times {' or '.join(_AUXILIARY_WEIGHTS)} where there is one. "
        f"Train it with transformers.Trainer, or, for the cross-entropy alone, give it a forward without {name}."
    )


def declares_shift(network: nn.Module) -> bool:
    """Whether a network is called a causal language model: what is believed where no batch can tell.

    Trainer looks for "ForCausalLM" in the class name and so misses GPT2LMHeadModel and others of the early names,
    whose labels transformers shifts all the same.
    """
    network = unwrapped(network)
    names = {kind.__name__ for kind in type(network).__mro__}
    causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return causal and not getattr(network.config, "is_encoder_decoder", False)


def first_row(value: Any, rows: int) -> Any:
    """The first sample of what a batch of so many holds: enough to detect what a network does."""
    return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module as it was, and what a loss writes into a config."""
    modes = {module: module.training for module in network.modules()}
    config = getattr(network, "config", None)
    written = {"problem_type": config.problem_type} if hasattr(config, "problem_type") else {}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for name, value in written.items():
            setattr(config, name, value)


def _probe_labels(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels for which it shows most clearly whether they are shifted, where those of the batch count."""
    probe = logits.argmax(-1)
    if logits.dim() == 3:
        after = [(here.float() - before).argmax(-1) for here, before in _neighbours(logits)]
        probe = torch.cat([probe[:, :1], *after], 1)
    counted = labels != IGNORED
    if counted[..., 1:].sum() == 0 or not counted.any():
        counted = torch.ones_like(counted)
        if mask is not None and mask.shape == counted.shape:
            counted = mask.bool()
    return probe.where(counted, IGNORED)


def _neighbours(logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and those of the position before, some positions at a time, since a vocabulary makes them large."""
    return zip(logits[:, 1:].split(_POSITIONS, 1), logits[:, :-1].split(_POSITIONS, 1), strict=True)


def _parts(outputs: Any) -> tuple[float | None, Tensor | None, float | None]:
    """The loss, the logits and the auxiliary loss in what a network returned with labels."""
    if isinstance(outputs, Mapping):
        loss, logits, auxiliary = (outputs.get(name) for name in ("loss", "logits", "aux_loss"))
    elif isinstance(outputs, tuple | list) and len(outputs) > 1:
        (loss, logits), auxiliary = outputs[:2], None
    else:
        return None, None, None
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not isinstance(logits, Tensor):
        return None, None, None
    return loss.item(), logits, auxiliary.item() if isinstance(auxiliary, Tensor) else None


def _cross_entropy(logits: Tensor, labels: Tensor, shift: bool) -> float:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows, targets = logits.flatten(0, -2), labels.flatten()
    total = sum(
        F.cross_entropy(widened(row), target, ignore_index=IGNORED, reduction="sum").item()
        for row, target in zip(rows.split(_POSITIONS), targets.split(_POSITIONS), strict=True)
    )
    return total / max(1, int((targets != IGNORED).sum()))


def _auxiliary_weights(network: nn.Module) -> list[float]:
    network = unwrapped(network)
    found = [getattr(place, name, None) for place in (network, getattr(network, "config", None))
             for name in _AUXILIARY_WEIGHTS]  # fmt: skip
    return [float(weight) for weight in found if isinstance(weight, int | float)]
