"""torch.compile in a training: one static graph for each network, and none for a shape that comes once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import Tensor, nn

from born_again.teacher import CUDA_GRAPH_MODES
from born_again.training.teacher_accuracy import changed

_eager = functools.partial(torch.compiler.set_stance, "force_eager")


class CompilationMixin:
    """The part of BornAgainTrainer that shows torch.compile full training batches alone.

    At a second shape torch.compile makes a graph for any shape, with slower kernels, and takes it for full batches too
    from then on. So a smaller last batch of an epoch is eager, the teacher is evaluated in batches of the training's
    size, and evaluations are eager, as Trainer's within a training are.
    """

    @property
    def _compiler(self) -> TorchDynamoPlugin | None:
        """What accelerate compiles the student with; None where it does not."""
        plugin = self.accelerator.state.dynamo_plugin
        return None if plugin.backend == DynamoBackend.NO else plugin

    @property
    def _replays_cuda_graphs(self) -> bool:
        """Whether the student's next call overwrites what it returned, and its gradients."""
        return self._compiler is not None and self._compiler.mode in CUDA_GRAPH_MODES

    def _compiling_for_one_shape(self) -> AbstractContextManager[None]:
        """Inside, the student is compiled for the sizes that it sees where all windows of a text have one size."""
        plugin = self._compiler
        if plugin is None or plugin.dynamic is not None or not hasattr(self.train_dataset, "streams"):
            return nullcontext()  # padded texts have many shapes
        return changed(plugin, dynamic=False)

    def _eager_where_smaller(self, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Inside, nothing is compiled for a last batch of an epoch that is smaller than the others."""
        if self._compiler is None or not (self._owns_loss and self.accelerator.gradient_state.end_of_dataloader):
            return nullcontext()
        labels = batch.get((self.label_names or ["labels"])[0])
        if not isinstance(labels, Tensor):
            return nullcontext()
        shares = self.args.world_size if self.args.accelerator_config.split_batches else 1
        full = (self._train_batch_size // shares, getattr(self.train_dataset, "window", 0))
        is_smaller = any(size < most for size, most in zip(labels.shape, full, strict=False))
        return _eager() if is_smaller else nullcontext()

    def _eager_evaluation(self) -> AbstractContextManager[None]:
        return nullcontext() if self._compiler is None else _eager()

    def _copy_gradients(self, model: nn.Module) -> None:
        """Between two micro-batches of a step: the second replay of a CUDA graph would overwrite the gradients of the
        first before they are added up (pytorch/pytorch issue 169545)."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
