"""One training of the benchmark of peers, in a process of its own: what is trained, the clock, and the check.

A peer runs its own loop; nothing in it is replaced. The clock and the check stand outside: hooks on the optimizer that
the peer steps, and on the networks it calls. See `tests.benchmarks.peers`.
"""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from born_again.lineage.machine import has_fast_bf16, peak_memory_mib

CHECK_STEPS = 4
EXACT = 1e-6  # what a right gradient may differ by, relative; both are in float64


@dataclass
class Run:
    """What one child does.

    Args:
        folder: where the parent put the data.
        batch: items of a micro-batch.
        warm_up: optimisation steps before the clock starts.
        steps: optimisation steps that are timed; one more follows, so that no step is timed in which a loader that
            reads ahead has nothing left to read.
        equal: at equal precision: autocast, channels_last and ready batches for everyone.
        checked: temperature 1, the teacher only, float64, no clipping: what is compared with the twin.
        accumulate: micro-batches of a step.
        model: of the images.
    """

    folder: Path
    batch: int
    warm_up: int
    steps: int
    equal: bool = False
    checked: bool = False
    accumulate: int = 1
    model: str = "wide_resnet16_1_cifar"
    device: torch.device = field(
        default_factory=lambda: torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    )

    @property
    def all_steps(self) -> int:
        return self.warm_up + self.steps + 1

    @property
    def items(self) -> int:
        """How many the training set holds: one epoch, by full batches."""
        return self.all_steps * self.accumulate * self.batch

    @property
    def bf16(self) -> bool:
        return self.equal and has_fast_bf16()

    @property
    def plain(self) -> bool:
        """Whether the objective is the same for everyone, as far as the options of a peer allow it."""
        return self.equal or self.checked

    def forbid_accumulation(self, why: str) -> None:
        if self.accumulate > 1:
            raise NotImplementedError(why)


class Watch:
    """The clock, the memory and the first gradient, from hooks on an optimizer and two networks."""

    def __init__(self, run: Run, student: nn.Module, teacher: nn.Module) -> None:
        self.run, self.student, self.teacher = run, student, teacher
        self.inputs: list[Tensor] = []
        self.gradient: Tensor | None = None
        self.teacher_modes: set[bool] = set()
        self.buffers = [buffer.clone() for buffer in teacher.buffers()]
        self.done = 0
        if run.checked:
            # Some peers are given the timm network itself, which the classifier calls as well.
            getattr(student, "timm_model", student).register_forward_pre_hook(self._student_asked, with_kwargs=True)
            getattr(teacher, "timm_model", teacher).register_forward_pre_hook(self._teacher_asked, with_kwargs=True)

    def attach(self, optimizer: Any) -> None:
        """To the torch optimizer, from under accelerate's where there is one."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _student_asked(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        args, kwargs = _in_float64(args, kwargs)
        # In eval mode it is a trial of one item, before training, and no part of the gradient.
        if self.gradient is None and module.training:
            given = [*args, *(kwargs.get(name) for name in ("x", "pixel_values", "input_ids"))]
            self.inputs.append(next(value for value in given if torch.is_tensor(value)).detach().clone())
        return args, kwargs

    def _teacher_asked(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        self.teacher_modes.add(module.training)
        return _in_float64(args, kwargs)

    def _before_step(self, *_: Any) -> None:
        if self.run.checked and self.gradient is None:
            self.gradient = _flat_gradient(self.student)

    def _after_step(self, *_: Any) -> None:
        self.done += 1
        if self.done in (self.run.warm_up, self.run.warm_up + self.run.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter(), time.process_time()
            if self.done == self.run.warm_up:
                self.start = now
            else:
                self.seconds, self.cpu_seconds = (end - begin for end, begin in zip(now, self.start, strict=True))


class Attach(TrainerCallback):
    """Hands the optimizer that a Trainer made to the watch."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.watch.attach(optimizer)


class Logits(nn.Module):
    """A network as a peer takes it: tensor in, logits (items, classes) out, float32 in autocast at equal precision.

    Peers without an option for autocast get it so; accelerate does the same to a network that it prepares.
    """

    def __init__(self, run: Run, network: nn.Module, logits: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.logits = network, logits
        self.autocast = {"device_type": run.device.type, "dtype": torch.bfloat16, "enabled": run.bf16}

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(**self.autocast):
            logits = self.logits(self.network, x)
        return logits.float() if logits.dtype == torch.bfloat16 else logits


@contextmanager
def stand_ins(**modules: dict[str, Any]) -> Iterator[None]:
    """Names that a peer imports and does not need here, for the time of its import; "__" stands for a dot."""
    added = {name.replace("__", "."): values for name, values in modules.items()}
    added = {name: values for name, values in added.items() if name not in sys.modules}
    for name, values in added.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(values)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


Variant = Callable[[Run, nn.Module, nn.Module, Watch], None]


def measure(run: Run, variant: Variant, networks: Callable[[Run], tuple[nn.Module, nn.Module]]) -> dict[str, float]:
    """Trains `variant`; returns seconds, cpu_seconds of the timed steps, and peak memory in MiB of the process."""
    student, teacher = networks(run)
    watch = Watch(run, student, teacher)
    before = _resident_mib()
    variant(run, student, teacher, watch)
    peak = peak_memory_mib()
    return {
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "peak_mib": peak,
        "training_mib": peak if torch.cuda.is_available() else peak - before,
    }


def check(
    run: Run,
    variant: Variant,
    networks: Callable[[Run], tuple[nn.Module, nn.Module]],
    logits: Callable[[nn.Module, Tensor], Tensor],
) -> dict[str, Any]:
    """Trains a few steps of `variant` and compares the first gradient with the float64 twin of the paper's loss.

    Returns:
        teacher_eval: whether the teacher was in eval mode at every forward; teacher_unchanged: whether its
        buffers are what they were; factor and error: the gradient is `factor` times the twin's, up to `error`
        (norm of the difference over the norm).
    """
    student, teacher = networks(run)
    # In float32 a few activations out of millions fall on the other side of a ReLU, worth 1e-4 of a gradient.
    student, teacher = student.double(), teacher.double()
    twins = copy.deepcopy(student), copy.deepcopy(teacher)
    watch = Watch(run, student, teacher.train())  # as a network is when its weights have just been loaded
    variant(run, student, teacher, watch)
    right = twin_gradient(*twins, watch.inputs, logits)
    factor = (watch.gradient @ right / (right @ right)).item()
    error = (watch.gradient - factor * right).norm() / (factor * right).norm()
    same = all(map(torch.equal, watch.buffers, (buffer.to(old.device) for buffer, old in _pairs(teacher, watch))))
    return {
        "teacher_eval": watch.teacher_modes == {False},
        "teacher_unchanged": same,
        "factor": factor,
        "error": error.item(),
    }


def twin_gradient(
    student: nn.Module,
    teacher: nn.Module,
    batches: list[Tensor],
    logits: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """Gradient of -sum_i p_i log q_i, mean over the items of all micro-batches, in float64, on the CPU."""
    student.cpu().train()
    teacher.cpu().eval()
    items = 0
    for batch in batches:
        batch = batch.cpu()
        with torch.no_grad():
            p = logits(teacher, batch).softmax(-1)
        loss = -(p * logits(student, batch).log_softmax(-1)).sum()
        loss.backward()
        items += len(p)
    return _flat_gradient(student) / items


def _in_float64(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Images as a network in float64 takes them; words as they are."""

    def widen(value: Any) -> Any:
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    return tuple(map(widen, args)), {name: widen(value) for name, value in kwargs.items()}


def _pairs(teacher: nn.Module, watch: Watch) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(teacher.buffers(), watch.buffers, strict=True)


def _flat_gradient(network: nn.Module) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().double().cpu()
            for weight in network.parameters()
        ]
    )


def _resident_mib() -> int:
    """Resident memory now, where /proc tells; else the most so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() >> 20
    return peak_memory_mib() or 0
