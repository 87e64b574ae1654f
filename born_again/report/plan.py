"""What a lineage will need on some processes: memory of each, communication of a step, hours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from born_again.models.language_models import CONFIGURATIONS, check_model_args, create_language_model
from born_again.objectives import OBJECTIVES
from born_again.report.step_memory import cast, made_without_data, step_memory, without_data
from born_again.teacher import positions
from born_again.teacher.output_layer import output_layer
from born_again.training.step_loss import CHUNKED_FROM

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
# States of a parameter's size that an optimizer keeps, in float32.
OPTIMIZERS = {"sgd": 0, "sgd-momentum": 1, "adamw": 2}
PLACEMENTS = ("replicated", "sharded")
_WIDE = 4  # bytes of float32, in which weights, gradients and optimizer state are kept
_BUCKET = 5 * 10**8  # elements that DeepSpeed's ZeRO-2 reduces at a time, by default
LABEL = "label"


@dataclass(frozen=True)
class PlannedStep:
    """A step of a generation.

    Args:
        model: a timm architecture; a language model of this package; a model type of transformers, such as "llama";
            or a folder or Hub id with the configuration of a causal language model.
        batch: rows of an optimisation step, of all processes and accumulated micro-batches together.
        processes: one for each GPU.
        engine: "ddp" (with one process nothing is exchanged), "fsdp2", "zero2" or "zero3".
        accumulation: micro-batches of a step.
        model_args: of the architecture.
        classes: of an image network.
        image_size: side in pixels, of an image network.
        vocabulary: tokens, of a language model.
        window: tokens of a row, of a language model.
        precision: of the computation, "bf16" or "float32"; weights are kept in float32.
        optimizer: one of `OPTIMIZERS`.
        objective: that a student is taught by, or "label" for generation 0.
        teacher_precision: "inference", "autocast" or "float32".
        teacher_placement: "replicated" on every process, or "sharded" over them.
        gradient_checkpointing: whether activations are computed twice instead of kept.
        device: "gpu" or "cpu". On a GPU torch's optimizers copy all gradients once while they update; on a CPU oneDNN
            copies the weights and gradients of an LSTM layer.

    Raises:
        ValueError: a value that there is none of, or rows that processes cannot share.
    """

    model: str
    batch: int
    processes: int = 1
    engine: str = "ddp"
    accumulation: int = 1
    model_args: Mapping[str, Any] | None = None
    classes: int = 10
    image_size: int = 32
    vocabulary: int = 10000
    window: int = 35
    precision: str = "bf16"
    optimizer: str = "sgd-momentum"
    objective: str = "ban"
    teacher_precision: str = "inference"
    teacher_placement: str = "replicated"
    gradient_checkpointing: bool = False
    device: str = "gpu"

    def __post_init__(self) -> None:
        for name in ("batch", "processes", "accumulation", "classes", "image_size", "vocabulary", "window"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number of 1 or more.")
        for name, known in (
            ("engine", ENGINES),
            ("precision", tuple(PRECISIONS)),
            ("optimizer", tuple(OPTIMIZERS)),
            ("objective", (LABEL, *OBJECTIVES)),
            ("teacher_precision", ("inference", "autocast", "float32")),
            ("teacher_placement", PLACEMENTS),
            ("device", ("gpu", "cpu")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}.")
        if self.teacher_placement == "sharded" and self.engine == "ddp":
            raise ValueError(
                "teacher_placement: got 'sharded' with engine 'ddp', under which every process has the whole teacher; "
                "expected 'replicated', or an engine that shards: fsdp2, zero2 or zero3."
            )
        share = self.processes * self.accumulation
        if self.batch % share:
            raise ValueError(
                f"batch: got {self.batch} rows for {self.processes} processes x {self.accumulation} accumulated "
                f"micro-batches, expected a multiple of {share}, such as {-(-self.batch // share) * share}: the rows "
                "of a step are shared evenly."
            )

    @property
    def rows(self) -> int:
        """Of a micro-batch of one process."""
        return self.batch // (self.processes * self.accumulation)

    @property
    def is_image(self) -> bool:
        return self.model not in CONFIGURATIONS and timm.is_model(self.model)


def plan(step: PlannedStep) -> dict[str, Any]:
    """Memory and communication of a step, computed from the networks' shapes; no weights are allocated.

    Activations are counted by running the step on tensors without data (`born_again.report.step_memory`), the rest is
    that of the engine: for DDP, FSDP2 and ZeRO what they keep, by Rajbhandari et al. 2020 (arXiv 1910.02054),
    tables 1 and 5.1, with the buffers that torch and DeepSpeed add.

    Not counted: the process itself (Python, libraries, about half a GiB of CUDA context), the data, the workspace of
    cuDNN and oneDNN, and what an allocator leaves unused.

    Returns:
        "parameters", "trainable", "loss_implementation"; "memory", bytes of each process by part at the moment when
        they are most, whose sum is "peak"; "communication", bytes that each process sends in an optimisation step, by
        part, whose sum is "total".

    Raises:
        ValueError: a model, or an argument of it, that is not known; a window beyond the model's positions.
    """
    dtype = PRECISIONS[step.precision]
    narrow = dtype.itemsize
    with without_data():
        student, teacher = _network(step).train(), None
        sizes = _Sizes.of(student)
        if step.objective != LABEL:
            teacher = _network(step).requires_grad_(False).eval()
            if step.teacher_precision == "inference":
                teacher = cast(teacher, dtype)
        taught_in = None if teacher is None else dtype if step.teacher_precision == "inference" else torch.float32
        keeps_gathered = step.engine in ("fsdp2", "zero2", "zero3")
        if keeps_gathered:  # mixed precision is the engine's then: weights arrive in it, and autocast copies none
            student = cast(student, dtype)
        inputs = _inputs(step)
        chunked = _is_chunked(step, student)
        counted = step_memory(
            student,
            teacher,
            inputs,
            dtype=dtype,
            chunked=chunked,
            accumulated=step.accumulation > 1,
            counts_gradients=not keeps_gathered,
        )
        batch = sum(tensor.untyped_storage().nbytes() for tensor in inputs.values())
    memory = {
        **_engine_memory(step, sizes, narrow, counted.gradients),
        "activations": counted.activations,
        "logits": counted.logits,
        "batch": batch * step.accumulation,
        "teacher": 0 if taught_in is None else _teacher_memory(step, sizes, taught_in.itemsize),
    }
    if step.device == "cpu":
        memory["activations"] += 2 * _WIDE * sizes.recurrent_layer
    # When the optimizer works all gradients are there, and no activations.
    whole = _WIDE * sizes.trainable // (1 if step.engine == "ddp" else step.processes)
    temporaries = whole if step.device == "gpu" and OPTIMIZERS[step.optimizer] else 0
    updating = {**memory, "gradients": max(memory["gradients"], whole), "activations": temporaries, "logits": 0}
    memory = max(memory, updating, key=lambda parts: sum(parts.values()))
    communication = _communication(step, sizes, narrow, taught_in)
    return {
        "parameters": sizes.parameters,
        "trainable": sizes.trainable,
        "loss_implementation": "chunked" if chunked else "full",
        "memory": {**memory, "peak": sum(memory.values())},
        "communication": {**communication, "total": sum(communication.values())},
    }


def hours(
    step: PlannedStep,
    *,
    samples: int,
    epochs: float,
    generations: int,
    step_seconds: float,
    label_step_seconds: float | None = None,
) -> dict[str, Any]:
    """How long a lineage trains, from the measured time of a step; evaluations and checkpoints come on top.

    Args:
        step: of a student.
        samples: rows of the training set.
        epochs: of each generation.
        generations: students after the teacher.
        step_seconds: of an optimisation step of a student, measured.
        label_step_seconds: of one of generation 0; as long as a student's when None, which is more than it takes.

    Raises:
        ValueError: a number out of range.
    """
    given = {"samples": samples, "epochs": epochs, "step_seconds": step_seconds}
    if label_step_seconds is not None:
        given["label_step_seconds"] = label_step_seconds
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value!r}, expected a number above 0.")
    if generations < 0:
        raise ValueError(f"generations: got {generations}, expected 0 or more.")
    steps = math.ceil(math.ceil(samples / step.batch) * epochs)
    teacher = steps * (step_seconds if label_step_seconds is None else label_step_seconds) / 3600
    student = steps * step_seconds / 3600
    return {
        "steps": steps,
        "teacher": teacher,
        "student": student,
        "lineage": teacher + generations * student,
    }


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a network's elements: of all parameters, of its largest block, of what is in no block, of an LSTM."""

    parameters: int
    trainable: int
    buffers: int
    block: int
    root: int
    recurrent_layer: int

    @classmethod
    def of(cls, network: nn.Module) -> _Sizes:
        parameters = [*network.parameters()]
        kinds = getattr(network, "_no_split_modules", None) or ()
        blocks = [module for module in network.modules() if type(module).__name__ in kinds]
        blocks = blocks or [child for child in network.children() if any(True for _ in child.parameters())]
        counts = [_elements(block) for block in blocks]
        total = _elements(network)
        return cls(
            parameters=total,
            trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            buffers=sum(buffer.numel() for buffer in network.buffers()),
            block=max(counts),
            root=max(0, total - sum(counts)),
            recurrent_layer=max((_elements(m) for m in network.modules() if isinstance(m, nn.RNNBase)), default=0),
        )

    @property
    def gathered(self) -> int:
        """Parameters that are whole at a time: those in no block, a block, and the next one, which is fetched."""
        return min(self.parameters, self.root + 2 * self.block)


def _elements(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _engine_memory(step: PlannedStep, sizes: _Sizes, narrow: int, gradients: int) -> dict[str, int]:
    shards = step.processes
    whole, trained = _WIDE * sizes.parameters, _WIDE * sizes.trainable
    states = OPTIMIZERS[step.optimizer] * trained
    buffers = _WIDE * sizes.buffers
    if step.engine == "ddp":
        return {
            "weights": whole + buffers,
            "gradients": gradients,
            "optimizer": states,
            "buckets": trained if shards > 1 else 0,  # gradients are copied into them to be reduced
        }
    if step.engine == "fsdp2":
        unreduced = narrow * (sizes.trainable if step.accumulation > 1 else sizes.gathered)
        return {
            "weights": whole // shards + buffers,
            "gradients": trained // shards,
            "optimizer": states // shards,
            "buckets": narrow * sizes.gathered + unreduced,
        }
    # DeepSpeed computes with weights of their own dtype, beside float32 ones which the optimizer updates.
    master, reduced = whole // shards, (narrow + _WIDE) * sizes.trainable // shards
    if step.engine == "zero2":
        return {
            "weights": narrow * sizes.parameters + master + buffers,
            "gradients": reduced,
            "optimizer": states // shards,
            "buckets": 2 * narrow * min(sizes.trainable, _BUCKET),  # two, while one is being reduced
        }
    return {
        "weights": narrow * sizes.parameters // shards + master + buffers,
        "gradients": reduced,
        "optimizer": states // shards,
        "buckets": 2 * narrow * sizes.gathered,
    }


def _teacher_memory(step: PlannedStep, sizes: _Sizes, itemsize: int) -> int:
    if step.teacher_placement == "sharded":
        return itemsize * (sizes.parameters // step.processes + sizes.gathered)
    # The network that was loaded, and its copy for inference.
    loaded = _WIDE * (sizes.parameters + sizes.buffers)
    return loaded + (itemsize * sizes.parameters if step.teacher_precision == "inference" else 0)


def _communication(step: PlannedStep, sizes: _Sizes, narrow: int, taught_in: torch.dtype | None) -> dict[str, int]:
    """Bytes that a process sends, by rings: (N - 1) / N of a tensor to gather or to reduce and scatter it."""

    def ring(elements: int, itemsize: int, times: int = 1) -> int:
        return times * itemsize * elements * (step.processes - 1) // step.processes

    micro = step.accumulation
    if step.engine == "ddp":
        sent = {
            "gradients": ring(sizes.trainable, _WIDE, 2),
            "buffers": _WIDE * sizes.buffers * micro * (step.processes > 1),
        }
    elif step.engine == "zero2":
        sent = {"gradients": ring(sizes.trainable, narrow, micro), "weights": ring(sizes.parameters, narrow)}
    else:
        reductions = 1 if step.engine == "fsdp2" else micro
        sent = {
            "gradients": ring(sizes.trainable, narrow, reductions),
            "weights": ring(sizes.parameters, narrow, 2 * micro),  # for the forward and for the backward pass
        }
    if taught_in is not None and step.teacher_placement == "sharded":
        sent["teacher"] = ring(sizes.parameters, taught_in.itemsize, micro)
    return sent


def _network(step: PlannedStep) -> nn.Module:
    arguments = dict(step.model_args or {})
    if step.is_image:
        network: Any = made_without_data(lambda: timm.create_model(step.model, num_classes=step.classes, **arguments))
        if step.gradient_checkpointing:
            network.set_grad_checkpointing(True)
        return network
    if step.model in CONFIG_MAPPING and step.model not in CONFIGURATIONS:
        kind = CONFIG_MAPPING[step.model]
        if kind not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"model: {step.model!r} is no causal language model of transformers, nor one of timm.")
        # Its own special ids may be beyond this vocabulary.
        ids = {"vocab_size": step.vocabulary, "bos_token_id": None, "eos_token_id": None}
        network = AutoModelForCausalLM.from_config(kind(**ids, **check_model_args(kind, arguments)))
    else:
        words = [f"{number}" for number in range(step.vocabulary - 1)]
        network = create_language_model(step.model, [*words, "<eos>"], **arguments)
    limit = positions(network)
    if limit is not None and step.window > limit:
        raise ValueError(
            f"window: got {step.window}, expected at most the {limit} positions of {step.model!r}; use a shorter one, "
            "or more positions (max_position_embeddings in model_args)."
        )
    if step.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    return network


def _inputs(step: PlannedStep) -> dict[str, torch.Tensor]:
    if step.is_image:
        return {"pixel_values": torch.empty(step.rows, 3, step.image_size, step.image_size)}
    return {"input_ids": torch.zeros(step.rows, step.window, dtype=torch.int64)}


def _is_chunked(step: PlannedStep, student: nn.Module) -> bool:
    """Whether loss_implementation "auto" would be "chunked"."""
    return (
        not step.is_image
        and step.engine == "ddp"
        and output_layer(student) is not None
        and step.rows * step.window * step.vocabulary >= CHUNKED_FROM
    )
