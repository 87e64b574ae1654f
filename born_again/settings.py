"""What a trainer that computes its own loss refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Trainer


def check_settings(
    trainer: Trainer, student: nn.Module, where: str = "beside a teacher", teachers: Sequence[nn.Module] = ()
) -> None:
    """Refuses what would change a loss that the trainer computes, or leave it without meaning.

    Args:
        trainer: with its arguments and label names.
        student: unwrapped.
        where: for the messages.
        teachers: none where labels alone train.

    Raises:
        ValueError: several GPUs for one process, smoothed labels, a fused loss, another loss function, several
            labels, or a network whose classes do not exclude each other.
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
    for whose, network in (("student's", student), *(("teacher's", teacher) for teacher in teachers)):
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
    """What to say of trained weights narrower than float32, as a student has them by its teacher's config.

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
