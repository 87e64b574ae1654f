"""A whole lineage of any transformers or timm model, in the arguments that Trainer's users know."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    TimmWrapperForImageClassification,
    TrainerCallback,
    default_data_collator,
)
from transformers.utils.logging import disable_progress_bar

from born_again.any_model.begun_with import begun_with, check_begun_with
from born_again.any_model.datasets import check_labels, chosen_on, label_names, own_names, source_of, splits
from born_again.any_model.networks import (
    architecture_of,
    check_served,
    is_generation,
    is_saved_by_itself,
    load_saved,
    save_network,
    weight_hashes,
)
from born_again.data.drawing import CollatorEpochs, SeededCollator, seed_draws
from born_again.data.fingerprint import dataset_sha256, seeded
from born_again.data.image_dataset import EpochCallback
from born_again.hub.launch import (
    SAVE_MINUTES,
    LineageFlags,
    create_publisher,
    generation_arguments,
    hub_settings,
    load_external_teacher,
    resume_lineage,
    spec_fields,
    take_control,
    with_control,
)
from born_again.hub.model_card import any_model_card, ensemble_card
from born_again.lineage.ensemble import ENSEMBLES, LineageEnsemble
from born_again.lineage.manifest import Manifest
from born_again.lineage.runner import Generation, LineageRunner
from born_again.lineage.spec import LineageSpec, plain_name
from born_again.lineage.status import results_table
from born_again.lineage.task_evaluation import LANGUAGE_TASKS, TaskEvaluation, loader
from born_again.metrics import classification_metrics
from born_again.models.image_classifier import wrap_timm_network
from born_again.report.figures import draw_curve
from born_again.report.page import write_report
from born_again.teacher.inputs import unwrapped
from born_again.teacher.loading import load_network, task_of
from born_again.teacher.preprocessing import check_prepared_as
from born_again.training.arguments import BornAgainTrainingArguments
from born_again.training.checks import check_problem
from born_again.training.item_losses import Objective, custom_name
from born_again.training.lm_trainer import BornAgainLMTrainer
from born_again.training.network_loss import declares_shift, network_loss
from born_again.training.sharding import loading_whole
from born_again.training.trainer import BornAgainTrainer

logger = logging.getLogger(__name__)

_UNITS = {"image-classification": "images", "text-classification": "texts"}  # of others tokens
_MOST_LABELS = 100  # of which names are recorded


class Lineage:
    """A teacher and its students, each of the architecture that `model_init` makes and taught by the one before.

    Everything of `LineageRunner` holds: the same call after a kill at any moment resumes and reaches the weights of an
    uninterrupted run; another experiment, other data or changed weights in the folder are refused; every generation
    has a card, metrics by split and predictions, the newest students are evaluated as ensembles, and all is published
    where args.push_to_hub says so. Each generation is saved by its own save_pretrained, so it loads by plain
    transformers (or timm): networks of timm as image classifiers of transformers around them, PEFT students merged.

        lineage = Lineage(make_model, args, generations=3, train_dataset=train, eval_dataset=test,
                          processing_class=tokenizer, output_dir="outputs/mine")
        manifest = lineage.run()
        print(lineage.results())

    Image, sequence and token classification, causal and masked language models. Metrics are ours, so that they can
    be compared: nll with accuracy, error and ece, or with perplexity, plain cross-entropy whatever the objective, in
    the precision of the weights. Those of `compute_metrics` stand beside them.

    When it is made, `model_init` is called twice and a batch of each dataset is read, so that what cannot work is
    said before anything is trained; and the weights of both calls are compared: where some are the same, the lineage
    starts from pretrained weights, every generation from the same, and its cards say so.

    Args:
        model_init: makes the untrained or pretrained network of a generation, afresh at each call: called without
            arguments, or with the `Generation`, after the generation's seed is set. A network of transformers, of
            timm, a PEFT model, or a module with save_pretrained and from_pretrained
            (huggingface_hub.PyTorchModelHubMixin).
        args: of every generation; `seed` is that of generation 0, generation k has seed + k.
        generations: students after the teacher.
        train_dataset: as Trainer takes it. One with set_seed(seed) and set_epoch(epoch) is told both, so that what it
            draws for a row can hang on them and not on how often it was asked
            (`born_again.data.labelled.TransformedImages`). One without set_epoch that draws from the generators of
            torch, numpy or random is wrapped so (`born_again.data.drawing`).
        eval_dataset: as Trainer takes it; one is recorded as the split "test", a dict by its names. Where a dict has
            no "test", its first is recorded as it, and the cards name it. Trainers evaluate one split of a dict while
            they train, so that eval_loss is of it: "validation", else the first that is not "test"; the whole dict
            where metric_for_best_model names a split, as in "validation_loss".
        processing_class: tokenizer or image processor, saved with each generation.
        data_collator: as Trainer's. What one draws from the generators of torch, numpy or random, such as masks, is a
            function of seed, epoch and the rows of the batch, so that a resumed training draws the same.
        compute_metrics: as Trainer's; in training too, where an eval_strategy says so. The metric_for_best_model
            "accuracy" of classifiers needs none.
        output_dir: the lineage's folder; args.output_dir when None.
        name: of the lineage, which its repositories are named after; MODEL-DATASET when None.
        dataset: name of the data for the cards, best its Hub id; found in the dataset's info when None.
        data_fingerprint: a text of your own that tells these data from others, in place of a hash of their rows
            (`born_again.data.fingerprint`: bounded, so a change in a large dataset may go unseen); needed for streams.
        task: as the Hub names it, such as "text-classification", for a class that transformers does not know.
        pretrained: None finds out whether model_init starts from pretrained weights. True says that even the
            classifier is meant to be the same for every generation, which is refused otherwise.
        teacher: folder or Hub id of a network trained elsewhere, to be generation 0.
        teacher_revision: branch, tag or commit of it on the Hub.
        teacher_processing_class: as `BornAgainTrainer` takes it.
        objective: a function in place of args.objective, as `BornAgainTrainer` takes it.
        callbacks: of every generation's trainer: classes, or instances, of which each generation gets a copy.
        preprocess_logits_for_metrics: as Trainer's.
        trainer_class: a subclass of `BornAgainTrainer`; None takes it, or for causal language models without
            compute_metrics `BornAgainLMTrainer`, which evaluates in a fraction of the memory.
        ensembles: of how many of the newest students.
        from_generation, stop_when_worse, stop_signals, keep_checkpoints, save_minutes: as `LineageRunner` takes them;
            a checkpoint every five minutes and after the last step, beside args.save_strategy.
        control: "equal-compute" or "seeds" trains what the lineage of the same arguments is compared with instead.
        report: writes report.html and report.png after each generation and at the end.
        hub_namespace: user or organisation to publish to, with args.push_to_hub.
        hub_name_pattern: of the repositories' names.
        hub_license: for the cards.
        hub_defer: trains even where the Hub cannot be reached, and publishes later.
        hub_report: publishes report.png too, and shows it in the cards.

    Attributes:
        runner: the `LineageRunner`.
        args: a copy, with the output_dir of the lineage.
        output_dir: the lineage's folder.
        task: as the Hub names it.
        starting_point: name of the pretrained weights, None from scratch.

    Raises:
        TypeError: args that are no BornAgainTrainingArguments; something else than a network from model_init.
        ValueError: a network that is not served, or cannot be saved and loaded; the same object from two calls of
            model_init, or one that is trained already; data that cannot be told apart; labels that do not fit.
        LineageError: the folder holds something else, another experiment, or other data.
        HubError: the Hub cannot be reached.

    Example:
        >>> import timm
        >>> images = [{"pixel_values": torch.randn(3, 8, 8), "labels": row % 2} for row in range(16)]
        >>> args = BornAgainTrainingArguments("mine", max_steps=1, disable_tqdm=True, report_to="none", use_cpu=True)
        >>> lineage = Lineage(
        ...     lambda: timm.create_model("test_wide_resnet_cifar", num_classes=2),
        ...     args,
        ...     generations=1,
        ...     train_dataset=images,
        ...     eval_dataset=images,
        ... )
        >>> manifest = lineage.run()
        generation 0 of 1, step 1 of 1 (epoch 0.5): ...
        generation 1 of 1, step 1 of 1 (epoch 0.5): ...
        >>> [(record["objective"], record["seed"]) for record in manifest.generations]
        [('label', 42), ('ban', 43)]
        >>> manifest.generations[1]["metrics"]["test"].keys() >= {"accuracy", "nll", "ece"}
        True
        >>> lineage.load(1)(pixel_values=torch.randn(4, 3, 8, 8)).logits.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        model_init: Callable[..., nn.Module],
        args: BornAgainTrainingArguments,
        generations: int = 3,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Mapping[str, Any]] | None = None,
        output_dir: str | Path | None = None,
        *,
        name: str | None = None,
        dataset: str | None = None,
        data_fingerprint: str | None = None,
        task: str | None = None,
        pretrained: bool | None = None,
        teacher: str | None = None,
        teacher_revision: str | None = None,
        teacher_processing_class: Any = None,
        objective: Objective | None = None,
        callbacks: Sequence[type[TrainerCallback] | TrainerCallback] = (),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Any] | None = None,
        trainer_class: type[BornAgainTrainer] | None = None,
        ensembles: Sequence[int] = ENSEMBLES,
        from_generation: int | None = None,
        stop_when_worse: bool = False,
        stop_signals: Sequence[str] = (),
        keep_checkpoints: bool = False,
        save_minutes: float | None = SAVE_MINUTES,
        report: bool = True,
        control: str | None = None,
        hub_namespace: str | None = None,
        hub_name_pattern: str = "{name}-gen{index}",
        hub_license: str | None = None,
        hub_defer: bool = False,
        hub_report: bool = False,
    ) -> None:
        if not isinstance(args, BornAgainTrainingArguments):
            raise TypeError(
                f"args: got {type(args).__name__}, expected BornAgainTrainingArguments, which are TrainingArguments "
                "with the objective of the students; make them of it with the same values."
            )
        for what, given in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if given is None or given == {}:
                raise ValueError(
                    f"{what}: got {given!r}, expected a dataset; every generation is trained and evaluated."
                )
        if teacher is not None and not isinstance(teacher, str | Path):
            raise TypeError(
                f"teacher: got {type(teacher).__name__}, expected the folder or Hub id of a network, which the "
                "lineage records; save it with save_pretrained, and give the folder."
            )
        self.args = copy.copy(args)
        if output_dir is not None:
            self.args.output_dir = str(output_dir)
        self.output_dir = Path(str(self.args.output_dir))
        self.model_init, self._takes_generation = model_init, _takes_an_argument(model_init)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.curve_dataset: Any = None  # evaluated during a training in place of eval_dataset
        self.processing_class, self.compute_metrics = processing_class, compute_metrics
        self.data_collator = data_collator or _default_collator(processing_class)
        self._objective, self._callbacks = objective, tuple(callbacks)
        self._preprocess_logits = preprocess_logits_for_metrics
        self._teacher_processing_class = teacher_processing_class
        flags = LineageFlags(
            generations=generations,
            name=name,
            teacher=None if teacher is None else str(teacher),
            teacher_revision=teacher_revision,
            hub_namespace=hub_namespace,
            hub_name_pattern=hub_name_pattern,
            hub_license=hub_license,
            hub_defer=hub_defer,
            hub_report=hub_report,
            from_generation=from_generation,
            control=control,
        )
        # What the arguments say holds, and is compared with what the lineage was begun with.
        flags.given = frozenset({"bf16", "fp16", "fused_optimizer"} | ({"name"} if name else set()))
        hub_settings(flags, self.args)  # validates before anything is loaded
        with seeded(self.args.seed):
            probe = self._probe(task, pretrained, teacher)
            self._trainer_class = trainer_class or self._usual_trainer()
            parts, test_split = splits(eval_dataset)
            self.evaluation = self._evaluation(probe, parts)
            rows = self._check_batches(probe, parts)
            read = next(iter(loader(self.train_dataset, lambda rows: rows, 2, self.evaluation.columns(probe))))
            self._train_rows, self._train_collator = seed_draws(self.train_dataset, self.data_collator, read)
        self._trainers_metrics = self._check_selection(test_split)
        data = self._describe_data(probe, parts, test_split, rows, data_fingerprint)
        compared = None if data_fingerprint is not None else {"train": self.train_dataset, **parts}
        data["begun_with"] = begun_with(probe, self._starting_weights, compared, objective)
        source = dataset or data["source"]
        own_name = plain_name(f"{_short(self.starting_point or self._model)}-{_short(source)}")
        flags.name = name or with_control(own_name, control)
        resume_lineage(flags, self.args)
        take_control(flags, self.args)
        fields = spec_fields(flags, self.args)
        spec = LineageSpec(
            model=self._model,
            model_args=self._architecture,
            dataset=source,
            task=self.task,
            starting_point=self.starting_point,
            **{**fields, "objective": fields["objective"] if objective is None else custom_name(objective)},
        )
        self.runner = LineageRunner(
            spec,
            self.output_dir,
            build_student=lambda generation: self._build(generation),
            build_trainer=self._build_trainer,
            load_teacher=self.load,
            evaluate=self.evaluation,
            save_student=save_network,
            write_card=any_model_card,
            draw_curve=draw_curve,
            write_report=write_report if report else None,
            write_ensemble_card=ensemble_card,
            data=data,
            keep_checkpoints=keep_checkpoints,
            save_minutes=save_minutes,
            take_teacher=None if teacher is None else lambda: self._take_teacher(str(teacher), teacher_revision),
            from_generation=from_generation,
            ensembles=ensembles,
            load_member=self.load,
            publisher=create_publisher(flags, self.args),
            stop_when_worse=stop_when_worse,
            stop_signals=stop_signals,
        )
        check_begun_with(data["begun_with"], self.runner.manifest.content["data"].get("begun_with"), self.output_dir)

    def run(self) -> Manifest:
        """Trains, evaluates and publishes what is missing; see `LineageRunner.run` for what it raises.

        Returns:
            The manifest: `.generations` has each generation's metrics by split, `.content` is lineage.json.
        """
        disable_progress_bar()  # of weights that load in milliseconds; training keeps its own
        return self.runner.run()

    def results(self) -> str:
        """The table of results so far, in Markdown."""
        return results_table(self.runner.manifest.content)

    def load(self, generation: int | str | Path) -> nn.Module:
        """A finished generation by its index or folder, in eval mode."""
        folder = self.runner.folder(generation) if isinstance(generation, int) else Path(generation)
        with loading_whole():
            return load_saved(folder, self._class, self._attention)

    def ensemble(self, members: str | Sequence[int] = "last 3", average: str = "probabilities") -> LineageEnsemble:
        """The ensemble of some finished generations, see `LineageEnsemble.from_lineage`.

        Args:
            members: "last 3" students, "all", or their indices.
            average: "probabilities" or "logits".
        """
        return LineageEnsemble.from_lineage(self.output_dir, members, average, load=self.load)

    def evaluate(self, network: nn.Module | int) -> dict[str, Mapping[str, float]]:
        """The metrics by split of a network, an ensemble, or a generation by its index."""
        return dict(self.evaluation(self.load(network) if isinstance(network, int) else network))

    # ---- What is found out when a lineage is made ----

    def _probe(self, task: str | None, pretrained: bool | None, teacher: Any) -> nn.Module:
        """Calls model_init at two seeds; returns the second network, in eval mode, after every check of it."""
        generation = Generation(0, self.args.seed, "label", None, self.output_dir)
        first = self._made(generation)
        weights, seen = weight_hashes(first), weakref.ref(first)
        del first  # one network at a time, unless model_init keeps it
        torch.manual_seed(self.args.seed + 1)
        network = self._made(Generation(1, self.args.seed + 1, "label", 0, self.output_dir))
        if network is seen():
            raise ValueError(
                "model_init: returned the same object at two calls, expected a new network at each, since a student "
                "would go on from its teacher's trained weights; make the network inside of the function."
            )
        inner = unwrapped(network)
        if isinstance(inner, TimmWrapperForImageClassification) or not hasattr(inner, "config"):
            self.task = task or ("image-classification" if hasattr(inner, "timm_model") else task_of(inner))
        else:
            self.task = task or task_of(inner)
        check_served(network, inner, self.task)
        check_problem(inner, "model's", "in a lineage")
        self._class = type(inner)
        config = getattr(inner, "config", None)
        self._attention = getattr(config, "_attn_implementation", None)
        self._model = getattr(config, "architecture", None) or type(inner).__name__
        self._architecture = architecture_of(inner)
        if inner is not network:
            self._architecture["peft"] = {
                name: str(own.peft_type.value) for name, own in cast(Any, network).peft_config.items()
            }
        self.starting_point = self._starting_point(inner, weights, weight_hashes(network), pretrained)
        return network.eval()

    def _made(self, generation: Generation) -> nn.Module:
        network = self.model_init(generation) if self._takes_generation else self.model_init()
        if not isinstance(network, nn.Module):
            raise TypeError(f"model_init: returned {type(network).__name__}, expected a network (an nn.Module).")
        if not is_saved_by_itself(network):
            return self._wrapped(network)
        self._name_classes(unwrapped(network))
        return network

    def _name_classes(self, network: nn.Module) -> None:
        """Calls the classes of a network as the dataset does, where its config has no names of its own."""
        config, names = getattr(network, "config", None), label_names(self.train_dataset)
        if names and own_names(network) is None and len(getattr(config, "id2label", None) or ()) == len(names):
            cast(Any, config).id2label = dict(enumerate(names))
            cast(Any, config).label2id = {name: index for index, name in enumerate(names)}

    def _wrapped(self, network: nn.Module) -> nn.Module:
        """A network of timm inside transformers' model of it."""
        if not hasattr(network, "pretrained_cfg"):
            raise ValueError(
                f"model_init: returned {type(network).__name__}, a plain nn.Module, expected a network that says how "
                "it is saved and loaded: make it a PreTrainedModel, or have it inherit from "
                "huggingface_hub.PyTorchModelHubMixin beside nn.Module, which needs no other change; networks of timm "
                "and transformers come as they are."
            )
        names = label_names(self.train_dataset)
        return wrap_timm_network(network, names if names and len(names) == cast(Any, network).num_classes else None)

    def _starting_point(
        self, inner: nn.Module, first: dict[str, bytes], second: dict[str, bytes], pretrained: bool | None
    ) -> str | None:
        same = [name for name, digest in first.items() if second.get(name) == digest]
        self._starting_weights = [first[name] for name in same]
        if not same:
            if pretrained:
                raise ValueError(
                    "pretrained: got True, and no weights of two calls of model_init are the same, expected "
                    "pretrained ones; load them in it with from_pretrained, or leave pretrained out."
                )
            return None
        config = getattr(inner, "config", None)
        source = getattr(inner, "name_or_path", None) or getattr(config, "_name_or_path", None)
        is_classifier = self.task not in LANGUAGE_TASKS
        if len(same) == len(first) and pretrained is None and (is_classifier or is_generation(source)):
            what = f"{source!r}, a generation of a lineage" if is_generation(source) else "its classifier too"
            raise ValueError(
                f"model_init: every weight is the same at each call, {what}, so every student would start where its "
                "teacher may have ended; expected a new classifier on pretrained weights, or untrained weights that "
                "depend on the seed (no torch.manual_seed in model_init). A network trained for this task is given as "
                "teacher=...; where all generations are meant to start from these weights, pass pretrained=True."
            )
        return str(source or f"weights of {self._model} that model_init loads")

    def _usual_trainer(self) -> type[BornAgainTrainer]:
        causal = self.task == "text-generation" and self.compute_metrics is None
        return BornAgainLMTrainer if causal else BornAgainTrainer

    def _evaluation(self, network: nn.Module, splits: Mapping[str, Any]) -> TaskEvaluation:
        return TaskEvaluation(
            self.task or "",
            splits,
            self.data_collator,
            self.args.per_device_eval_batch_size,
            self.args.device,
            (self.args.label_names or ["labels"])[0],
            self.task == "text-generation" and declares_shift(network),
            self.args.remove_unused_columns,
            self.compute_metrics,
            self._preprocess_logits,
            self.args.batch_eval_metrics,
            self.args.seed,
            0 if self.task == "fill-mask" else self.args.dataloader_num_workers,  # whose masks would hang on it
        )

    @torch.no_grad()
    def _check_batches(self, network: nn.Module, splits: Mapping[str, Any]) -> dict[str, int]:
        """Reads a batch of each dataset and computes its logits; returns the number of rows where it is known."""
        evaluation = copy.copy(self.evaluation)
        evaluation.device = next(network.parameters()).device
        rows = {}
        for split, dataset in {"train": self.train_dataset, **splits}.items():
            columns = evaluation.columns(network)
            try:
                batch = next(iter(loader(dataset, self.data_collator, 2, columns)), None)
            except KeyError as error:
                if columns is None or (getattr(dataset, "format", None) or {}).get("type") != "custom":
                    raise
                raise ValueError(
                    f"remove_unused_columns: got True, and the transform of the {split} dataset reads the column "
                    f"{error}, which is removed before, since it is no argument of the network's forward; give "
                    "remove_unused_columns=False in args."
                ) from error
            if batch is None:
                raise ValueError(f"{split}: the dataset has no rows, expected at least one.")
            logits, labels = evaluation.forward(network, batch, split)
            if split == "train" and self.task == "text-generation":
                inputs = {key: value for key, value in batch.items() if key != evaluation.label_name}
                found = network_loss(unwrapped(network), inputs, labels, evaluation.label_name).shifts_labels
                evaluation.shifts_labels = evaluation.shifts_labels if found is None else found
                self.evaluation.shifts_labels = evaluation.shifts_labels
            if hasattr(dataset, "__len__"):
                rows[split] = len(dataset)
        module = getattr(self.data_collator, "__module__", "")
        if self.task not in LANGUAGE_TASKS and module.startswith("transformers."):  # which leave labels as they are
            parts = {"train": self.train_dataset, **splits}
            check_labels(parts, logits.shape[-1], evaluation.label_name, own_names(unwrapped(network)))
        return rows

    def _check_selection(self, test_split: str) -> Callable[..., Mapping[str, Any]] | None:
        """Checks what weights or learning rates are chosen by; returns the trainers' compute_metrics."""
        args = self.args
        name, _ = self._chosen_on = chosen_on(self.eval_dataset, args.metric_for_best_model)
        chooses = args.load_best_model_at_end or args.lr_scheduler_type == "reduce_lr_on_plateau"
        stops = any(isinstance(own, EarlyStoppingCallback) for own in self._callbacks)
        if not (chooses or stops):
            return self.compute_metrics
        if name == test_split:
            logger.warning(
                "eval_dataset: %s on the split %r, whose metrics are reported too, so they are better than those of "
                "unseen data; give eval_dataset={'validation': ..., 'test': ...}.",
                "trainings stop" if stops and not chooses else "weights are chosen",
                name,
            )
        metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if self.compute_metrics is not None or metric in ("loss", "nll", "perplexity") or name is None:
            return self.compute_metrics
        if self.task in LANGUAGE_TASKS or metric != "accuracy":
            raise ValueError(
                f"metric_for_best_model: got {args.metric_for_best_model!r} without compute_metrics, expected 'loss'"
                + ("" if self.task in LANGUAGE_TASKS else " or 'accuracy'")
                + "; give compute_metrics, which computes it."
            )
        return _accuracy()

    def _describe_data(
        self,
        network: nn.Module,
        splits: Mapping[str, Any],
        test_split: str,
        rows: Mapping[str, int],
        fingerprint: str | None,
    ) -> dict[str, Any]:
        """The fingerprint of the data, with what the cards say of it."""
        if fingerprint is not None and not (isinstance(fingerprint, str) and fingerprint):
            raise ValueError(
                f"data_fingerprint: got {fingerprint!r}, expected a text that tells these data from others."
            )
        parts = {"train": self.train_dataset, **splits}
        if fingerprint is None:
            hashed = {
                split: dataset_sha256("train_dataset" if split == "train" else "eval_dataset", dataset)
                for split, dataset in parts.items()
            }
            fingerprint = "\n".join(f"{split} {digest}" for split, digest in sorted(hashed.items()))
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()
        data = {
            "source": source_of(self.train_dataset),
            "sha256": digest,
            "rows": dict(rows),
            "unit": _UNITS.get(self.task or "", "tokens"),
        }
        if test_split != "test":
            data["test_split"] = test_split
        labels = getattr(getattr(unwrapped(network), "config", None), "id2label", None)
        if self.task not in LANGUAGE_TASKS and labels:
            data["classes"] = len(labels)
            if len(labels) <= _MOST_LABELS:
                data["label_names"] = [str(labels[index]) for index in sorted(labels)]
        if self.processing_class is not None:
            is_tokenizer = isinstance(self.processing_class, PreTrainedTokenizerBase)
            data["processor"] = "AutoTokenizer" if is_tokenizer else "AutoProcessor"
        return data

    # ---- What the runner calls ----

    def _build(self, generation: Generation) -> nn.Module:
        return self._made(generation).train()

    def _build_trainer(
        self, student: nn.Module, teacher: nn.Module | None, generation: Generation
    ) -> BornAgainTrainer:
        for data in (self._train_rows, self._train_collator):
            if hasattr(data, "set_seed"):
                data.set_seed(generation.seed)
        return self._trainer_class(
            student,
            generation_arguments(self.args, generation),
            data_collator=self._train_collator,
            train_dataset=self._train_rows,
            eval_dataset=self._chosen_on[1] if self.curve_dataset is None else self.curve_dataset,
            processing_class=self.processing_class,
            compute_metrics=cast(Any, self._trainers_metrics),
            callbacks=[
                EpochCallback(),
                *([CollatorEpochs(self._train_collator)] if isinstance(self._train_collator, SeededCollator) else []),
                *(own() if isinstance(own, type) else copy.deepcopy(own) for own in self._callbacks),
            ],
            preprocess_logits_for_metrics=self._preprocess_logits,
            teacher=teacher,
            teacher_processing_class=self._teacher_processing_class if generation.index == 1 else None,
            objective=self._objective,
        )

    def _take_teacher(self, source: str, revision: str | None) -> nn.Module:
        teacher = load_external_teacher(source, lambda: load_network(source, revision))
        if (theirs := task_of(teacher)) != self.task:
            raise ValueError(
                f"teacher: {source!r} is for {theirs}, and the lineage for {self.task}; expected the same task."
            )
        check_prepared_as(teacher, dict(self.evaluation.splits), self.processing_class)
        return teacher


# ---- Arguments and data ----


def _takes_an_argument(model_init: Any) -> bool:
    if isinstance(model_init, nn.Module) or not callable(model_init):
        raise TypeError(
            f"model_init: got {type(model_init).__name__}, expected a function that makes the network, since each "
            "generation needs a new one; wrap it, as in lambda: AutoModelForImageClassification.from_config(config)."
        )
    try:
        inspect.signature(model_init).bind()
    except TypeError:
        return True
    except ValueError:
        pass  # of a builtin no signature is known
    return False


def _default_collator(processing_class: Any) -> Callable[..., Any]:
    """The one that Trainer takes."""
    if isinstance(processing_class, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        return DataCollatorWithPadding(cast(Any, processing_class))
    return default_data_collator


def _accuracy() -> Callable[..., dict[str, float]]:
    """compute_metrics of the accuracy over all labels that count."""
    metrics = classification_metrics()

    def compute(predicted: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        given = predicted.predictions
        logits = torch.as_tensor(given[0] if isinstance(given, tuple) else given)
        labels = torch.as_tensor(cast(Any, predicted.label_ids))
        flat = EvalPrediction(cast(Any, logits.reshape(-1, logits.shape[-1])), cast(Any, labels.reshape(-1)))
        found = metrics(flat, compute_result=compute_result)
        return {"accuracy": found["accuracy"]} if compute_result else {}

    return compute


def _short(name: str) -> str:
    return re.split(r"[/\\]+", name.rstrip("/\\"))[-1]
