"""Evaluations for a curve: how many, and of how many rows, so that a training is hardly longer for them."""

from __future__ import annotations

from collections.abc import Collection

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

SHARE = 0.01  # of the training's time, by the count of forward passes
FORWARDS_PER_STEP = 3  # forward, and backward of twice its time; a teacher's forward is left out
FEWEST, MOST = 5, 20  # evaluations
FEWEST_ROWS, MOST_ROWS = 64, 1024


def plan_curve(items: int, rows: int, asked: int | None = None) -> tuple[int, int]:
    """Chooses how often a part of a split is evaluated while a generation trains.

    Args:
        items: rows that the training reads, all epochs together.
        rows: of the split.
        asked: rows to evaluate, whatever they cost; None chooses, 0 evaluates none.

    Returns:
        Number of rows and of evaluations, evenly spaced over the training; (0, 0) where the training is so short that
        even FEWEST evaluations of FEWEST_ROWS rows would cost more than SHARE of it.
    """
    forwards = int(SHARE * FORWARDS_PER_STEP * items)
    count = min(rows, forwards // FEWEST, MOST_ROWS) if asked is None else min(rows, asked)
    if count < (FEWEST_ROWS if asked is None else 1):
        return 0, 0
    return count, min(MOST, max(FEWEST, forwards // count))


def evaluates_for_curve(given: Collection[str], args: TrainingArguments) -> bool:
    """Whether a curve may choose when a training is evaluated: no flag does, and nothing hangs on evaluations."""
    chosen = {"eval_strategy", "eval_steps", "eval_on_start", "do_eval"} & set(given)
    decides = args.load_best_model_at_end or args.lr_scheduler_type == "reduce_lr_on_plateau"
    return not chosen and not decides and args.eval_strategy == IntervalStrategy.NO


def evaluate_for_curve(args: TrainingArguments, evaluations: int) -> None:
    """Has every training with these arguments evaluate so many times, the last time after its last step."""
    args.eval_strategy, args.eval_steps, args.do_eval = IntervalStrategy.STEPS, 1 / evaluations, True
