"""What a trainer that computes its own loss refuses."""

from __future__ import annotations

from torch import nn
from transformers import Trainer


def check_settings(trainer: Trainer, student: nn.Module, where: str = "beside a teacher") -> None:
    """Refuses what would change a loss that the trainer computes, or leave it without meaning.

    Args:
        trainer: with its arguments and label names.
        student: unwrapped.
        where: for the messages.

    Raises:
        ValueError: several GPUs for one process, smoothed labels, a fused loss, another loss function, several
            labels, or a student whose classes do not exclude each other.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: {args.n_gpu} GPUs are visible to one process, which torch.nn.DataParallel would share with a "
            "wrong loss scale; start one process for each with `accelerate launch` or `torchrun`, or show it one GPU "
            "with CUDA_VISIBLE_DEVICES."
        )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor} {where}, expected 0: labels are not smoothed "
            "here, and a teacher's distribution takes the place of that."
        )
    if args.use_liger_kernel:
        raise ValueError(
            f"use_liger_kernel: got True {where}, expected False: its fused loss reads the labels itself and gives no "
            "logits; loss_form='chunked' saves the same memory. Liger's other kernels can be applied to the model "
            "before it is handed over."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(f"compute_loss_func: got a function {where}, expected None: see `objective`.")
    if len(trainer.label_names) > 1:
        raise ValueError(
            f"label_names: got {trainer.label_names}, expected one name, for example ['labels']: a student is taught "
            "one row of logits for each label."
        )
    config = getattr(student, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is None and getattr(config, "num_labels", None) == 1:
        problem = "regression"  # transformers' own reading of a single label
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"problem_type: the student's config means {problem!r} {where}, by its problem_type or num_labels; "
            "expected single-label classification or language modelling, whose classes exclude each other."
        )
