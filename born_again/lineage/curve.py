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


def take_curve(
    args: TrainingArguments, given: Collection[str], asked: int | None, *, train_rows: int, rows: int, what: str
) -> tuple[int, str]:
    """Has every training with these arguments evaluate a part of a split a few times, unless a flag says when.

    Nothing hangs on these evaluations, so they change no weight; where something does, there are none.

    Args:
        args: their eval_strategy and eval_steps are set.
        given: names of the flags that the user set.
        asked: see `plan_curve`.
        train_rows: of the training split.
        rows: of the split that is evaluated.
        what: it is, for the sentence, such as "images of the test split".

    Returns:
        Number of rows that are evaluated, and a sentence for the first lines of a run; 0 and "" where nothing is set.

    Raises:
        ValueError: rows asked for below 0.
    """
    if asked is not None and asked < 0:
        raise ValueError(f"curve_samples: got {asked}, expected 0 (no evaluations for a curve) or more rows.")
    decides = args.load_best_model_at_end or args.lr_scheduler_type == "reduce_lr_on_plateau"
    chosen = {"eval_strategy", "eval_steps", "eval_on_start", "do_eval"} & set(given)
    if chosen or decides or args.eval_strategy != IntervalStrategy.NO:
        return 0, ""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    items = args.num_train_epochs * train_rows if args.max_steps < 0 else args.max_steps * batch
    count, evaluations = plan_curve(int(items), rows, asked)
    if not count:
        return 0, ""
    args.eval_strategy, args.eval_steps, args.do_eval = IntervalStrategy.STEPS, 1 / evaluations, True
    return count, (
        f"Curves: the same {count:,} {what} are evaluated {evaluations} times a training, which selects nothing "
        "(--curve_samples 0 turns this off)"
    )


def evenly_spaced(count: int, rows: int) -> list[int]:
    """So many of the numbers below `rows`, the same at every call."""
    return [index * rows // count for index in range(count)]
