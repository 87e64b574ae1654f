"""What a frozen teacher is: its mode, its place, and how several become one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FrozenTeacher:
    """One or more frozen networks that answer with logits.

    Not an nn.Module on purpose: kept by a trainer it is in no module tree, so that no train() reaches it, no optimizer
    steps it, no checkpoint stores it and no wrapper for distributed training touches it. The networks given are put in
    eval mode and frozen where they are.

    Args:
        teachers: a network, or a sequence of networks that teach as the mean of their probabilities (the paper's
            equation 4 turned into a teacher).

    Raises:
        TypeError: something that is no nn.Module.
        ValueError: an empty sequence.
    """

    def __init__(self, teachers: nn.Module | Sequence[nn.Module]) -> None:
        self.modules = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        if not self.modules:
            raise ValueError("teacher: got an empty list, expected at least one network, or None to train on labels.")
        for module in self.modules:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"teacher: got {type(module).__name__}, expected an nn.Module or a list of them; load one with "
                    "from_pretrained or load_generation first."
                )
            module.eval().requires_grad_(False)
        self.carries_state = [carries_state(module) for module in self.modules]
        self._accepted = [_accepted_arguments(module) for module in self.modules]

    def to(self, device: torch.device, memory_format: torch.memory_format | None = None) -> FrozenTeacher:
        """Moves every network to a device, and its 4-d weights to a memory format where one is given."""
        for module in self.modules:
            module.to(device=device)
            if memory_format is not None:
                module.to(memory_format=memory_format)
        return self

    def check_against(self, student: nn.Module) -> None:
        """Refuses a teacher that cannot teach this student.

        Raises:
            ValueError: the same object, shared parameters, another number of classes, other label names.
        """
        storages = {_storage(parameter) for parameter in student.parameters()} - {0}
        for module in self.modules:
            if module is student:
                raise ValueError(
                    "teacher: got the student itself, expected another network; a copy made before training "
                    "(copy.deepcopy) or a generation loaded from its folder would do."
                )
            if any(_storage(parameter) in storages for parameter in module.parameters()):
                raise ValueError(
                    "teacher: shares parameters with the student, expected none in common, since training the student "
                    "would change what it is taught; load the teacher from its own folder."
                )
            _check_same_classes(module, student)

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """The logits of the teacher for one batch.

        Args:
            inputs: what the student is called with; names that a network's forward does not know are left out.

        Returns:
            (..., classes), a floating point tensor without gradient. For several networks it is the logarithm of
            the mean of their probabilities, in float32 or wider, whose softmax is that mean.
        """
        return self.read_on(inputs, [None] * len(self.modules))[0]

    @torch.no_grad()
    def read_on(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """As a call, for networks that carry a state from one window of a text to the next.

        Args:
            inputs: see `__call__`.
            states: one for each network, as returned for the window before; None to begin, and for networks without.

        Returns:
            The logits, and the states after this window.
        """
        logits, after = self.answers_on(inputs, states)
        return (logits[0] if len(logits) == 1 else mean_log_probabilities(logits)), after

    @torch.no_grad()
    def answers_on(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """As `read_on`, with the logits of each network for itself."""
        outputs = [
            self._output(module, accepted, inputs if state is None else {**inputs, "state": state})
            for module, accepted, state in zip(self.modules, self._accepted, states, strict=True)
        ]
        after = [
            output.state if carries else None for output, carries in zip(outputs, self.carries_state, strict=True)
        ]
        return [logits_of(output) for output in outputs], after

    @staticmethod
    def _output(module: nn.Module, accepted: set[str] | None, inputs: Mapping[str, Any]) -> Any:
        if module.training:
            module.eval()
        if accepted is not None:
            inputs = {name: value for name, value in inputs.items() if name in accepted}
        return module(**inputs)


def carries_state(module: nn.Module) -> bool:
    """Whether a network reads a text window by window: its forward takes a `state` and its output has the next.

    A network that hands its inputs on to others says in its `forward_signature` what those take.
    """
    return "state" in _forward_parameters(module)


def mean_log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Equation 4 of the paper: several networks as the mean of their probabilities.

    Args:
        logits: of each network, (..., classes) of any float dtype.

    Returns:
        (..., classes), float32 or wider: the logarithm of the mean, whose softmax is the mean.
    """
    log_probabilities = torch.stack([widened(part).log_softmax(-1) for part in logits])  # (networks, ..., classes)
    return log_probabilities.logsumexp(0) - math.log(len(logits))  # (..., classes)


def widened(logits: Tensor) -> Tensor:
    """Logits of any float dtype in float32, or wider where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def logits_of(outputs: Any) -> Tensor:
    """Finds the logits in what a network returned without being given labels.

    Args:
        outputs: a ModelOutput or dict with "logits", a tuple or list whose first entry they are, or the tensor itself.

    Raises:
        ValueError: a dict without "logits".
        TypeError: anything else.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise ValueError(f"model output: got the keys {', '.join(outputs)}, expected 'logits' among them.")
        return outputs["logits"]
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise TypeError(
        f"model output: got {type(outputs).__name__}, expected a ModelOutput or dict with 'logits', a tuple that "
        "starts with them, or a tensor."
    )


def _accepted_arguments(module: nn.Module) -> set[str] | None:
    """Names that forward takes, or None where it takes any."""
    parameters = _forward_parameters(module)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return set(parameters)


def _forward_parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    signature = getattr(module, "forward_signature", None)
    return (signature or inspect.signature(module.forward)).parameters


def _storage(parameter: nn.Parameter) -> int:
    # Compared by memory, not by object: a view or a tied tensor of the student is a shared parameter too.
    return 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()


def _check_same_classes(teacher: nn.Module, student: nn.Module) -> None:
    (what, theirs), (_, ours) = _classes(teacher), _classes(student)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(
            f"teacher: has {theirs} {what}, the student {ours}; expected the same number, since the student is taught "
            "class by class. Build the student for the teacher's classes."
        )
    if what == "labels":
        their_names, our_names = teacher.config.id2label or {}, student.config.id2label or {}
        for index in sorted(set(their_names) & set(our_names)):
            if their_names[index] != our_names[index]:
                raise ValueError(
                    f"teacher: class {index} is called {their_names[index]!r}, by the student {our_names[index]!r}; "
                    "expected the same names in the same order. Train both on one dataset, or set id2label alike."
                )


def _classes(module: nn.Module) -> tuple[str, int | None]:
    """What the last axis of the logits counts, and how far, as far as a transformers config tells."""
    config = getattr(module, "config", None)
    if not hasattr(config, "id2label") or not hasattr(module, "get_output_embeddings"):
        return "classes", None
    if module.get_output_embeddings() is not None:
        return "words", config.get_text_config().vocab_size
    return "labels", config.num_labels
