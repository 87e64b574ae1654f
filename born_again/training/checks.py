"""Validation of arguments and labels, and detection of losses that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from born_again.objectives import IGNORED
from born_again.training.environment import check_engine
from born_again.training.sharding import local_part


def validate_arguments(
    trainer: Trainer,
    student: nn.Module,
    where: str = "beside a teacher",
    teachers: Sequence[nn.Module] = (),
    has_label_term: bool | None = True,
) -> None:
    """Validates arguments and networks: refuses what would change or break a loss that the trainer computes.

    Args:
        trainer: with its arguments and label names.
        student: unwrapped.
        where: for the messages.
        teachers: none where labels alone train.
        has_label_term: whether the loss has a term with the labels; None where a function alone knows.

    Raises:
        ValueError: several GPUs for one process, an engine that is not used or not known, uneven batches, smoothed
            labels without a term that reads them, a fused loss, another loss function, several labels, or a network
            whose classes do not exclude each other.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: {args.n_gpu} GPUs are visible to one process, which torch.nn.DataParallel would share with a "
            "wrong loss scale; start one process for each with `accelerate launch` or `torchrun`, or show it one GPU "
            "with CUDA_VISIBLE_DEVICES."
        )
    check_engine(trainer, student)
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            f"accelerator_config: got even_batches=False on {args.world_size} processes, where one that has no rows "
            "left at the end of an epoch would read on in the next; expected True: rows that are repeated to fill the "
            "last batch do not count."
        )
    sizes = {"train": args.train_batch_size, "eval": 0 if trainer.eval_dataset is None else args.eval_batch_size}
    for split, size in sizes.items() if args.accelerator_config.split_batches else ():
        if size % args.world_size:
            raise ValueError(
                f"per_device_{split}_batch_size: got {size} with split_batches=True, which shares every batch out to "
                f"{args.world_size} processes, expected a multiple of {args.world_size}."
            )
    smoothing = args.label_smoothing_factor
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing_factor: got {smoothing} {where}, expected 0 to 1; 0.1 is usual.")
    if smoothing and teachers and not has_label_term:
        raise ValueError(
            f"label_smoothing_factor: got {smoothing} {where}, expected 0: "
            + (
                f"objective {args.objective!r} has no term with the labels; take 'ban+l' or 'cwtm', or smooth the "
                "labels of the teacher's own training alone."
                if has_label_term is False
                else "a function as objective is given the labels, and smooths them itself."
            )
        )
    if args.use_liger_kernel:
        raise ValueError(
            f"use_liger_kernel: got True {where}, expected False: its fused loss reads the labels itself and gives no "
            "logits; loss_implementation='chunked' saves the same memory. Liger's other kernels can be applied to the "
            "model before it is handed over."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(f"compute_loss_func: got a function {where}, expected None: see `objective`.")
    if len(trainer.label_names) > 1:
        raise ValueError(
            f"label_names: got {trainer.label_names}, expected one name, for example ['labels']: a student is taught "
            "one row of logits for each label."
        )
    for whose, network in (("student's", student), *(("teacher's", teacher) for teacher in teachers)):
        check_problem(network, whose, where)


def check_problem(network: nn.Module, whose: str, where: str) -> None:
    """Refuses a network whose classes do not exclude each other.

    Args:
        network: as its config describes it.
        whose: it is, for the message: "student's".
        where: likewise.

    Raises:
        ValueError: its config means regression or several labels.
    """
    problem = _problem(network)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"problem_type: the {whose} config means {problem!r} {where}, by its problem_type or num_labels; "
            "expected single-label classification or language modelling, whose classes exclude each other."
        )


def _problem(network: nn.Module) -> str | None:
    """What a network of transformers is for, as its own loss would read its config; None for language models."""
    find, config = getattr(network, "get_output_embeddings", None), getattr(network, "config", None)
    if find is not None and find() is not None:
        return None
    problem = getattr(config, "problem_type", None)
    if problem is None and getattr(config, "num_labels", None) == 1:
        return "regression"  # transformers' own reading of a single label
    return problem


def narrow_weights(student: nn.Module) -> str | None:
    """A warning for trained weights narrower than float32, as a student has them by its teacher's config.

    An optimizer adds to a weight updates that are hundreds of times smaller, which such weights round away.

    Args:
        student: as it is trained.

    Returns:
        A warning, or None where every trained weight has 32 bits or more.
    """
    narrow = [
        (name, parameter.dtype)
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype.itemsize < 4
    ]
    if not narrow:
        return None
    name, dtype = narrow[0]
    return (
        f"{len(narrow)} trained parameters of the student, {name} the first, are {dtype}: updates smaller than about "
        f"{torch.finfo(dtype).eps / 2:.1g} of a weight are rounded away, and the student learns less, without an "
        "error. Build it with dtype=torch.float32, as in from_config(teacher.config, dtype=torch.float32), since a "
        "config brings the dtype of the weights it was saved with; bf16=True computes in bfloat16 all the same."
    )


def class_numbers(labels: Any, column: str) -> Tensor:
    """The labels of a batch as int64.

    Args:
        labels: of any integer dtype, or bool.
        column: where they come from, for the message.

    Raises:
        ValueError: no tensor, or one of floats, such as the soft labels of mixup.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{column}: got {type(labels).__name__} in a batch, expected a tensor of class numbers; have the collator "
            "make one."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{column}: got {labels.dtype} of shape {tuple(labels.shape)} in a batch, expected class numbers of an "
            f"integer dtype, {IGNORED} for items that do not count. Class numbers that are stored as floats: cast the "
            "column to int64. Soft labels, as mixup and CutMix make them, are not read here: leave them out, or mix "
            "the images alone, since a teacher gives a distribution for a mixed image by itself."
        )
    return labels.long()


class LabelRange:
    """Tracks the smallest and the largest label of a training, and raises where they are no classes.

    On a CPU a batch is checked when it is seen, before a kernel fails on it. Another device is not synchronised: the
    losses take any class for a label that is none, and `check` reads what was seen.

    Args:
        column: of the labels, for the message.

    Attributes:
        unread: what was seen since the last check, which may be moved to another device.
    """

    def __init__(self, column: str = "labels") -> None:
        self.column = column
        self.unread: Tensor | None = None  # (2,): minus the smallest, and the largest label above the last class
        self._classes = 0

    def see(self, targets: Tensor, classes: int) -> None:
        """Records a batch.

        Args:
            targets: (items,) int64, `IGNORED` for items that do not count.
            classes: how many the logits have.

        Raises:
            ValueError: a label is no class; on a CPU.
        """
        if targets.numel() == 0:
            return
        low, high = torch.aminmax(targets.where(targets != IGNORED, 0))
        seen = torch.stack([-low, high - (classes - 1)])
        self.unread = seen if self.unread is None else self.unread.maximum(seen)
        self._classes = classes
        if targets.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Checks the labels seen since the last check.

        Raises:
            ValueError: a label was no class; names the column and one such label.
        """
        if self.unread is None:
            return
        (below, above), self.unread = self.unread.tolist(), None
        self.check_range(-below, self._classes - 1 + above, self._classes)

    def check_range(self, low: int, high: int, classes: int) -> None:
        """Checks labels of which the smallest and the largest are known; raises as `check` does."""
        if low >= 0 and high < classes:
            return
        self._classes, label = classes, low if low < 0 else high
        raise ValueError(
            f"{self.column}: got {label} in a batch, expected class numbers 0 to {self._classes - 1}, or {IGNORED} "
            "for items that do not count. Number the classes from 0, leave rows without a label out (often "
            "marked by -1), or build the networks for more classes."
        )


_REMEDY = "Lower learning_rate, clip with max_grad_norm, or train without fp16."


class DivergenceGuard:
    """Records, on the device, the first step whose loss was not finite; raises when it is checked.

    A check reads a number from the device. Check where the host waits for it anyway, and before weights are saved.
    """

    _FOLDED = 64  # losses kept, before they are folded into one number

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None
        self._losses: list[Tensor] = []
        self._steps: list[int] = []

    def see(self, loss: Tensor, step: int) -> None:
        """Records the loss of a step.

        Args:
            loss: scalar, on any device.
            step: counted from 1.
        """
        self._losses.append(loss)
        self._steps.append(step)
        if len(self._losses) == self._FOLDED:
            self._fold()

    def _fold(self) -> None:
        losses = torch.stack(self._losses)
        steps = torch.tensor(self._steps).to(losses.device, non_blocking=True)
        bad = steps.where(~losses.isfinite(), torch.iinfo(steps.dtype).max).min()
        self._first_bad = bad if self._first_bad is None else self._first_bad.minimum(bad)
        self._losses, self._steps = [], []

    @property
    def unread(self) -> Tensor | None:
        """What was seen since the last check, which may be moved to another device."""
        if self._losses:
            self._fold()
        return self._first_bad

    @unread.setter
    def unread(self, value: Tensor | None) -> None:
        self._first_bad = value

    def check_loss(self, steps: int) -> None:
        """Checks the losses seen since the last check.

        Args:
            steps: of the whole training, for the message.

        Raises:
            FloatingPointError: a loss was NaN or infinite; names its step.
        """
        first_bad, self.unread = self.unread, None
        if first_bad is None:
            return
        bad = first_bad.item()
        if bad <= steps:
            raise FloatingPointError(
                f"loss: not finite at step {bad} of {steps}; training stops, and checkpoints saved before remain. "
                + _REMEDY
            )

    def check_weights(
        self, model: nn.Module, step: int, steps: int, sum_over_processes: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        """Checks the trained weights, which an infinite gradient of a finite loss may have made infinite.

        Frozen ones may hold an infinity on purpose, such as a mask. Every process must call it together, since each
        may have a shard of the weights.

        Raises:
            FloatingPointError: a weight is NaN or infinite; names `step` of `steps`.
        """
        found: dict[torch.device, list[Tensor]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.is_meta:
                part = local_part(parameter)
                found.setdefault(part.device, []).append(part.isfinite().all())
        bad = sum(bool(torch.stack(finite).logical_not().any()) for finite in found.values())
        device = next(iter(found), torch.device("cpu"))
        if sum_over_processes(torch.tensor(bad, device=device)):
            raise FloatingPointError(
                f"weights: not finite after step {step} of {steps}; training stops, and checkpoints saved before "
                "remain. " + _REMEDY
            )
