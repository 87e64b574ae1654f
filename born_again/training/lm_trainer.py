"""BornAgainTrainer for language models that read a text window by window, each with its own state."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import EvalLoopOutput

from born_again.objectives import objective_items
from born_again.teacher import FrozenTeacher, carries_state, logits_of, takes_undeclared_state
from born_again.training.teacher_accuracy import can_be_indexed, sums_of_rows
from born_again.training.trainer import BornAgainTrainer

logger = logging.getLogger(__name__)

PERPLEXITY_BATCHES = 60
_CARRIED = re.compile(r"carried_state_[0-9]+_of_([0-9]+)\.safetensors")


@dataclass
class CarriedState:
    """The recurrent states of student and teachers after the windows read so far, kept apart.

    Args:
        student: of the network in training, None at the start of a text.
        teachers: one for each teacher, None at the start of a text and for networks without a state.
        windows: how many windows of the epoch the student has read.
    """

    student: tuple[Tensor, ...] | None = None
    teachers: list[tuple[Tensor, ...] | None] = field(default_factory=list)
    windows: int = 0

    def save(self, path: Path) -> None:
        """Writes it as safetensors."""
        tensors = {"windows": torch.tensor(self.windows)}
        for name, state in {"student": self.student, **_numbered(self.teachers)}.items():
            tensors |= {f"{name}.{index}": part.contiguous() for index, part in enumerate(state or ())}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, teachers: int, device: torch.device) -> CarriedState:
        """Reads what `save` wrote."""
        tensors = load_file(path)

        def state(name: str) -> tuple[Tensor, ...] | None:
            parts = sorted(key for key in tensors if key.startswith(f"{name}."))
            # A copy, since a kernel may round otherwise at an address that is aligned otherwise.
            return tuple(tensors[f"{name}.{index}"].to(device, copy=True) for index in range(len(parts))) or None

        return cls(state("student"), [state(f"teacher{index}") for index in range(teachers)], int(tensors["windows"]))

    @classmethod
    def share(cls, parts: Sequence[CarriedState], streams: int, rank: int, processes: int) -> CarriedState:
        """The state of one of so many processes, each with its streams, from those of another number of them.

        Raises:
            ValueError: a tensor without a row for each stream.
        """

        def own(states: Sequence[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
            if any(state is None for state in states):
                return None
            whole = [torch.cat(same) for same in zip(*cast(Any, states), strict=True)]
            if wrong := [tuple(part.shape) for part in whole if len(part) != streams]:
                raise ValueError(
                    f"resume_from_checkpoint: a carried state of shape {wrong[0]} has no row for each of {streams} "
                    "streams, so it cannot be shared out anew; go on with as many processes as before."
                )
            return tuple(part.chunk(processes)[rank].clone() for part in whole)

        teachers = [own(states) for states in zip(*(part.teachers for part in parts), strict=True)]
        return cls(own([part.student for part in parts]), teachers, parts[0].windows)


class BornAgainLMTrainer(BornAgainTrainer):
    """BornAgainTrainer for language models, with the state of student and teacher carried from window to window.

    A network with the attribute `carries_state = True` is recurrent: its forward takes a `state`, a tuple of tensors
    (batch, ...) or None at the start of a text, and its output has the next one as `state`. It reads a dataset of
    contiguous streams (`born_again.data.streams.TokenStreams`), in order and by full batches, so that row s of every
    batch goes on with stream s. Its state is detached after every window (truncated backpropagation), kept apart from
    its teacher's, forgotten at the start of an epoch, put aside around every evaluation, and saved in checkpoints, so
    that a training resumed in the middle of an epoch has the weights of one that was not interrupted. Networks without
    a state read each window on its own, from streams or from any other dataset.

    The labels of streams are the tokens to predict, position by position; those of other datasets are shifted where
    the network shifts them. The loss of a step is the mean over all of its tokens, with a teacher or without, on any
    number of processes: each reads its own streams, which needs
    `accelerator_config={"split_batches": True}`, where per_device_train_batch_size counts the streams of all of them.

    The paper trains with the loss summed over the 35 steps of a window and learning rate 1; with this mean over
    tokens the same step needs a learning rate of about 20 to 35, since the sum's gradient is 35 times the mean's.
    Gradient clipping (max_grad_norm) then is 35 times smaller too.

    evaluate() gives, weighted by token, eval_loss and eval_nll (the same: nats per token), eval_perplexity (per token,
    which is a word where the tokenizer's tokens are words) and eval_tokens. No logits are stored: predict() gives the
    negative log-likelihood of every token, (windows, time), instead, and a compute_metrics is handed that.

    Its arguments are those of `BornAgainTrainer`.

    Raises:
        ValueError: as BornAgainTrainer does; a teacher with another vocabulary; when the training or evaluation
            begins, an arrangement of batches and processes in which a state would be carried to another stream.

    Example:
        >>> from born_again import BornAgainTrainingArguments, LstmLMConfig, LstmLMForCausalLM
        >>> from born_again.data.streams import TokenStreams, collate_windows
        >>> student, teacher = (LstmLMForCausalLM(LstmLMConfig(vocab_size=9, hidden_size=4)) for _ in range(2))
        >>> text = TokenStreams(torch.arange(200) % 9, streams=4, window=10, before=0)  # 10 tokens at a time
        >>> args = BornAgainTrainingArguments(
        ...     "mine",
        ...     per_device_train_batch_size=4,
        ...     per_device_eval_batch_size=4,
        ...     max_steps=2,
        ...     remove_unused_columns=False,
        ...     disable_tqdm=True,
        ...     report_to="none",
        ...     use_cpu=True,
        ... )
        >>> trainer = BornAgainLMTrainer(student, args, collate_windows, text, text, teacher=teacher)
        >>> trainer.train().global_step
        {...}
        2
        >>> metrics = trainer.evaluate()
        {...}
        >>> math.isclose(metrics["eval_perplexity"], math.exp(metrics["eval_nll"]))
        True
    """

    _labels_where = "in BornAgainLMTrainer"

    def _prepare_own_state(self) -> None:
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._student_carries = carries_state(student)
        self._carried = CarriedState()
        self._resumed_from: str | None = None
        self._reads_streams = hasattr(self.train_dataset, "streams")
        self.add_callback(_EpochStart(self))
        self._warn_of_undeclared_state(student)

    def _warn_of_undeclared_state(self, student: nn.Module) -> None:
        if not hasattr(self.train_dataset, "streams"):
            return
        for module in (student, *(() if self.teacher is None else self.teacher.modules)):
            if takes_undeclared_state(module):
                self._warn(
                    f"{type(module).__name__} takes a `state`, and does not say by an attribute `carries_state` that "
                    "its output has the next one: it reads every window on its own. Where it returns the next state "
                    "as output.state, a tuple of tensors, give its class carries_state = True."
                )

    def use_loss_normalization(self, how: str) -> None:
        """Always "step": the loss of a window needs its labels and its state, which this trainer has."""
        super().use_loss_normalization("step")

    # ---- The carried state ----

    def _student_forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        self._carried.windows += 1
        inputs = self._inputs_of_student(inputs)
        if not self._student_carries:
            return model(**inputs)
        outputs = model(**inputs, state=self._carried.student)
        # A copy, since a compiled student's next call may overwrite its outputs.
        self._carried.student = tuple(part.detach().clone() for part in outputs["state"])
        return outputs

    def _teacher_forward(self, inputs: Mapping[str, Any]) -> Tensor:
        teacher = cast(FrozenTeacher, self.teacher)
        states = self._carried.teachers or [None] * len(teacher.modules)
        with self._teacher_autocast():
            logits, self._carried.teachers = teacher.forward_with_states(inputs, states)
        return logits

    @contextmanager
    def _another_text(self, dataset: Any) -> Iterator[None]:
        """Inside, reads another dataset from its start; afterwards the training's state is back."""
        before = self._carried, self._reads_streams
        self._carried, self._reads_streams = CarriedState(), hasattr(dataset, "streams")
        try:
            with self._leaving_generators_alone():  # the next dropout mask would be another
                yield
        finally:
            self._carried, self._reads_streams = before

    def begin_epoch(self) -> None:
        """Resets the carried state; in an epoch that was interrupted, restores it from the checkpoint.

        Raises:
            ValueError: a checkpoint without the state of this process.
        """
        checkpoint, self._resumed_from = self._resumed_from, None
        self._carried = CarriedState()
        if checkpoint is None or not self._anything_carries():
            return
        carried = self._carried_in(Path(checkpoint))
        # At the end of an epoch there is nothing to go on with.
        if carried.windows < self.train_dataset.windows:
            self._carried = carried

    def _carried_in(self, checkpoint: Path) -> CarriedState:
        """This process's part of the state in a checkpoint, which another number of processes may have written."""
        paths = [checkpoint / self._carried_name()]
        if not paths[0].is_file():
            of_others = {int(found[1]) for path in checkpoint.iterdir() if (found := _CARRIED.fullmatch(path.name))}
            if len(of_others) != 1:
                raise ValueError(
                    f"resume_from_checkpoint: {checkpoint} has no {paths[0].name}, expected the state of every "
                    "process; go on from a checkpoint that this trainer wrote."
                )
            count = of_others.pop()
            paths = [checkpoint / _carried_name(rank, count) for rank in range(count)]
        teachers = 0 if self.teacher is None else len(self.teacher.modules)
        parts = [CarriedState.load(path, teachers, self.args.device) for path in paths]
        if paths[0].name == self._carried_name():
            return parts[0]
        return CarriedState.share(parts, self.train_dataset.streams, self.args.process_index, self.args.world_size)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._anything_carries():
            self._carried.save(Path(output_dir) / self._carried_name())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def _carried_name(self) -> str:
        return _carried_name(self.args.process_index, self.args.world_size)

    def _anything_carries(self) -> bool:
        return self._student_carries or (self.teacher is not None and any(self.teacher.carries_state))

    # ---- Streams ----

    def _shift(self, labels: Tensor) -> Tensor:
        return labels if self._reads_streams else super()._shift(labels)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if hasattr(dataset, "streams"):
            return SequentialSampler(cast(Sized, dataset))
        return super()._get_train_sampler(dataset)

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, after checking that every row of a batch goes on with its own stream."""
        self._check_streams("train", self.train_dataset, self._train_batch_size)
        if self._anything_carries():
            for name in ("auto_find_batch_size", "ignore_data_skip"):
                if getattr(self.args, name):
                    raise ValueError(f"{name}: got True, expected False for a network that carries a state.")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Trainer's, after the same check."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        self._check_streams("eval", dataset, self.args.eval_batch_size)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Trainer's, after the same check."""
        self._check_streams("eval", test_dataset, self.args.eval_batch_size)
        return super().get_test_dataloader(test_dataset)

    def _check_streams(self, split: str, dataset: Any, batch: int) -> None:
        if not self._anything_carries():
            return
        processes, config = self.args.world_size, cast(AcceleratorConfig, self.args.accelerator_config)
        if not hasattr(dataset, "streams"):
            raise ValueError(
                f"{split}_dataset: got {type(dataset).__name__}, which has no `streams`, beside a network that "
                "carries a state from window to window, and would be shuffled or cut anywhere; expected "
                "born_again.data.streams.TokenStreams, or BornAgainTrainer for texts that stand alone."
            )
        if dataset.streams != batch:
            raise ValueError(
                f"per_device_{split}_batch_size: got {batch} for {dataset.streams} streams, expected "
                f"{dataset.streams}, so that every batch is the next window of every stream; or cut the text into "
                f"{batch} streams."
            )
        if processes > 1 and (not config.split_batches or config.dispatch_batches):
            raise ValueError(
                f"accelerator_config: got split_batches={config.split_batches}, "
                f"dispatch_batches={config.dispatch_batches} on {processes} processes, where a process would read "
                "every other window; expected split_batches=True and dispatch_batches=None, so that each has its own "
                "streams (then per_device_*_batch_size counts those of all processes)."
            )
        if dataset.streams % processes:
            raise ValueError(
                f"per_device_{split}_batch_size: got {dataset.streams} streams on {processes} processes, expected a "
                f"multiple of {processes}."
            )

    # ---- Evaluation ----

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's, from the start of the text, with means over tokens instead of batches."""
        with self._another_text(dataloader.dataset):
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        metrics = output.metrics or {}
        nll = metrics.get(f"{metric_key_prefix}_loss", math.nan)
        own = {"nll": nll, "perplexity": perplexity(nll), "tokens": self._evaluated_items}
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in own.items()})
        return output._replace(metrics=metrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The mean loss of a batch; unless prediction_loss_only also the token losses (batch, time) and labels."""
        inputs, labels = self._split_labels(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = logits_of(self._student_forward(model, inputs))
            rows, targets = self._items(logits, labels)
            self._labels.see(targets, rows.shape[-1])
            losses, weights = objective_items("label", rows, None, targets)
        self._count_evaluated(sums_of_rows(losses, weights, len(labels)))
        loss = losses.sum() / weights.sum().clamp_min(1)
        return (loss, None, None) if prediction_loss_only else (loss, losses.view_as(labels), self._shift(labels))

    # ---- Training perplexity of the teacher ----

    def _may_warn_of_teacher(self) -> bool:
        return self._student_carries and super()._may_warn_of_teacher()

    def evaluate_teacher(self, windows: int = PERPLEXITY_BATCHES) -> dict[str, float] | None:
        """Perplexity of the teacher on the first windows of the training set, as they are shown to the student.

        Args:
            windows: how many batches are read.

        Returns:
            {"perplexity", "nll" (nats per token), "tokens"}, or None without a teacher and for a training set without
            a length.
        """
        if self.teacher is None or not can_be_indexed(self.train_dataset):
            return None
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with self._another_text(self.train_dataset):
            for batch in islice(self._in_order(), windows):
                inputs, labels = self._split_labels(self._prepare_inputs(batch))
                with self._eager_where_smaller(batch):
                    parts = [objective_items("label", rows, None, targets)
                             for rows, targets in self._teacher_rows(inputs, labels)]  # fmt: skip
                losses, weights = (torch.cat(part) for part in zip(*parts, strict=True))
                sums += self.accelerator.gather_for_metrics(sums_of_rows(losses, weights, len(labels))).sum(0)
        total, tokens = sums.tolist()
        nll = total / max(tokens, 1)
        return {"perplexity": perplexity(nll), "nll": nll, "tokens": int(tokens)}

    def evaluate_student(self) -> None:
        """None: the perplexity on the validation split says as much of a language model."""

    def _in_order(self) -> Iterator[Any]:
        """Batches of the training set, without touching the order in which training will read it."""
        if hasattr(self.train_dataset, "streams"):
            return iter(self.get_train_dataloader())  # each process its own streams
        return iter(self._rows_in_order(self.train_dataset))

    def _warn_if_teacher_underfits(self) -> None:
        if self.teacher_train_metrics is not None and self._may_warn_of_teacher() and self.is_world_process_zero():
            logger.warning(
                f"objective {self.args.objective!r} has no label term; for recurrent language models only 'ban+l' "
                "worked in the paper. The teacher's perplexity on the training text is "
                f"{self.teacher_train_metrics['perplexity']:.1f}."
            )


class _EpochStart(TrainerCallback):
    def __init__(self, trainer: BornAgainLMTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin_epoch()


def _carried_name(rank: int, processes: int) -> str:
    return f"carried_state_{rank}_of_{processes}.safetensors"


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats per token; infinite where that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _numbered(teachers: Sequence[Any]) -> dict[str, Any]:
    return {f"teacher{index}": state for index, state in enumerate(teachers)}
