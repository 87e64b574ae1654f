"""What a trainer that computes its own loss refuses, and how its labels stand to its logits."""

from __future__ import annotations

from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_settings(trainer: Trainer, student: nn.Module, where: str = "beside a teacher") -> None:
    """Refuses what would change a loss that the trainer computes, or leave it without meaning.

    Args:
        trainer: with its arguments and label names.
        student: unwrapped.
        where: for the messages.

    Raises:
        ValueError: several GPUs for one process, smoothed labels, another loss function, several labels, or a student
            whose classes do not exclude each other.
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


def predicts_next_token(model: nn.Module) -> bool:
    """Whether transformers would shift this model's labels.

    Trainer looks for "ForCausalLM" in the class name and so misses GPT2LMHeadModel and others of the early names,
    whose labels transformers shifts all the same.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {kind.__name__ for kind in type(model).__mro__}
    causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return causal and not getattr(model.config, "is_encoder_decoder", False)
