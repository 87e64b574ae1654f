"""The learning rate of the paper's recipe, for any length of training."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def multi_step_schedule(
    optimizer: Optimizer, milestones: Sequence[float], gamma: float, steps: int, warmup_steps: int = 0
) -> LambdaLR:
    """Multiplies the learning rate by `gamma` after each milestone (Zagoruyko and Komodakis 2016, section 3).

    Args:
        optimizer: whose learning rates are scheduled.
        milestones: fractions of the training, between 0 and 1; each is rounded to the nearest step.
        gamma: factor at each milestone.
        steps: optimizer steps of the whole training.
        warmup_steps: steps over which the rate first rises linearly from 0.
    """
    drops = [round(fraction * steps) for fraction in milestones]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return gamma ** sum(step >= drop for drop in drops)

    return LambdaLR(optimizer, factor)
