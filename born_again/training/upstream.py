"""Upstream workarounds: transformers.Trainer with bugs fixed and redundant work left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from born_again.metrics import BatchMetrics
from born_again.training.background_save import BackgroundSaveMixin
from born_again.training.fused_optimizer import FusedOptimizerMixin
from born_again.training.lean_steps import LeanStepsMixin
from born_again.training.restoring import complete_weights
from born_again.training.sharding import ShardingMixin
from born_again.training.teacher_accuracy import changed

_NO_LSTM = "LSTM forward propagation primitive"  # in oneDNN's error for a dtype that it has no LSTM in


@contextmanager
def explaining_errors(trainer: Trainer) -> Iterator[None]:
    """Adds to oneDNN's error a note on the argument that it comes from."""
    try:
        yield
    except RuntimeError as error:
        if _NO_LSTM in str(error) and not getattr(error, "__notes__", None):
            name = trainer.accelerator.mixed_precision
            error.add_note(
                f"{name}: got True, expected False for a network with a torch.nn.LSTM, which this machine cannot "
                f"compute in {name}; give {name}=False, or have the network call its LSTM with float32 inputs inside "
                f"torch.autocast({trainer.args.device.type!r}, enabled=False)."
            )
        raise


class BaseTrainer(BackgroundSaveMixin, ShardingMixin, FusedOptimizerMixin, LeanStepsMixin, Trainer):
    """Trainer with the same results, faster steps, and evaluation before training that leaves no trace."""

    _parameter_count: int | None = None
    _restored: tuple[nn.Module, Path] | None = None  # while the weights of a checkpoint are loaded
    _datasets_of_loaders: Mapping[str, Any] = MappingProxyType({})  # by the names that Trainer keeps loaders under

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        smoothing = getattr(args, "label_smoothing_factor", 0.0)
        if not smoothing or not isinstance(model, nn.Module) or hasattr(model, "config"):
            super().__init__(model, args, *rest, **kwargs)
            return
        # To smooth labels Trainer asks the network for a config, which a plain nn.Module does not have.
        with changed(args, label_smoothing_factor=0.0):
            super().__init__(model, args, *rest, **kwargs)
        self.label_smoother = LabelSmoother(epsilon=smoothing)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Trainer's; where workers are persistent it would give its first loader for any dataset it is handed."""
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if self._datasets_of_loaders.get(name) is not dataset:
            getattr(self, "_eval_dataloaders", {}).pop(name, None)
            self._datasets_of_loaders = {**self._datasets_of_loaders, name: dataset}
        collate = getattr(self.data_collator, "for_evaluation", self.data_collator)  # `born_again.data.drawing`
        with changed(self, data_collator=collate):
            return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which leaves nothing behind for the training.

        An evaluation before training would mark the student as prepared: accelerate would take the mark for its own
        and leave the student without DistributedDataParallel in train(). One of the training set within an epoch would
        tell the dataset that its first epoch begins; and one that broke off would be counted in the next.
        """
        if isinstance(self.compute_metrics, BatchMetrics):
            self.compute_metrics.reset()
        if self.is_in_train and getattr(dataloader, "dataset", None) is self.train_dataset:
            dataloader.set_epoch = lambda epoch: None
        with self._evaluating():
            return self._evaluate_without_a_trace(dataloader, *args, **kwargs)

    def _evaluate_without_a_trace(self, *args: Any, **kwargs: Any) -> Any:
        state = self.model.__dict__
        if state.get("_is_accelerate_prepared", False) or self.is_sharded:
            with explaining_errors(self):
                return super().evaluation_loop(*args, **kwargs)
        names = ("_is_accelerate_prepared", "_original_forward", "forward")
        before, wrapped = {name: state[name] for name in names if name in state}, self.model_wrapped
        prepared = list(self.accelerator._models)  # by the user, for something else
        try:
            with explaining_errors(self):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            for name in names:
                state.pop(name, None)
            state.update(before)
            self.accelerator._models[:] = prepared
            self.model_wrapped = wrapped  # else train() would take what was compiled here for a prepared student

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's."""
        self._parameter_count = None  # parameters may have been frozen or added
        return super().train(*args, **kwargs)

    def _forget_steps(self, *_: Any) -> None:
        super()._forget_steps()
        self._parameter_count = None

    # A student that comes out of torch.compile is saved and loaded as what it was made of: Trainer would put
    # `_orig_mod.` before the name of every weight, which nothing else loads, and leave the config out.

    @contextmanager
    def _student_as_it_was(self) -> Iterator[None]:
        given = self.model
        self.model = getattr(given, "_orig_mod", given)
        try:
            yield
        finally:
            self.model = given

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with self._student_as_it_was():
            super()._save(output_dir, state_dict)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's; of gradients in shards by their norm as a whole.

        Where torch adds its 1e-6 to the norm of each shard (2.8 does) gradients would be clipped otherwise by 4e-7.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if not self.is_fsdp_enabled or not all(isinstance(parameter.grad, DTensor) for parameter in parameters):
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norm = get_total_norm([parameter.grad for parameter in parameters]).full_tensor()
        clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        device = self.args.device
        if device.type != "cpu" or device.index is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # "cpu:0", as a CPU is called on several processes, is no place that torch.load knows; older Trainers name it.
        with changed(self.args, _setup_devices=torch.device("cpu")):
            super()._load_optimizer_and_scheduler(checkpoint)

    # The files of a checkpoint are those of save_pretrained, which names the weights of some networks (ViT, DeiT,
    # BEiT, DINOv2) as older releases did. Trainer looks for the names that the network has now, and leaves other
    # weights as they are with a warning.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._student_as_it_was():
            student = self.model if model is None else model
            with changed(self, _restored=(student, Path(resume_from_checkpoint))):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._student_as_it_was():
            with changed(self, _restored=(self.model, Path(cast(str, self.state.best_model_checkpoint)))):
                super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if self._restored is None or self.is_sharded:
            super()._issue_warnings_after_load(load_result)
        else:
            complete_weights(*self._restored, load_result.missing_keys, load_result.unexpected_keys)

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Trainer's number, without walking through all modules to count the same parameters at every step."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        if self._parameter_count is None:
            self._parameter_count = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs[name].numel() * self._parameter_count
