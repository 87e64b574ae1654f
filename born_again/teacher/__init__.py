"""The frozen teacher: eval mode, device, precision, and the mean of several."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from born_again.objectives import widened
from born_again.teacher.graphs import GraphedForward, copied
from born_again.teacher.inputs import (
    NetworkInputs,
    cast_floating,
    forward_parameters,
    input_dtype,
    makes_decoder_inputs,
    unwrapped,
    with_decoder_inputs,
)
from born_again.teacher.precision import fold_and_cast
from born_again.teacher.preprocessing import Preprocessing, TeacherPixels

logger = logging.getLogger(__name__)

PRECISIONS = ("autocast", "inference", "float32")
# Of torch.compile: their outputs are overwritten by the next call.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
# The recurrent networks here, whose code was published beside weights before it had the attribute `carries_state`.
_CARRIES_STATE_UNDECLARED = ("lstm_lm", "char_cnn_lstm")


class FrozenTeacher:
    """One or more frozen networks that compute logits.

    Not an nn.Module on purpose: as a trainer's attribute it is in no module tree, so that no train() reaches it, no
    optimizer steps it, no checkpoint stores it and no wrapper for distributed training touches it. The networks given
    are put in eval mode and frozen where they are, by `to` or at the first batch.

    Args:
        teachers: a network, or a sequence of networks that teach as the mean of their probabilities (the paper's
            equation 4 turned into a teacher).

    Attributes:
        modules: the networks that are called; with precision "inference", from the first batch on, private copies.
        inputs: what of a batch each of them reads.
        precision: see `set_precision`.
        columns: how many classes of several networks are averaged, where they have more (padded vocabularies).

    Raises:
        TypeError: something that is no nn.Module.
        ValueError: an empty sequence; a network whose weights are offloaded or on several devices.
    """

    def __init__(self, teachers: nn.Module | Sequence[nn.Module]) -> None:
        self._given = _networks(teachers)
        self.modules = list(self._given)
        self.carries_state = [carries_state(module) for module in self.modules]
        self._positions = [positions(module) for module in self.modules]
        self.warn: Callable[[str], None] = logger.warning  # a trainer sets its own, of the first process alone
        self.inputs = [NetworkInputs(module, "teacher") for module in self.modules]
        self._pixels = [TeacherPixels() for _ in self.modules]
        self.precision = PRECISIONS[0]
        self.columns: int | None = None
        self._dtype: torch.dtype | None = None
        self._device: torch.device | None = None
        self._memory_format: torch.memory_format | None = None
        self._compile: dict[str, Any] | None = None
        self._graphs: dict[str, Any] | None = None
        self._callable: list[Any] | None = None  # the modules, compiled or captured or not, once they are prepared
        self._dtypes: list[torch.dtype | None] = [None] * len(self.modules)  # of their floating inputs, once prepared

    def set_precision(self, precision: str, dtype: torch.dtype | None = None) -> FrozenTeacher:
        """Sets the precision that the networks compute in; before `to` and before the first batch.

        Args:
            precision: "autocast" (as the caller's autocast context says), "inference" (private copies with
                BatchNorm folded, see `born_again.teacher.precision`, made at the first batch; those given are left as
                and where they are) or "float32" (outside autocast; private copies where weights are narrower).
            dtype: of the weights of the folded copies; None keeps their own.
        """
        self.precision, self._dtype = precision, dtype
        if precision == "float32":
            self.modules = [_widened_copy(module) if _is_narrow(module) else module for module in self.modules]
        return self

    def freeze(self) -> FrozenTeacher:
        """Puts every network in eval mode and freezes it, those given and copies of them.

        Apart from the constructor, so that a teacher that is refused is left as it was.
        """
        for module in (*self._given, *self.modules):
            module.eval().requires_grad_(False)
        self._given = []  # beside copies they are not needed
        return self

    def give_own_pixels(
        self, given: Preprocessing | None, processors: Any, say: Callable[[str], None]
    ) -> FrozenTeacher:
        """Has every network given the pixel values it was trained on, where they and the student's are known.

        Args:
            given: of the student's pixel values, see `born_again.teacher.preprocessing`.
            processors: the image processor of the teacher, or a list with one for each network; None or anything else
                leaves it to what each network says.
            say: is handed what a user must know, once.

        Raises:
            ValueError: another number of channels; a list of another length.
        """
        self._pixels = [
            TeacherPixels(module, given, processor, say)
            for module, processor in zip(self.modules, self.processors(processors), strict=True)
        ]
        return self

    def to(self, device: torch.device, memory_format: torch.memory_format | None = None) -> FrozenTeacher:
        """Freezes every network and moves it to a device, and its 4-d weights to a memory format where one is given.

        Raises:
            ValueError: a network that cannot be moved there.
        """
        self.freeze()
        self._device, self._memory_format = device, memory_format
        if self.precision != "inference":
            for module in self.modules:
                self._place(module)
        return self

    @property
    def device(self) -> torch.device:
        """The device of its outputs."""
        return self._device or next(self.modules[0].parameters()).device

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its outputs beside weights and inputs, JSON-able."""
        options = None if self._compile is None else {name: str(value) for name, value in self._compile.items()}
        facts = {"precision": self.precision, "dtype": str(self._dtype), "compile": options}
        changes = [pixels.facts for pixels in self._pixels]
        cut = {"columns": self.columns} if self.columns is not None and len(self.modules) > 1 else {}
        return {**facts, **({"pixels": changes} if any(changes) else {}), **cut}

    @property
    def is_compiled(self) -> bool:
        return self._compile is not None

    def compile(self, **options: Any) -> FrozenTeacher:
        """Has the networks compiled when they are first called.

        Args:
            **options: of torch.compile.
        """
        self._compile = options
        return self

    def capture_graphs(self, **options: Any) -> FrozenTeacher:
        """Has each network's forward replayed as a CUDA graph, where it is not compiled.

        Args:
            **options: of `born_again.teacher.graphs.GraphedForward`.
        """
        self._graphs = options
        return self

    def _place(self, module: nn.Module) -> nn.Module:
        if any(tensor.device != self._device for tensor in _tensors(module)):  # not all that is there can be moved
            try:
                module.to(device=self._device)
            except (NotImplementedError, ValueError) as error:
                raise ValueError(
                    f"teacher: {type(module).__name__} cannot be moved to {self._device} ({error}); load it there, "
                    f"with device_map={{'': '{self._device}'}}."
                ) from error
        return module if self._memory_format is None else module.to(memory_format=self._memory_format)

    def prepare(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Folds, casts and compiles the networks, at the first batch: folding has to trace a forward pass.

        Args:
            inputs: see `__call__`.

        Returns:
            The callable of each network: itself, what torch.compile returned, or a `GraphedForward`.
        """
        if self._callable is None:
            self.freeze()
            if self.precision == "inference":
                with self.precision_context():
                    self.modules = [self._folded_copy(index, inputs) for index in range(len(self.modules))]
            self._callable, self._dtypes = self.modules, [input_dtype(module) for module in self.modules]
            if self._compile is not None:
                # Not compiled in place: a network that someone else holds must not be another for it.
                self._callable = [torch.compile(_original(module), **self._compile) for module in self.modules]
            elif self._graphs is not None:
                self._callable = [self._graphed(index, **self._graphs) for index in range(len(self.modules))]
        return self._callable

    def _graphed(self, index: int, **options: Any) -> Any:
        module = self.modules[index]
        if _original(module) is not module:
            return module  # whose compiler may have graphs of its own
        return GraphedForward(
            module, lambda **arguments: self._logits_and_state(module, index, arguments), self.warn, **options
        )

    def _folded_copy(self, index: int, inputs: Mapping[str, Any]) -> nn.Module:
        network = self._place(_copied(self.modules[index]))
        arguments = self.arguments(index, inputs, network)
        with self._pixels[index].naming_sizes(inputs):
            return fold_and_cast(network, arguments, self._dtype)

    def arguments(self, index: int, inputs: Mapping[str, Any], network: nn.Module | None = None) -> dict[str, Any]:
        """What of a batch a network is called with, by name.

        Args:
            index: of the network.
            inputs: see `__call__`.
            network: a folded copy to use in its place, before `prepare` is done.

        Raises:
            ValueError: inputs that are missing, and cannot be made.
        """
        dtype = self._dtypes[index] if network is None else input_dtype(network)
        network = self.modules[index] if network is None else network
        batch = with_decoder_inputs(network, inputs)
        if batch is not inputs and makes_decoder_inputs(network, batch):
            raise ValueError(
                f"teacher: {type(unwrapped(network)).__name__} is an encoder-decoder, and how it makes decoder inputs "
                "of labels is not known; expected decoder_input_ids in the batch, which are the labels shifted to the "
                "right."
            )
        return cast_floating(self.inputs[index].of(self._pixels[index](batch)), dtype)

    def processors(self, given: Any) -> list[Any]:
        """What is given as teacher_processing_class, for each network.

        Raises:
            ValueError: a list of another length.
        """
        if not isinstance(given, list | tuple):
            return [given] * len(self.modules)
        if len(given) != len(self.modules):
            raise ValueError(
                f"teacher_processing_class: got a list of {len(given)} for {len(self.modules)} teachers, expected one "
                "for each, in their order."
            )
        return list(given)

    def check_against(self, student: nn.Module, tokens: int | None = None) -> None:
        """Refuses a teacher that cannot teach this student.

        Args:
            student: unwrapped.
            tokens: how many a tokenizer knows that both read with, None where that is not known. Language models whose
                vocabularies are larger, and of different sizes, are padded, and taught over what they have in common.

        Raises:
            ValueError: the same object, shared parameters, another number of classes or tokens, other label names.
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
            _check_same_classes(module, student, tokens)
        counts = sorted({count for what, count in map(_classes, self.modules) if what == "tokens" and count})
        if len(counts) > 1:
            raise ValueError(
                f"teacher: got networks with vocabularies of {' and '.join(map(str, counts))} tokens, expected one "
                "size, since their probabilities are averaged: call resize_token_embeddings(len(tokenizer)) on each."
            )

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """The logits of the teacher for one batch.

        Args:
            inputs: a batch, of which each network is given what it reads (`born_again.teacher.inputs`), floating
                tensors in the dtype of its weights.

        Returns:
            (..., classes), a floating point tensor without gradient. For several networks it is the logarithm of
            the mean of their probabilities, in float32 or wider, whose softmax is that mean.
        """
        return self.forward_with_states(inputs, [None] * len(self.modules))[0]

    @torch.no_grad()
    def forward_with_states(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """As a call, for networks that carry a state from one window of a text to the next.

        Args:
            inputs: see `__call__`.
            states: one for each network, as returned for the window before; None to begin, and for networks without.

        Returns:
            The logits, and the states after this window.
        """
        logits, after = self.logits_by_network(inputs, states)
        return self.ensemble_logits(logits), after

    def ensemble_logits(self, logits: Sequence[Tensor]) -> Tensor:
        """One tensor for all networks: the logits of one as they are, else the log of their mean probabilities."""
        if len(logits) == 1:
            return logits[0]
        # Before they are averaged: a probability of padding, which no text has, is each network's own.
        return mean_log_probabilities([part[..., : self.columns] for part in logits])

    @torch.no_grad()
    def logits_by_network(self, inputs: Mapping[str, Any], states: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """As `forward_with_states`, with the logits of each network for itself."""
        self._check_length(inputs)
        with self.precision_context():
            outputs = [
                self._output(called, index, inputs if state is None else {**inputs, "state": state})
                for index, (called, state) in enumerate(zip(self.prepare(inputs), states, strict=True))
            ]
        return [logits for logits, _ in outputs], [state for _, state in outputs]

    def _check_length(self, inputs: Mapping[str, Any]) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            return
        for index, (module, limit) in enumerate(zip(self.modules, self._positions, strict=True)):
            if limit is None or ids.shape[-1] <= limit:
                continue
            text = (
                f"teacher: {type(module).__name__} was made for texts of {limit} tokens "
                f"(config.max_position_embeddings), and a batch has {ids.shape[-1]}"
            )
            if _has_position_table(module):
                raise ValueError(
                    f"{text}; expected no more: truncate the texts to {limit} tokens (truncation=True, "
                    f"max_length={limit}; block_size or window {limit}), or take a teacher with more positions."
                )
            self.warn(f"{text}: its logits for the tokens after them are not what it was trained for.")
            self._positions[index] = None  # said once

    def precision_context(self) -> AbstractContextManager:
        """The autocast context in which the networks, and any layer of theirs, are called."""
        kind = (self._device or torch.device("cpu")).type
        if self.precision == "autocast" and not (torch.is_autocast_enabled(kind) and self._is_narrow_otherwise(kind)):
            return nullcontext()
        return torch.autocast(kind, enabled=False)

    def _is_narrow_otherwise(self, kind: str) -> bool:
        """Whether weights of 16 bits are not those of autocast, beside which normalisation has no kernel."""
        narrow = {input_dtype(module) for module in self.modules} & {torch.float16, torch.bfloat16}
        return bool(narrow - {torch.get_autocast_dtype(kind)})

    def _output(self, called: Any, index: int, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The logits of a network, and the state after them, None where it carries none."""
        if self.modules[index].training:
            self.modules[index].eval()
        arguments = self.arguments(index, inputs)
        with self._pixels[index].naming_sizes(inputs):
            if isinstance(called, GraphedForward):
                return called(**arguments)
            output = self._logits_and_state(called, index, arguments)
        if self._compile is not None and self._compile.get("mode") in CUDA_GRAPH_MODES:
            output = copied(output)
        return output

    def _logits_and_state(self, called: Any, index: int, arguments: Mapping[str, Any]) -> tuple[Tensor, Any]:
        output = called(**arguments)
        return logits_of(output), output.state if self.carries_state[index] else None


def carries_state(module: nn.Module) -> bool:
    """Whether a network reads a text window by window: its forward takes a `state` and its output has the next.

    It declares so by an attribute `carries_state` that is True: an argument of that name may mean anything (RWKV's
    is a list that it writes into).
    """
    network = unwrapped(module)
    says = getattr(network, "carries_state", None)
    if says is None:
        kind = getattr(getattr(network, "config", None), "model_type", None)
        return kind in _CARRIES_STATE_UNDECLARED and "state" in forward_parameters(network)
    return bool(says)


def takes_undeclared_state(module: nn.Module) -> bool:
    """Whether a network's forward takes a `state` that is not carried, since it does not declare `carries_state`."""
    return not carries_state(module) and "state" in forward_parameters(module)


def vocabulary_size(module: nn.Module) -> int | None:
    """How many tokens the logits of a language model of transformers are for; None for other networks."""
    what, count = _classes(module)
    return count if what == "tokens" else None


def positions(module: nn.Module) -> int | None:
    """How many tokens of a text a network of transformers was made for, as far as its config says."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    count = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:  # XLNet says -1
        return None
    table = next((part for part in _position_tables(module) if part.num_embeddings == count), None)
    # RoBERTa counts from behind the padding.
    return count if table is None or table.padding_idx is None else count - table.padding_idx - 1


def _has_position_table(module: nn.Module) -> bool:
    """Whether positions are looked up, so that there are none beyond the last; others, such as rotary ones, go on."""
    return next(_position_tables(module), None) is not None


def _position_tables(module: nn.Module) -> Iterator[nn.Embedding]:
    for name, part in module.named_modules():
        name = name.rpartition(".")[2]
        if isinstance(part, nn.Embedding) and (name == "wpe" or "position" in name):
            yield part


def mean_log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Equation 4 of the paper: several networks as the mean of their probabilities.

    Args:
        logits: of each network, (..., classes) of any float dtype.

    Returns:
        (..., classes), float32 or wider: the logarithm of the mean, whose softmax is the mean.

    Raises:
        ValueError: logits of different shapes.
    """
    shapes = [tuple(part.shape) for part in logits]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"logits: got shapes {', '.join(map(str, shapes))} from networks whose probabilities are averaged; "
            "expected as many items and classes from each, trained on the same classes."
        )
    log_probabilities = torch.stack([widened(part).log_softmax(-1) for part in logits])  # (networks, ..., classes)
    return log_probabilities.logsumexp(0) - math.log(len(logits))  # (..., classes)


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


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(_original(module))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"teacher_precision: 'inference' and 'float32' may need a copy of the teacher, and "
            f"{type(module).__name__} cannot be copied ({error}); expected 'autocast' for it."
        ) from error


def _widened_copy(module: nn.Module) -> nn.Module:
    widened_copy = _copied(module)
    try:
        return widened_copy.float()
    except ValueError as error:  # of transformers, for quantised weights
        raise ValueError(
            f"teacher_precision: got 'float32' for a teacher ({type(module).__name__}) whose weights cannot be "
            f"widened ({error}); expected 'autocast' for it."
        ) from error


def _original(module: nn.Module) -> nn.Module:
    """What torch.compile was given."""
    return getattr(module, "_orig_mod", module)


def _is_narrow(module: nn.Module) -> bool:
    return any(part.is_floating_point() and part.dtype.itemsize < 4 for part in module.state_dict().values())


def _storage(parameter: nn.Parameter) -> int:
    # Compared by memory, not by object: a view or a tied tensor of the student is a shared parameter too.
    part = getattr(parameter, "to_local", lambda: parameter)()  # of a network in shards
    return 0 if part.is_meta else part.untyped_storage().data_ptr()


def _check_same_classes(teacher: Any, student: Any, tokens: int | None) -> None:
    (what, theirs), (our_kind, ours) = _classes(teacher), _classes(student)
    if theirs is not None and ours is not None and theirs != ours:
        if what == our_kind == "tokens":
            _check_padded(theirs, ours, tokens)
        else:
            raise ValueError(
                f"teacher: has {theirs} {what}, the student {ours}; expected the same number, since the student is "
                "taught class by class. Build the student for the teacher's classes."
            )
    if what == our_kind == "labels":
        their_names, our_names = teacher.config.id2label or {}, student.config.id2label or {}
        for index in sorted(set(their_names) & set(our_names)):
            if their_names[index] != our_names[index]:
                raise ValueError(
                    f"teacher: class {index} is called {their_names[index]!r}, by the student {our_names[index]!r}; "
                    "expected the same names in the same order. Train both on one dataset, or set id2label alike."
                )


def _check_padded(theirs: int, ours: int, tokens: int | None) -> None:
    if tokens is not None and tokens <= min(theirs, ours):
        return
    known, remedy = f"which has {tokens}", "call resize_token_embeddings(len(tokenizer)) on the network that has fewer"
    if tokens is None:
        known = "of which that of the teacher is not known"
        remedy = (
            "with one tokenizer, give it to the trainer as processing_class and as teacher_processing_class, or call "
            "resize_token_embeddings(len(tokenizer)) on the network that has more"
        )
    raise ValueError(
        f"teacher: has {theirs} tokens, the student {ours} (config.vocab_size); expected the same number, or that "
        f"both only pad the vocabulary of one tokenizer, {known}, since the student is taught token by token: "
        f"{remedy}; else build the student for the teacher's tokenizer."
    )


def _classes(module: nn.Module) -> tuple[str, int | None]:
    """What the last axis of the logits counts, and how far, as far as a network of transformers or timm tells."""
    config, embeddings = getattr(module, "config", None), getattr(module, "get_output_embeddings", None)
    if config is None or not hasattr(config, "id2label") or embeddings is None:
        count = getattr(module, "num_classes", None) if hasattr(module, "get_classifier") else None  # of timm
        return "classes", count if isinstance(count, int) else None
    if embeddings() is not None:
        return "tokens", config.get_text_config().vocab_size
    return "labels", config.num_labels


def _networks(teachers: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    modules = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
    if not modules:
        raise ValueError("teacher: got an empty list, expected at least one network, or None to train on labels.")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"teacher: got {type(module).__name__}, expected an nn.Module or a list of them; load one with "
                "from_pretrained or load_generation first."
            )
        _check_placement(module)
    return modules


def _check_placement(module: nn.Module) -> None:
    """Refuses a network that is not whole on one device: it is moved to that of the training."""
    tensors = _tensors(module)
    away = sum(tensor.is_meta for tensor in tensors)
    devices = sorted({str(tensor.device) for tensor in tensors if not tensor.is_meta})
    if not away and len(devices) < 2 and not any(_offloads(part) for part in module.modules()):
        return
    found = f"{away} of its {len(tensors)} tensors without values in memory (device 'meta')" if away else "hooks"
    if len(devices) > 1:
        found = f"tensors on {', '.join(devices)}"
    placed = getattr(module, "hf_device_map", None)
    raise ValueError(
        f"teacher: {type(module).__name__} is spread or offloaded by accelerate: it has {found}"
        f"{'' if placed is None else f', and the device_map {placed}'}; expected all weights on one device, since a "
        "teacher is moved to the device that trains. Load it without device_map and without offloading, or with "
        "device_map={'': device} for the device of the process. Where it does not fit beside the student, load it in "
        "bfloat16 (dtype=torch.bfloat16) or in 4 bits (quantization_config=BitsAndBytesConfig(load_in_4bit=True))."
    )


def _offloads(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
