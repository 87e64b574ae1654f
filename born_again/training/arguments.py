"""What `BornAgainTrainer` reads, on top of transformers.TrainingArguments."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from born_again.objectives import OBJECTIVES, OBJECTIVES_WITH_LABELS, PERMUTATIONS
from born_again.teacher import PRECISIONS
from born_again.training.environment import check_launch, compiler_of, join_processes_on_cpu
from born_again.training.fused_optimizer import has_fused_form


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


TEACHER_PLACEMENTS = ("replicated", "sharded")
TEACHER_CACHES = ("off", "memory", "disk")
LOSS_IMPLEMENTATIONS = ("auto", "full", "chunked")
LOSS_NORMALIZATIONS = ("trainer", "step")

# Arguments that may differ between two runs of one experiment without changing a weight.
_NOT_WEIGHT_AFFECTING = frozenset(
    """
    output_dir do_train do_eval do_predict resume_from_checkpoint local_rank use_cpu
    seed objective loss_normalization stop_on_nonfinite teacher_accuracy_samples
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug
    eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context remove_unused_columns label_names torch_empty_cache_steps
    ddp_timeout ddp_backend ddp_find_unused_parameters
    teacher_cache teacher_cache_dir teacher_cache_limit_gib teacher_cuda_graph teacher_placement
    """.split()
)
# Unless the learning rate or the choice of weights hangs on evaluations.
_EVALUATION = frozenset({"eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start"})


@dataclass
class BornAgainTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the choices of a born-again generation.

    Every argument of transformers.TrainingArguments is there, with one other default: `logging_nan_inf_filter` is off,
    since it hides a NaN loss and waits for the device at every step; see `stop_on_nonfinite`. label_smoothing_factor
    smooths the labels of generation 0 and of the objectives that read labels; "ban" and "dkpp" refuse it.

    Args:
        objective: what a student is taught by, unused without a teacher: "ban" (the teacher's distribution alone),
            "ban+l" (that plus the labels), "cwtm" (labels weighted by the teacher's confidence), "dkpp" (the
            teacher's distribution, permuted except for its argmax).
        temperature: of "ban" and "ban+l"; above 0. The paper uses 1.
        label_weight: of "ban+l", what the cross-entropy with the labels is multiplied by; 0 or more.
        permutation: of "dkpp", "fresh" for every item and step, or "fixed" for the whole training.
        teacher_annealing: of "ban", whether the target goes from the teacher's distribution to the label: it is
            (1 - a) x teacher + a x label, a = steps done / steps of the training (Clark et al. 2019, BAM,
            arXiv 1907.04829).
        channels_last: keeps 4-d weights and inputs in torch.channels_last, which convolutions run faster in.
        sync_batchnorm: on several processes, has BatchNorm normalise by the rows of all of them, as one process with
            the whole batch would; on GPUs. Without it each process normalises by its own rows, and the running
            statistics are those of the first. It costs two collectives a layer.
        teacher_precision: how the teacher computes. "autocast" as the student does; "inference" is the fastest, a
            private copy with BatchNorm folded into convolutions and weights in the dtype of bf16 or fp16; "float32" in
            full precision whatever the student does.
        teacher_cuda_graph: on CUDA, whether the teacher's forward is captured as a CUDA graph and replayed, which
            saves the host the launch of every kernel and takes memory of its own for the teacher's activations; its
            outputs are the same bit for bit. Where it cannot be captured, with torch_compile and with a teacher_cache
            it is called as on other devices.
        teacher_placement: "replicated" keeps the whole teacher on every process; "sharded", under FSDP2 or DeepSpeed,
            a part on each, gathered layer by layer at every forward, for a teacher that does not fit. The network that
            is handed over is sharded in place. Not beside a teacher_cache, torch_compile and another
            teacher_precision than "autocast".
        teacher_cache: where the teacher's outputs are cached, to be read when the same view of a sample comes again:
            "off", "memory" (each process its own) or "disk" (shared by processes, runs and students of one teacher).
            The weights are the same. The training set must give each view a cache key, as born_again.data's do.
        teacher_cache_dir: of "disk", a folder; None is `teacher_cache` in output_dir.
        teacher_cache_limit_gib: GiB that cached outputs may take, above 0; None is half of what is free. What does not
            fit is computed by the teacher each time.
        loss_implementation: "full" computes all logits of a batch; "chunked" computes a language model's from hidden
            states, some rows at a time, in a fraction of the memory, and refuses networks whose logits are not the
            output of their output layer alone; "auto" is "chunked" where that works and the logits are many, and logs
            its choice.
        loss_normalization: what a training without a teacher divides its loss by; with a teacher, in a lineage and in
            BornAgainLMTrainer it is always "step". "trainer" leaves the loss to the network and to transformers, bit
            for bit, which for networks that ignore `num_items_in_batch` multiplies the loss by the accumulation
            steps and eval_loss by the number of processes. "step" has the trainer compute it as for a student: the
            mean over all items of the step, whatever the accumulation and the number of processes, and an eval_loss
            that can be compared with a student's.
        stop_on_nonfinite: stops a training whose loss, or one of whose trained weights, is NaN or infinite, with a
            FloatingPointError; checked when the loss is logged, before a checkpoint and at the end. None stops where
            the trainer computes the loss: with a teacher, in a lineage, and with loss_normalization "step". It does
            not depend on `logging_nan_inf_filter`, which only hides such losses in the log.
        teacher_accuracy_samples: on how many rows of the training set, evenly spaced, the accuracy of the teacher is
            measured before training, for a warning where it underfits them; 0 or more, 0 measures nothing. None
            is 2,048 in a lineage, which records it, and where a warning can come of it, that is for objectives without
            a label term; else 0.
            BornAgainLMTrainer measures the perplexity on the first 60 batches instead, whatever the number above 0.
        lr_milestones: fractions of the training, rising between 0 and 1, after each of which the learning rate is
            multiplied by `lr_gamma`; takes the place of `lr_scheduler_type`. Warm-up arguments hold.
        lr_gamma: see `lr_milestones`; above 0. The paper's recipe has 0.2.
        lr_plateau_factor: what the learning rate is multiplied by after an evaluation without enough gain, between 0
            and 1; takes the place of `lr_scheduler_type`. The metric is `metric_for_best_model`, eval_loss when
            None; it needs an eval_strategy.
        lr_plateau_gain: by how much that metric has to fall below its best so far; 0 or more, in its own unit.
        decay_all_parameters: weight decay on every parameter, as in the paper; transformers leaves out biases and
            some normalisation weights.
        fused_optimizer: has the optimizer of `optim`, "sgd" or "adamw_torch", update many parameters by one kernel, in
            place of torch's default, which on CUDA is one kernel for each operation of the update ("foreach"), on a
            CPU a loop over parameters. The update is the same but for rounding, so weights differ in their last bits;
            it needs no temporary copies of all gradients. The examples choose it on CUDA for new lineages, and a
            lineage goes on as it was begun. An optimizer that is handed over stays as it is.

    Raises:
        ValueError: a value out of range, or one that the chosen objective would not read.

    Example:
        >>> args = BornAgainTrainingArguments("outputs/student", objective="ban+l", label_weight=0.5, use_cpu=True)
        >>> args.weight_affecting()  # what a record of the experiment has beside objective and seed
        {'label_weight': 0.5}
        >>> BornAgainTrainingArguments("outputs/student", objective="cwtm", temperature=4.0, use_cpu=True)
        Traceback (most recent call last):
            ...
        ValueError: temperature: got 4.0, but objective 'cwtm' does not read it; ...
    """

    objective: str = field(default="ban", metadata={"help": f"What a student is taught by: {', '.join(OBJECTIVES)}."})
    temperature: float = field(default=1.0, metadata={"help": "Divides both logits in ban and ban+l."})
    label_weight: float = field(default=1.0, metadata={"help": "Weight of the label term of ban+l."})
    permutation: str = field(default="fresh", metadata={"help": "Of dkpp: fresh or fixed."})
    teacher_annealing: bool = field(
        default=False, metadata={"help": "Of ban: the target goes from the teacher to the label over the training."}
    )
    channels_last: bool = field(default=False, metadata={"help": "Keep 4-d tensors in torch.channels_last."})
    teacher_precision: str = field(
        default="autocast", metadata={"help": f"How the teacher computes: {', '.join(PRECISIONS)}."}
    )
    teacher_cuda_graph: bool = field(
        default=True, metadata={"help": "Replay the teacher's forward as a CUDA graph, on CUDA."}
    )
    teacher_placement: str = field(
        default="replicated",
        metadata={"help": f"Where the teacher is under FSDP2 or DeepSpeed: {', '.join(TEACHER_PLACEMENTS)}."},
    )
    teacher_cache: str = field(
        default="off", metadata={"help": "Where teacher outputs are cached: off, memory, disk."}
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Of teacher_cache disk: the folder; in output_dir when not given."}
    )
    teacher_cache_limit_gib: float | None = field(
        default=None, metadata={"help": "GiB that teacher_cache may take; half of what is free when not given."}
    )
    loss_implementation: str = field(
        default="auto", metadata={"help": "How a loss over a vocabulary is computed: auto, full, chunked."}
    )
    # Deprecated name of loss_implementation; None again once it is read.
    loss_form: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})
    loss_normalization: str = field(
        default="trainer",
        metadata={"help": "Without a teacher: trainer (as transformers does) or step (as with one)."},
    )
    stop_on_nonfinite: bool | None = field(
        default=None,
        metadata={"help": "Stop on a loss or weights that are not finite; with a teacher when not given."},
    )
    sync_batchnorm: bool = field(default=False, metadata={"help": "BatchNorm over the rows of all processes (GPUs)."})
    teacher_accuracy_samples: int | None = field(
        default=None,
        metadata={"help": "Training rows on which the teacher is measured before it teaches; 0 for none."},
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Fractions of training after which the learning rate drops by lr_gamma."}
    )
    lr_gamma: float = field(default=0.2, metadata={"help": "Factor of the learning rate at each milestone."})
    lr_plateau_factor: float | None = field(
        default=None, metadata={"help": "Factor of the learning rate after an evaluation without enough gain."}
    )
    lr_plateau_gain: float = field(default=0.0, metadata={"help": "What counts as enough gain for the plateau."})
    decay_all_parameters: bool = field(default=False, metadata={"help": "Weight decay on every parameter."})
    fused_optimizer: bool = field(
        default=False,
        metadata={"help": "Update many parameters by one kernel (sgd, adamw_torch); the scripts do so on CUDA."},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})

    def __post_init__(self) -> None:
        if self.lr_plateau_factor is not None:
            self._take_plateau(self.lr_plateau_factor)
        elif self.lr_plateau_gain:
            raise ValueError(
                f"lr_plateau_gain: got {self.lr_plateau_gain!r} without lr_plateau_factor; give both, such as "
                "lr_plateau_factor=0.5."
            )
        join_processes_on_cpu(self)
        super().__post_init__()
        check_launch(self)
        self._take_accumulation()
        self._take_loss_form()
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("permutation", self.permutation, PERMUTATIONS)
        check_choice("teacher_precision", self.teacher_precision, PRECISIONS)
        check_choice("teacher_placement", self.teacher_placement, TEACHER_PLACEMENTS)
        check_choice("teacher_cache", self.teacher_cache, TEACHER_CACHES)
        check_choice("loss_implementation", self.loss_implementation, LOSS_IMPLEMENTATIONS)
        check_choice("loss_normalization", self.loss_normalization, LOSS_NORMALIZATIONS)
        _check_above_zero("temperature", self.temperature, "the paper uses 1")
        _check_above_zero("lr_gamma", self.lr_gamma, "the paper's recipe has 0.2")
        if not (math.isfinite(self.label_weight) and self.label_weight >= 0):
            raise ValueError(f"label_weight: got {self.label_weight!r}, expected a finite number of 0 or more.")
        if self.teacher_accuracy_samples is not None and self.teacher_accuracy_samples < 0:
            raise ValueError(
                f"teacher_accuracy_samples: got {self.teacher_accuracy_samples!r}, expected 0 (none) or more rows."
            )
        self._check_that_the_objective_reads("temperature", ("ban", "ban+l"))
        self._check_that_the_objective_reads("label_weight", ("ban+l",))
        self._check_that_the_objective_reads("permutation", ("dkpp",))
        self._check_that_the_objective_reads("teacher_annealing", ("ban",))
        self._check_cache()
        if self.fused_optimizer and not has_fused_form(self.optim):
            raise ValueError(
                f"fused_optimizer: got True with optim {str(getattr(self.optim, 'value', self.optim))!r}, expected "
                "'sgd' or 'adamw_torch'; leave it out."
            )
        if self.lr_milestones is not None:
            self._check_milestones(self.lr_milestones)

    @property
    def has_label_term(self) -> bool:
        """Whether the loss of a student has a term with the labels, which label_smoothing_factor then smooths."""
        return self.objective in OBJECTIVES_WITH_LABELS or self.teacher_annealing

    def weight_affecting(self) -> dict[str, Any]:
        """The weight-affecting arguments that are not at their defaults, for the record of an experiment.

        Mixed precision and compilation are those that accelerate will compute in, which an argument, its launcher or
        the environment may have chosen.

        Returns:
            JSON-able values by name, `world_size` (number of processes) among them when it is not 1; without the seed,
            the objective and the normalisation of the loss, which an experiment states for itself.
        """
        defaults = type(self)(output_dir=self.output_dir, use_cpu=self.use_cpu).to_dict()
        evaluation_decides = self.load_best_model_at_end or self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        excluded = _NOT_WEIGHT_AFFECTING - _EVALUATION if evaluation_decides else _NOT_WEIGHT_AFFECTING
        chosen = {
            name: value
            for name, value in self.to_dict().items()
            if name not in excluded and value != defaults.get(name)
        }
        chosen = {name: value for name, value in chosen.items() if name not in ("bf16", "fp16")}
        if self.mixed_precision in ("bf16", "fp16"):
            chosen[self.mixed_precision] = True
        elif self.mixed_precision != "no":
            chosen["mixed_precision"] = self.mixed_precision
        compiler = compiler_of(self)
        if compiler is not None:
            chosen |= {"torch_compile": True, "torch_compile_backend": self.torch_compile_backend or compiler[0]}
            if self.torch_compile_mode is not None or compiler[1] != "default":
                chosen["torch_compile_mode"] = compiler[1]
        return chosen if self.world_size == 1 else {**chosen, "world_size": self.world_size}

    def use_precision(self, precision: str) -> None:
        """Computes in another mixed precision than these arguments were made with; before a trainer is made of them.

        Args:
            precision: "no", "bf16" or "fp16".
        """
        self.bf16, self.fp16, self.mixed_precision = precision == "bf16", precision == "fp16", precision
        if (plugin := self.deepspeed_plugin) is not None:
            for name in ("bf16", "fp16"):
                plugin.deepspeed_config.setdefault(name, {})["enabled"] = name == precision
            if hasattr(plugin.hf_ds_config, "trainer_config_process"):  # of `deepspeed`, which has its own dtype
                plugin.hf_ds_config.trainer_config_process(self)

    def _take_accumulation(self) -> None:
        """Moves accelerator_config's num_steps to where everything else reads it.

        Trainer does so when it is made, and leaves 1 in the configuration: the next trainer of the same arguments
        would accumulate nothing.
        """
        config = cast(AcceleratorConfig, self.accelerator_config)  # which TrainingArguments made of a dict or a file
        kwargs = config.gradient_accumulation_kwargs
        if kwargs is not None and "num_steps" in kwargs and self.gradient_accumulation_steps == 1:
            left = {name: value for name, value in kwargs.items() if name != "num_steps"}
            self.accelerator_config = cast(Any, dataclasses.replace(config, gradient_accumulation_kwargs=left or None))
            self.gradient_accumulation_steps = kwargs["num_steps"]

    def _take_loss_form(self) -> None:
        if self.loss_form is None:
            return
        renamed, self.loss_form = {"plain": "full"}.get(self.loss_form, self.loss_form), None
        warnings.warn(f"loss_form is deprecated: use loss_implementation={renamed!r}.", FutureWarning, stacklevel=4)
        if self.loss_implementation not in ("auto", renamed):
            raise ValueError(
                f"loss_form: got {renamed!r} beside loss_implementation {self.loss_implementation!r}; loss_form is "
                "its old name, so give loss_implementation alone."
            )
        self.loss_implementation = renamed

    def _check_that_the_objective_reads(self, name: str, readers: tuple[str, ...]) -> None:
        default = type(self).__dataclass_fields__[name].default
        if getattr(self, name) != default and self.objective not in readers:
            raise ValueError(
                f"{name}: got {getattr(self, name)!r}, but objective {self.objective!r} does not read it; expected "
                f"{default!r}, or an objective of {', '.join(map(repr, readers))}."
            )

    def _check_cache(self) -> None:
        limit = self.teacher_cache_limit_gib
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"teacher_cache_limit_gib: got {limit!r}, expected a finite number above 0, in GiB.")
        if limit is not None and self.teacher_cache == "off":
            raise ValueError(
                f"teacher_cache_limit_gib: got {limit!r} with teacher_cache 'off'; use teacher_cache='memory' or "
                "'disk'."
            )
        if self.teacher_cache_dir is not None and self.teacher_cache != "disk":
            raise ValueError(
                f"teacher_cache_dir: got {self.teacher_cache_dir!r} with teacher_cache {self.teacher_cache!r}; use "
                "teacher_cache='disk'."
            )

    def _take_plateau(self, factor: float) -> None:
        """Turns the plateau arguments into the scheduler that transformers steps after every evaluation."""
        if not 0 < factor < 1:
            raise ValueError(
                f"lr_plateau_factor: got {self.lr_plateau_factor!r}, expected a number between 0 and 1; 0.25 quarters "
                "the learning rate."
            )
        if not (math.isfinite(self.lr_plateau_gain) and self.lr_plateau_gain >= 0):
            raise ValueError(f"lr_plateau_gain: got {self.lr_plateau_gain!r}, expected a finite number of 0 or more.")
        if self.lr_milestones is not None:
            raise ValueError(
                f"lr_plateau_factor: got {self.lr_plateau_factor!r} and lr_milestones {self.lr_milestones!r}; "
                "expected one of the two schedules."
            )
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise ValueError(
                f"lr_plateau_factor: got {self.lr_plateau_factor!r} with eval_strategy 'no', which never finds out "
                "whether there is a gain; use eval_strategy='epoch'."
            )
        kind = SchedulerType(self.lr_scheduler_type)
        if kind not in (SchedulerType.LINEAR, SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU):
            raise ValueError(
                f"lr_plateau_factor: got {self.lr_plateau_factor!r} and lr_scheduler_type {kind.value!r}; expected "
                "one of the two schedules."
            )
        self.lr_scheduler_type = SchedulerType.REDUCE_ON_PLATEAU
        self.metric_for_best_model = self.metric_for_best_model or "loss"
        self.greater_is_better = False if self.greater_is_better is None else self.greater_is_better
        self.lr_scheduler_kwargs = {
            "mode": "max" if self.greater_is_better else "min",
            "factor": self.lr_plateau_factor,
            "patience": 0,
            "threshold": self.lr_plateau_gain,
            "threshold_mode": "abs",
        }

    def _check_milestones(self, milestones: list[float]) -> None:
        ends = [0.0, *milestones, 1.0]
        if not milestones or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(
                f"lr_milestones: got {self.lr_milestones!r}, expected rising fractions of training between 0 and 1, "
                "such as 0.3 0.6 0.8."
            )
        kind = SchedulerType(self.lr_scheduler_type)
        if kind not in (SchedulerType.LINEAR, SchedulerType.CONSTANT):
            raise ValueError(
                f"lr_milestones: got {self.lr_milestones!r} and lr_scheduler_type {kind.value!r}; "
                "expected one of the two: milestones are a schedule of their own."
            )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of the choices, naming the argument and the nearest of them."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}{hint}")


def _check_above_zero(name: str, value: float, remedy: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value!r}, expected a finite number above 0; {remedy}.")
