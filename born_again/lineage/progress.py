"""What a run of a lineage shows while it goes on: two bars in a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging as hf_logging

if TYPE_CHECKING:
    from born_again.training.trainer import BornAgainTrainer


class LineageProgress:
    """A context manager with a bar over the generations; each training has a bar of its own below it.

    The bars are drawn by the first process, where stderr is a terminal and the arguments do not say disable_tqdm.
    Otherwise there are none, and a line for whatever is logged. In notebooks transformers' own table stays.

    Args:
        name: of the lineage.
        generations: students, without the teacher.
    """

    def __init__(self, name: str, generations: int) -> None:
        self.name = name
        self.generations = generations
        self._bar: tqdm | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> LineageProgress:
        if hf_logging.is_progress_bar_enabled():  # of weights that load in moments, drawn across the two
            hf_logging.disable_progress_bar()
            self._open.callback(hf_logging.enable_progress_bar)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()
        self._bar = None

    def follow(self, trainer: BornAgainTrainer, index: int) -> None:
        """Shows the training of a generation that is about to begin, in place of what transformers would show."""
        shown = [own for own in trainer.callback_handler.callbacks if type(own) in (ProgressCallback, PrinterCallback)]
        if not shown:
            return
        for callback in shown:
            trainer.remove_callback(callback)
        if not trainer.is_world_process_zero():
            return
        title = f"generation {index} of {self.generations}"
        if trainer.args.disable_tqdm or not sys.stderr.isatty():
            trainer.add_callback(_Lines(title))
            return
        if self._bar is None:
            total = self.generations + 1
            bar = tqdm(total=total, initial=index, position=0, unit="generation", dynamic_ncols=True, file=sys.stderr)
            self._bar = self._open.enter_context(contextlib.closing(bar))
            self._open.enter_context(logging_redirect_tqdm())
        self._bar.set_description(f"{self.name}, {title}")
        bar_of_steps = _Bar(title)
        self._open.callback(bar_of_steps.close)  # of a training that breaks off
        trainer.add_callback(bar_of_steps)

    def finished(self, index: int) -> None:
        """Says that a generation is trained and recorded."""
        if self._bar is not None:
            self._bar.update(index + 1 - self._bar.n)


class _Lines(TrainerCallback):
    """Prints what is logged, a line for each time."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        print(_line(self.title, state, logs), flush=True)


class _Bar(TrainerCallback):
    """A bar over the steps of a training, below that of the lineage; what is logged is written above both."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: tqdm | None = None
        self._evaluates = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            position=1,
            leave=False,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._describe(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self._evaluates:
            self._evaluates = True
            self._describe(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._evaluates = False
        self._describe(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        tqdm.write(_line(self.title, state, logs))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _describe(self, state: TrainerState) -> None:
        if self._bar is not None:
            epochs = max(state.num_train_epochs, 1)
            epoch = min(int(state.epoch or 0) + 1, epochs)
            self._bar.set_description(f"epoch {epoch} of {epochs}{', evaluating' if self._evaluates else ''}")


def _line(title: str, state: TrainerState, logs: dict[str, Any]) -> str:
    values = {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
    shown = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
    epoch = "" if state.epoch is None else f" (epoch {state.epoch:.4g})"
    return f"{title}, step {state.global_step} of {state.max_steps}{epoch}: {shown}"
