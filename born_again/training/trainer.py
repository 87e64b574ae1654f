"""A frozen teacher and the call of the paper's loss, on top of transformers.Trainer."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from born_again.objectives import IGNORED, at_least_tiny, item_loss, item_weights, objective_items
from born_again.objectives.fused import fused_loss_sums
from born_again.teacher import FrozenTeacher, logits_of, vocabulary_size
from born_again.teacher.cache import with_teacher_cache
from born_again.teacher.cache.cached_teacher import CachedTeacher, emitting_view_keys, without_view_keys
from born_again.teacher.inputs import NetworkInputs, unwrapped, with_decoder_inputs, with_labels_for_decoders
from born_again.teacher.loading import Teacher, load_teachers
from born_again.teacher.preprocessing import preprocessing_of_training, wrong_config
from born_again.teacher.tokenizers import EndsOfTexts, compare_tokenizers, student_tokenizer
from born_again.training.arguments import (
    LOSS_NORMALIZATIONS,
    BornAgainTrainingArguments,
    check_choice,
    multi_step_schedule,
)
from born_again.training.checks import DivergenceGuard, LabelRange, class_numbers, narrow_weights, validate_arguments
from born_again.training.compilation import CompilationMixin
from born_again.training.device_reads import DeviceReadsMixin
from born_again.training.failures import naming_lost_processes
from born_again.training.item_counts import LABEL_RANGE, ItemCountsMixin
from born_again.training.item_losses import ItemLossesMixin, Objective
from born_again.training.label_positions import LabelPositionsMixin
from born_again.training.network_loss import NetworkLoss, declares_shift
from born_again.training.processes import ProcessesMixin
from born_again.training.sharding import MIXED_DTYPES, check_teacher_loading, loading_whole
from born_again.training.step_loss import ChunkedLossMixin
from born_again.training.teacher_accuracy import TeacherAccuracyMixin, changed, sums_of_rows
from born_again.training.upstream import BaseTrainer, explaining_errors

if TYPE_CHECKING:
    import datasets
    from torch.utils.data import IterableDataset
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        EvalPrediction,
        FeatureExtractionMixin,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainingArguments,
    )

logger = logging.getLogger(__name__)

METRICS_EVERY = 8  # steps: over a large vocabulary the metrics cost up to as much as the loss
NO_PROBABILITY = -1e4  # as a logit of any dtype
_TEACHER_LOGITS = "teacher_logits"  # hidden states with the chunked implementation


class BornAgainTrainer(
    TeacherAccuracyMixin,
    LabelPositionsMixin,
    ChunkedLossMixin,
    ProcessesMixin,
    ItemCountsMixin,
    ItemLossesMixin,
    CompilationMixin,
    DeviceReadsMixin,
    BaseTrainer,
):
    """transformers.Trainer whose model may have a teacher.

    Without a teacher it is Trainer, unless `loss_normalization` is "step". With one, every batch goes once through the
    wrapped student and once through the frozen teacher, labels are read by the objective and not by the student, and
    the loss of an optimisation step is sum(weight x item loss) / sum(weight) over all of its items: every accumulated
    micro-batch and every process. So batch 8 is 2 x 4 accumulated is 2 processes x 4, for every objective. evaluate()
    and predict() report plain cross-entropy as eval_loss, comparable with that of a training without a teacher.

    It serves whatever has one row of logits for each label: classification of images and sequences, of tokens (label
    -100 is ignored), and language models. Networks may return a ModelOutput, a dict, a tuple or a tensor. Before the
    first step a student that takes labels is given some once, to find out what it does with them: whether it shifts
    them by one position, as most causal language models do; which auxiliary loss it adds, as the router's of a
    mixture of experts, which is then added here, weighted by the items of its micro-batch (evaluate() reports the
    cross-entropy alone). An encoder-decoder, and its teacher, read the labels shifted to the right where a batch has
    no decoder_input_ids. A student that does more with its labels is refused.

    Logged beside the loss: ce_loss, kd_loss (KL from teacher to student), teacher_agreement, teacher_entropy,
    importance_weight_norm and dark_knowledge_norm (`born_again.objectives.distillation_metrics`), means over the items
    of every eighth step and of the step that is logged; with a `teacher_cache` also teacher_cache_hit_rate.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: those of
            transformers.Trainer, in its order. With a teacher `args` are BornAgainTrainingArguments.
        teacher: None to train on labels; a network, or the folder or Hub id of one (loaded as `load_network` of
            `born_again.teacher.loading` does); or a list of these, that teach as their mean probability. It is put in
            eval mode, frozen, moved to the training device, and never saved.
        teacher_processing_class: the teacher's tokenizer, or None for the one in the folder it was loaded from; it is
            compared with the student's, of processing_class, of the data_collator or of the student's folder. Or its
            image processor, or a list with one for each teacher: where it normalises images otherwise than the
            student's are, the teacher is given its own pixel values (see `born_again.teacher.preprocessing`). Networks
            around timm say that in their config, without it.
        objective: a function in place of the arguments' objective, unused without a teacher. It is called with
            student_logits and teacher_logits (items, classes), float32 or wider, and labels (items,) int64, of the
            items that count, and returns losses (items,), differentiable, and weights (items,) of 0 or more, through
            which no gradient flows. The loss of a step is sum(weight x loss) / sum(weight), as of the built-in ones.
        **kwargs: what a newer transformers.Trainer takes beside these.

    Attributes:
        teacher: the `FrozenTeacher`, with `teacher_cache` a `CachedTeacher` around it; or None.
        teacher_train_metrics: {"accuracy", "samples"} of the teacher on a fixed, evenly spaced sample of the training
            set, as the student is shown it; evaluated when train() begins (`teacher_accuracy_samples`), None before
            and for datasets without a length.
        in_lineage: whether the training is of a lineage, which records the above; set by who runs it, before train().

    Raises:
        TypeError: a teacher beside arguments that are no BornAgainTrainingArguments, or that is no network; an
            objective that is no function of three tensors. From train(): one that returns something else.
        ValueError: a teacher that cannot teach this student, or arguments that cannot be combined with a teacher.
            From train() and evaluate(): labels that are no class numbers.
        FloatingPointError: from train(), when a loss is not finite (see `stop_on_nonfinite`).

    Example:
        >>> rows = [{"input": torch.randn(8), "labels": row % 3} for row in range(16)]
        >>> args = BornAgainTrainingArguments("mine", max_steps=2, disable_tqdm=True, report_to="none", use_cpu=True)
        >>> BornAgainTrainer(nn.Linear(8, 3), args, train_dataset=rows, teacher=nn.Linear(8, 3)).train().global_step
        {...}
        2
    """

    # Narrower than Trainer's annotations. Without a teacher the arguments may be plain TrainingArguments.
    args: BornAgainTrainingArguments
    model: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    in_lineage = False
    _reads_streams = False  # whose labels are the tokens to predict, position by position
    _labels_where = "with loss_normalization 'step'"  # in refusals, where labels alone train

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | datasets.Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | datasets.Dataset | None = None,
        processing_class: PreTrainedTokenizerBase
        | BaseImageProcessor
        | FeatureExtractionMixin
        | ProcessorMixin
        | None = None,
        model_init: Callable[..., PreTrainedModel | nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        teacher: Teacher | Sequence[Teacher] | None = None,
        teacher_processing_class: Any = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        given: dict[str, Any] = {
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        super().__init__(model, args, **given, **kwargs)
        self.teacher: FrozenTeacher | CachedTeacher | None = None
        self.teacher_train_metrics: dict[str, float] | None = None
        self._teacher_processing_class = teacher_processing_class
        self._columns: int | None = None  # of the student's logits, where the teacher's have another number
        self._metric_sums: dict[str, Tensor] | None = None
        self._collects_metrics = True
        self._guard = DivergenceGuard()
        self._permutations: torch.Generator | None = None
        self._ends_of_texts: EndsOfTexts | None = None
        self._owns_loss, self._network_scales_loss = False, self.model_accepts_loss_kwargs
        self._labels = LabelRange(*(self.label_names or [])[:1])
        self._evaluated: Tensor | None = None  # sums of losses and of items, (2,), while an evaluation goes on
        self._row_sums: Tensor | None = None  # of the batch that was evaluated last, (rows, 2)
        self._kept_columns: set[str] = set()
        self.add_callback(_TrainBegin(self))
        self._take_objective(objective)
        if teacher is not None:
            with loading_whole():
                teacher = load_teachers(teacher)
            self._take_teacher(teacher)
        else:
            self.use_loss_normalization(getattr(self.args, "loss_normalization", "trainer"))
        self._lay_out(self.model)
        self._prepare_own_state()

    def _prepare_own_state(self) -> None:
        """For a subclass, which so inherits the signature: called last when a trainer is made."""

    @property
    def _memory_format(self) -> torch.memory_format | None:
        return torch.channels_last if getattr(self.args, "channels_last", False) else None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Trainer's; what is true of the student that is handed over is true of one that model_init makes."""
        student = super().call_model_init(trial)
        if getattr(self, "_owns_loss", False):  # not yet within Trainer.__init__
            if self.teacher is not None:
                self._check_tokens(self._frozen_teacher(), student)
            self._own_the_loss(student)
        return self._lay_out(student)

    def _take_teacher(self, teacher: nn.Module | Sequence[nn.Module]) -> None:
        if not isinstance(self.args, BornAgainTrainingArguments):
            raise TypeError(
                f"args: got {type(self.args).__name__} beside a teacher, expected BornAgainTrainingArguments, which "
                "hold the objective."
            )
        check_teacher_loading(self, teacher)
        frozen = FrozenTeacher(teacher)
        frozen.warn = self._warn
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._check_tokens(frozen, student)
        given = preprocessing_of_training(self.train_dataset, self.processing_class, student)
        frozen.give_own_pixels(given, self._teacher_processing_class, self._warn)
        validate_arguments(self, student, teachers=frozen.modules, has_label_term=self._has_label_term)
        if self._objective is not None and self.is_sharded:
            raise ValueError(
                f"objective: got the function {self.objective_name!r} with FSDP or DeepSpeed, whose gradients cannot "
                "be scaled once the weights of a step are known; expected a built-in objective, or DDP."
            )
        frozen.set_precision(self.args.teacher_precision, MIXED_DTYPES.get(self.accelerator.mixed_precision))
        taught_by = with_teacher_cache(frozen, self.args, self.train_dataset)
        # Every check is done before the teacher is changed.
        self._place_teacher(frozen, self._memory_format)
        if self._compiler is not None:
            with self._compiling_for_one_shape():
                frozen.compile(**self._compiler.to_kwargs())  # as accelerate compiles the student
        elif self.args.device.type == "cuda" and self._captures_teacher and taught_by is frozen:
            frozen.capture_graphs()
        self.teacher = taught_by
        self._own_the_loss(student)

    def _check_tokens(self, frozen: FrozenTeacher, student: nn.Module) -> None:
        """Refuses a teacher that would read other tokens in a batch than those that the student's tokenizer meant."""
        tokenizer = student_tokenizer(self.processing_class, self.data_collator, student)
        processors = frozen.processors(self._teacher_processing_class)
        counts, differences = compare_tokenizers(frozen.modules, processors, tokenizer)
        # Without the teacher's tokenizer another number of tokens may be another vocabulary.
        frozen.check_against(student, max(counts) if len(counts) == len(frozen.modules) else None)
        for difference in differences:
            self._warn(difference)
        theirs, ours = vocabulary_size(frozen.modules[0]), vocabulary_size(student)
        if theirs is not None and ours is not None and theirs != ours:
            self._columns = frozen.columns = ours
            if theirs < ours and self.args.objective == "dkpp":
                raise ValueError(
                    f"objective: got 'dkpp' for a student of {ours} tokens and a teacher of {theirs}, expected the "
                    "same number, since probabilities would be permuted to tokens that are none; call "
                    "student.resize_token_embeddings(len(tokenizer))."
                )

    def use_loss_normalization(self, how: str) -> None:
        """Sets, before a training without a teacher, what its loss is divided by; with a teacher it does nothing.

        Args:
            how: "trainer" or "step", see `BornAgainTrainingArguments.loss_normalization`, in whose place it stands.

        Raises:
            ValueError: "step" with arguments or a network for which that loss is undefined.
        """
        check_choice("loss_normalization", how, LOSS_NORMALIZATIONS)
        if how == "step" and not self._owns_loss:
            student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            validate_arguments(self, student, self._labels_where)
            self._own_the_loss(student)
        elif how == "trainer" and self.teacher is None:
            self._owns_loss, self.model_accepts_loss_kwargs = False, self._network_scales_loss
            vars(self).pop("loss_is_scaled_for_ga", None)
            self._kept_columns, self._signature_columns = set(), None

    def _warn(self, text: str) -> None:
        if self.is_world_process_zero():
            logger.warning(text)

    def _own_the_loss(self, student: nn.Module) -> None:
        """From here on the loss is computed here, and never by the network."""
        self._owns_loss = True
        self._synchronize_batchnorm(student)
        self._student_inputs = NetworkInputs(student, "student")
        readers = [self._student_inputs, *([] if self.teacher is None else self.teacher.inputs)]
        self._keep_columns({name for reader in readers for name in reader.columns})
        self._network_loss: NetworkLoss | None = None  # until a batch tells
        # Of a student that is none of transformers its teachers tell, whose logits its own are compared with.
        is_known = isinstance(unwrapped(student), PreTrainedModel) or self.teacher is None
        known = [student] if is_known else self._teachers
        self._shifts_labels = self._loss_shifts_labels or any(map(declares_shift, known))
        # A micro-batch's loss is already its share of the whole step's; an older Trainer reads the second name alone.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        # A plain nn.Module need not name labels in its forward: they are never handed to it.
        self.label_names = self.label_names or ["labels"]

    # ---- Inputs of student and teacher ----

    def _keep_columns(self, names: set[str]) -> None:
        """Has Trainer keep these columns of a dataset, beside those that it keeps for the student."""
        student = self._student_inputs
        self._kept_columns, self._signature_columns = names, None  # which Trainer may have found before
        # With **kwargs it is called as Trainer would call it; collators that pad make a mask in any case.
        unseen = names - {*student.names, "attention_mask"}
        self._columns_of_others = unseen if student.takes_any and self.args.remove_unused_columns else set()

    def _set_signature_columns_if_needed(self) -> None:
        is_new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        columns = cast(list[str] | None, self._signature_columns)  # None before, as far as a type checker sees
        if is_new and columns is not None:
            columns += sorted(self._kept_columns - {*columns})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's, which calls the student itself where there are no labels: with what is the student's."""
        if self._owns_loss and inputs.get(self.label_names[0]) is None:
            inputs = self._inputs_of_student(self._prepare_inputs(inputs))
        step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._evaluated is not None and self._row_sums is not None:
            self._count_evaluated(self._row_sums)
            self._row_sums = None
        return step

    def _count_evaluated(self, row_sums: Tensor) -> None:
        # Gathered as predictions are, so that rows repeated to fill the last batch of a process are left out.
        self._evaluated += self.accelerator.gather_for_metrics(row_sums).sum(0)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's; where the loss is computed here, it is the mean over all items and not over batches.

        A batch without labels that count then has weight 0, and eval_loss does not depend on the batch size. What
        is drawn is drawn again by the training, whose weights do not depend on when it is evaluated.
        """
        if not self._owns_loss:
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            with self._leaving_generators_alone(), self._eager_evaluation():
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            self._labels.check()
            total, items = self._evaluated.tolist()
        finally:
            self._evaluated = self._row_sums = None
        self._evaluated_items = int(items)
        name = f"{metric_key_prefix}_loss"
        if name in output.metrics:
            output.metrics[name] = total / items if items else math.nan
        return output

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Trainer's; where the loss is computed here dataloader_drop_last is of the training alone."""
        with self._dropping_nothing():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._dropping_nothing():
            return super().get_test_dataloader(test_dataset)

    def _dropping_nothing(self) -> contextlib.AbstractContextManager[None]:
        return changed(self.args, dataloader_drop_last=False) if self._owns_loss else contextlib.nullcontext()

    # ---- The loss of a step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Fetches the micro-batches of a step, and what all of their items weigh, on every process together."""
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None  # resumed in mid-epoch from the checkpoint of the last step: Trainer would do one more
        batches, total_weight = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._ends_of_texts is not None:
            if (warning := self._ends_of_texts.look(batches, (self.label_names or ["labels"])[0])) is not None:
                self._warn(warning)
        if self._owns_loss and batches and self._chunked is None:
            self._choose_loss_implementation(batches[0])
        if self.teacher is None:
            return batches, total_weight
        step = self.state.global_step
        self._collects_metrics = step % METRICS_EVERY == 0 or (step + 1) % max(1, self.state.logging_steps) == 0
        if self._objective is not None:
            step_weight = None if len(batches) == self.args.world_size == 1 else total_weight
            self._weigh_afterwards(step_weight)
            return batches, step_weight
        if self.args.objective == "cwtm" and self._chunked and len(batches) == self.args.world_size == 1:
            return batches, None  # a step of its own, whose weights are found with its loss
        if self.args.objective == "cwtm" and batches:
            # The weights of the whole step are needed before its first backward, so the teacher forward runs early.
            total_weight = torch.zeros((), device=device)
            for batch in batches:
                inputs, labels = self._split_labels(self._prepare_inputs(batch))
                with self._eager_where_smaller(batch):
                    batch[_TEACHER_LOGITS], weight = self._teacher_logits_and_weight(inputs, labels)
                total_weight = total_weight + weight
            total_weight = self._sum_over_processes(total_weight)
        if self.args.objective == "dkpp":
            # Seeded for each step and process, so that a resumed training draws what an uninterrupted one would have.
            self._permutations = torch.Generator(device).manual_seed(self._permutation_seed())
        return batches, total_weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """A micro-batch's share of the step's loss; in evaluation its plain cross-entropy.

        `num_items_in_batch` is the total weight of the step's items over all micro-batches and processes; None makes
        the batch a step of its own. The share is multiplied by the number of processes, since their gradients are
        averaged and not summed.
        """
        if not self._owns_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        known = cast(tuple[int, int] | None, inputs.get(LABEL_RANGE))
        inputs, labels = self._split_labels(inputs)
        teacher_logits = inputs.pop(_TEACHER_LOGITS, None)
        if self._chunked and model.training and not return_outputs:
            return self._share(*self._chunked_sums(model, inputs, labels, teacher_logits), num_items_in_batch)
        taught = model.training and self.teacher is not None
        if taught and teacher_logits is None:
            # Before the student, whose activations can then take the place of the teacher's.
            teacher_logits = self._teacher_forward(inputs)
        outputs = self._student_forward(model, inputs)
        student_rows, targets = self._items(logits_of(outputs), labels)
        if known is None:
            self._labels.see(targets, student_rows.shape[-1])
        else:
            self._labels.check_range(*known, student_rows.shape[-1])
        if not model.training:
            losses, weights = objective_items("label", student_rows, None, targets)
            total, weight = (losses * weights).sum(), weights.sum()
            self._row_sums = sums_of_rows(losses, weights, len(labels))
        elif taught:
            teacher_rows, _ = self._teacher_items(teacher_logits, labels)
            total, weight = self._objective_sums(student_rows, teacher_rows, targets, known is not None)
        else:
            loss_of_labels = item_loss("label", label_smoothing=self.args.label_smoothing_factor)
            total, weight, _ = fused_loss_sums(
                loss_of_labels, student_rows, None, targets, all_count=known is not None
            )
        if model.training and (auxiliary := self._auxiliary_loss(outputs)) is not None:
            total = total + weight * auxiliary
        loss = self._share(total, weight, num_items_in_batch)
        if not return_outputs:
            return loss
        # Trainer takes the first entry of a tuple for the loss.
        return loss, outputs if isinstance(outputs, Mapping) else (loss, *_as_tuple(outputs))

    def _share(self, total: Tensor, weight: Tensor | float, step_weight: Tensor | int | None) -> Tensor:
        """A micro-batch's sum(weight x loss), of items of that weight, as its part in the loss of the step."""
        if step_weight is None:
            return total / (at_least_tiny(weight) if isinstance(weight, Tensor) else weight)
        if isinstance(step_weight, int):  # on one process
            return total / max(step_weight, 1)
        divisor = torch.as_tensor(step_weight, dtype=total.dtype, device=total.device)
        return total * self.accelerator.num_processes / at_least_tiny(divisor)

    def _teacher_items(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `_items`, of the teacher, over the student's classes."""
        rows, targets = self._items(logits, labels)
        return self._over_student_classes(rows), targets

    def _over_student_classes(self, rows: Tensor) -> Tensor:
        """A teacher's logits (items, classes) for the student's tokens, where their vocabularies are padded apart."""
        if self._columns is None:
            return rows
        missing = self._columns - rows.shape[-1]  # no text has these: the student learns that they never come
        return F.pad(rows, (0, missing), value=NO_PROBABILITY) if missing > 0 else rows[:, : self._columns]

    def _teacher_logits_and_weight(self, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher logits of a micro-batch, and the sum of its items' CWTM weights."""
        if self._chunked:
            return self._chunked_teacher_weight(inputs, labels)
        logits = self._teacher_forward(inputs)
        weights = item_weights("cwtm", *self._teacher_items(logits, labels))
        return logits, cast(Tensor, weights).sum()

    def _student_forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        return model(**self._inputs_of_student(inputs))

    def _inputs_of_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch without labels the student is called with: nothing that is there for the teacher alone."""
        batch = with_decoder_inputs(self._bare_student(), without_view_keys(inputs))
        batch = self._student_inputs.of(batch)
        return {name: value for name, value in batch.items() if name not in self._columns_of_others}

    def _teacher_forward(self, inputs: Mapping[str, Any]) -> Tensor:
        # Accelerate puts autocast around the student's forward alone: without this a bf16 student has an fp32 teacher.
        with self._teacher_autocast():
            return cast(FrozenTeacher, self.teacher)(inputs)

    def _split_labels(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        name = self.label_names[0]
        if inputs.get(name) is None:
            raise ValueError(
                f"labels: a batch has only the keys {', '.join(inputs)}, expected {name!r} among them, which "
                "tells which items count. Name the column with label_names, or keep it with "
                "remove_unused_columns=False."
            )
        labels = class_numbers(inputs[name], name)
        inputs = {key: value for key, value in inputs.items() if key not in (name, LABEL_RANGE)}
        if self._network_loss is None:
            self._detect_label_handling(inputs, labels)
        return with_labels_for_decoders([self._bare_student(), *self._teachers], inputs, labels), labels

    @property
    def _teachers(self) -> list[nn.Module]:
        return [] if self.teacher is None else self.teacher.modules

    def _shift(self, labels: Tensor) -> Tensor:
        """Aligns labels with logits: in causal language models position i predicts token i + 1, the last nothing."""
        return F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if self._shifts_labels else labels

    def _items(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One row of logits (items, classes) for each label (items,)."""
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; expected one "
                f"label for each row of logits, shape {tuple(logits.shape[:-1])}."
            )
        if labels.dim() == 1:
            return logits, labels
        return logits.reshape(-1, logits.shape[-1]), self._shift(labels).reshape(-1)

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    # ---- Logged metrics ----

    def _add_metrics(self, metrics: dict[str, Tensor]) -> None:
        self._metric_sums = (
            {name: value + self._metric_sums[name] for name, value in metrics.items()}
            if self._metric_sums
            else metrics
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean distillation metrics since the last log to the training loss."""
        if self._metric_sums is not None and "loss" in logs:
            sums = self._sum_over_processes(torch.stack([value.double() for value in self._metric_sums.values()]))
            means = dict(zip(self._metric_sums, (sums / sums[-1].clamp_min(1)).tolist(), strict=True))
            logs.update({name: value for name, value in means.items() if name != "items"})
            self._metric_sums = None
            if isinstance(self.teacher, CachedTeacher):
                where = self.args.device if self.args.world_size > 1 else "cpu"
                hits, lookups = self._sum_over_processes(torch.tensor(self.teacher.pop_hit_counts(), device=where))
                logs["teacher_cache_hit_rate"] = int(hits) / max(int(lookups), 1)
        super().log(logs, start_time)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's, remembering on the device the first step whose loss is not finite."""
        if self._replays_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self._eager_where_smaller(inputs):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._replays_cuda_graphs and not self.accelerator.sync_gradients:
            self._copy_gradients(model)
        if self._stops_on_nonfinite:
            self._guard.see(loss, self.state.global_step + 1)
        return loss

    @property
    def _stops_on_nonfinite(self) -> bool:
        chosen = getattr(self.args, "stop_on_nonfinite", None)
        return self._owns_loss or self.in_lineage if chosen is None else chosen

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        args = self._read_together(tr_loss, self._norm_to_log(grad_norm), *args)
        # Only where the host waits for the device anyway, and always before a checkpoint could store the damage.
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._labels.check()
            self._guard.check_loss(self.state.max_steps)
        if self.control.should_save and self._stops_on_nonfinite:
            self._check_weights()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- Training and evaluation ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after evaluating the teacher on the training set."""
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._ends_of_texts = EndsOfTexts(self.data_collator, self.processing_class, declares_shift(student))
        if (warning := wrong_config(student, self.train_dataset, self.processing_class)) is not None:
            self._warn(warning)
        # Of narrow weights FSDP and DeepSpeed train a copy in float32.
        if self._owns_loss and not self.is_sharded:
            if (warning := narrow_weights(student)) is not None:
                self._warn(warning)
        with contextlib.ExitStack() as stack:
            stack.enter_context(naming_lost_processes())
            stack.enter_context(explaining_errors(self))
            stack.enter_context(self._compiling_for_one_shape())
            if isinstance(self.teacher, CachedTeacher):
                stack.enter_context(emitting_view_keys(self.train_dataset))
                stack.callback(self.teacher.close)
            if self._samples_to_measure():
                self.teacher_train_metrics = self.evaluate_teacher()
                self._warn_if_teacher_underfits()
            if self._stops_on_nonfinite:  # what filters a loss out of the log waits for the device at every step
                stack.enter_context(changed(self.args, logging_nan_inf_filter=False))
            output = super().train(*args, **kwargs)
        self._labels.check()
        if self._stops_on_nonfinite:
            self._guard.check_loss(self.state.max_steps)
            self._check_weights()
        return output

    def begin_training(self) -> None:
        """Resets the state of an earlier training, or of one that auto_find_batch_size gave up."""
        self._guard, self._metric_sums, self._chunked = DivergenceGuard(), None, None
        self._labels = LabelRange(*(self.label_names or [])[:1])
        self._is_checked, self._weight_so_far = False, None
        self._begin_on_processes()
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.pop_hit_counts()  # those of the training alone are logged

    def _prepare_input(self, data: Any) -> Any:
        data = super()._prepare_input(data)
        if self._memory_format is not None and isinstance(data, Tensor) and data.dim() == 4:
            return data.contiguous(memory_format=self._memory_format)
        return data

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Of a network of transformers save_pretrained sees to it; safetensors takes no layout but the contiguous one.
        with self._student_as_it_was():
            if self._memory_format is not None and not isinstance(self.model, PreTrainedModel):
                named = self.model.state_dict() if state_dict is None else state_dict
                state_dict = {name: value.contiguous() for name, value in named.items()}
            super()._save(output_dir, state_dict)

    # ---- The paper's recipe ----

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The multi-step schedule of `lr_milestones`, or Trainer's."""
        milestones = getattr(self.args, "lr_milestones", None)
        if milestones is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = multi_step_schedule(
            self.optimizer if optimizer is None else optimizer,
            milestones,
            self.args.lr_gamma,
            num_training_steps,
            self.args.get_warmup_steps(num_training_steps),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Every parameter with `decay_all_parameters`, else those that Trainer decays."""
        if getattr(self.args, "decay_all_parameters", False):
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)


class _TrainBegin(TrainerCallback):
    def __init__(self, trainer: BornAgainTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin_training()


def _as_tuple(outputs: Any) -> tuple:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
