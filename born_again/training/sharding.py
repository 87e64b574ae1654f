"""Students that FSDP2 or DeepSpeed keep in shards over processes: saved as whole files, resumed, evaluated untrained.

Weights are written as on one process, so that a generation loads by from_pretrained; the first process holds all of
them in main memory while it writes. The optimizer state is written so too under FSDP2, while DeepSpeed adds files of
each process, in its own format, to a checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, Trainer
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from born_again.teacher import FrozenTeacher
from born_again.training.environment import compiler_of
from born_again.training.restoring import converted_weights, refuse_difference
from born_again.training.teacher_accuracy import changed

# Of timm, of torchvision and of born_again: what is repeated in a network of images.
_BLOCK = re.compile(r"\w*(Block|Bottleneck|Residual)")
_LOADED_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_UNITS = 8  # of a network without repeated blocks: as many parts, by their number of parameters
_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")
MIXED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ShardingMixin(Trainer):
    """The part of BaseTrainer for students in shards.

    In a lineage weights are whole files, written by the first process; elsewhere checkpoints are those of Trainer.
    """

    in_lineage = False
    _owns_loss = False
    _guard: Any
    _memory_format: torch.memory_format | None
    _sum_over_processes: Any

    @property
    def is_sharded(self) -> bool:
        """Whether an engine may keep the student in shards, so that every process has to call and save it together."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; DeepSpeed's configuration of an earlier training in this process is not in its way."""
        if getattr(self.args, "deepspeed_plugin", None) is not None:
            AcceleratorState._reset_state()
        super().create_accelerator_and_postprocess()

    def _teacher_autocast(self) -> Any:
        """The context of the teacher's forward: accelerate has none for DeepSpeed, which casts the student alone."""
        dtype = MIXED_DTYPES.get(self.accelerator.mixed_precision)
        if dtype is not None and self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, dtype)
        # Without mixed precision accelerate gives the same, after it has asked its state at each step.
        return self.accelerator.autocast() if self.accelerator.native_amp else nullcontext()

    def _check_weights(self) -> None:
        state = self.state
        self._guard.check_weights(self.model, state.global_step, state.max_steps, self._sum_over_processes)

    @contextmanager
    def whole_student(self) -> Iterator[nn.Module]:
        """Inside, the unwrapped student, on the first process with whole weights that no training may touch.

        Every process must enter it together.
        """
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not self.is_sharded:
            yield student
            return
        _reshard(student)
        places, whole = [], {}
        for module in student.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in whole:  # tied weights stay one
                    value = gathered(parameter, self.args.should_save)
                    whole[id(parameter)] = parameter if value is None else nn.Parameter(value, False)
                places.append((module._parameters, name, parameter))
        kind = type(student)
        try:
            for parameters, name, parameter in places:
                parameters[name] = whole[id(parameter)]
            if isinstance(student, FSDPModule):
                student.__class__ = kind.__bases__[-1]  # whose name goes into config.json
            yield student
        finally:
            student.__class__ = kind
            for parameters, name, parameter in places:
                parameters[name] = parameter

    def _lay_out(self, student: nn.Module) -> nn.Module:
        """Gives weights the arguments' memory format; shards are of contiguous ones."""
        if self._memory_format is None or self.is_sharded:
            return student
        return student.to(memory_format=self._memory_format)

    @property
    def _captures_teacher(self) -> bool:
        return self.args.teacher_cuda_graph and self.args.teacher_placement == "replicated"

    def _place_teacher(self, frozen: FrozenTeacher, memory_format: torch.memory_format | None) -> None:
        is_sharded = self.args.teacher_placement == "sharded"
        frozen.to(self.args.device, None if is_sharded else memory_format)
        if is_sharded:
            for module in frozen.modules:
                shard_teacher(module)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Trainer's; called before a student is sharded."""
        if self.is_fsdp_enabled:
            self._choose_layers(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        elif self.is_deepspeed_enabled and (self._owns_loss or self.in_lineage):
            # DeepSpeed, which does all of a step, would clip nothing.
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config.setdefault("gradient_clipping", self.args.max_grad_norm)
        return super()._wrap_model(model, *args, **kwargs)

    def _choose_layers(self, student: nn.Module) -> None:
        """Says which layers are gathered one after the other, where neither arguments nor launcher do.

        Accelerate looks for what a network of transformers calls its layers, which networks of timm do not say, and
        keeps those of the generation before.
        """
        asked, plugin = self.args.fsdp_config or {}, self.accelerator.state.fsdp_plugin
        policy = asked.get("auto_wrap_policy") or os.environ.get("FSDP_AUTO_WRAP_POLICY") or "TRANSFORMER_BASED_WRAP"
        names = asked.get("transformer_layer_cls_to_wrap") or os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
        if names or policy.upper() != "TRANSFORMER_BASED_WRAP":
            return
        names = layers_to_shard(student)
        plugin.transformer_cls_names_to_wrap = names
        plugin.auto_wrap_policy = transformer_auto_wrap_policy if names else size_based_auto_wrap_policy
        plugin.min_num_params = max(1, count_parameters(student) // _UNITS)

    @property
    def _writes_whole_optimizer(self) -> bool:
        return self.is_fsdp_enabled and self.in_lineage

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's."""
        if not (self.is_sharded and self.in_lineage):
            super().save_model(output_dir, _internal_call)
            return
        with self.whole_student(), changed(self, is_fsdp_enabled=False, is_deepspeed_enabled=False):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._writes_whole_optimizer:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = tree_map(lambda value: gathered(value, self.args.should_save), self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._writes_whole_optimizer:
            load_whole(self.model if model is None else model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._writes_whole_optimizer:
            load_whole(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._writes_whole_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = os.path.join(checkpoint, OPTIMIZER_NAME)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, values in state["state"].items():
            like = trained[index]
            # Not the number of steps, a scalar.
            state["state"][index] = tree_map(
                lambda value, like=like: shard(value, like) if value.shape == like.shape else value, values
            )
        self.optimizer.load_state_dict(state)
        scheduler = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, a student can be evaluated before it is trained.

        FSDP2 shards it, as the training would. DeepSpeed could not train it any more: it is evaluated without.
        """
        if not self.is_deepspeed_enabled or self.deepspeed is not None:
            self._shard_to_evaluate()
            yield
            return
        with _whole_zero3(self.model), self._teacher_autocast(), changed(self, is_deepspeed_enabled=False):
            self.model.to(self.args.device)
            yield

    def _shard_to_evaluate(self) -> None:
        # Accelerate shards a network beside its optimizer alone, which is made when the training begins.
        if not self.is_fsdp_enabled or self.accelerator._models:
            return
        self._wrap_model(self.model)
        optimizers = list(self.accelerator._optimizers)
        student, _ = self.accelerator.prepare(self.model, torch.optim.SGD(self.model.parameters(), lr=0.0))
        self.accelerator._optimizers[:] = optimizers
        self.model = self.model_wrapped = student


@contextmanager
def loading_whole() -> Iterator[None]:
    """A context manager in which networks are made and loaded whole on every process, under an engine as without.

    With FSDP's cpu_ram_efficient_loading transformers reads weights on the first process alone, for a network that is
    sharded afterwards: a teacher is not. With ZeRO-3 it makes and loads networks in shards, of other initial weights.
    """
    before, zero = os.environ.get(_LOADED_ONCE), hf_deepspeed._hf_deepspeed_config_weak_ref
    if before is not None:
        os.environ[_LOADED_ONCE] = "false"
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before is not None:
            os.environ[_LOADED_ONCE] = before
        if hf_deepspeed._hf_deepspeed_config_weak_ref is None:  # else training arguments were made inside
            hf_deepspeed._hf_deepspeed_config_weak_ref = zero


def check_teacher_loading(trainer: Trainer, teachers: nn.Module | Sequence[nn.Module]) -> None:
    """Refuses a teacher whose weights this process does not have, and a placement that is not possible.

    Raises:
        ValueError: it was loaded for an engine that shards it afterwards; `teacher_placement` is "sharded" without
            FSDP2 or DeepSpeed, or beside what needs the whole teacher on every process.
    """
    args = trainer.args
    given = [teachers] if isinstance(teachers, nn.Module) else teachers
    for teacher in (one for one in given if isinstance(one, nn.Module)):  # others are refused as no networks
        if any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
            raise ValueError(
                f"teacher: {type(teacher).__name__} was loaded in shards, as from_pretrained does once training "
                "arguments with ZeRO-3 are made; expected whole weights on every process: load it before them, or "
                "inside `with born_again.training.sharding.loading_whole():`; teacher_placement='sharded' shards it."
            )
        if not trainer.is_fsdp_enabled or not any(parameter.is_meta for parameter in teacher.parameters()):
            continue
        raise ValueError(
            f"teacher: process {args.process_index} has no weights of {type(teacher).__name__}, which "
            "from_pretrained has read on the first process alone (fsdp_cpu_ram_efficient_loading); expected them on "
            "every process, before it is placed: load it inside `with "
            "born_again.training.sharding.loading_whole():`, or set fsdp_cpu_ram_efficient_loading to false."
        )
    if args.teacher_placement == "replicated":
        return
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            f"teacher_placement: got {args.teacher_placement!r} without FSDP2 or DeepSpeed, expected 'replicated'; to "
            "shard teacher and student, start with `accelerate launch --use_fsdp --fsdp_version 2`."
        )
    for name, value, expected in (
        ("teacher_cache", args.teacher_cache, "off"),
        ("teacher_precision", args.teacher_precision, "autocast"),
        ("torch_compile", compiler_of(args) is not None, False),
    ):
        if value != expected:
            raise ValueError(
                f"teacher_placement: got 'sharded' with {name} {value!r}, expected {expected!r}: every process "
                "has to call the network itself for every batch, since all gather its weights together; or "
                "teacher_placement='replicated'."
            )


def shard_teacher(teacher: nn.Module) -> None:
    """Shards a frozen network over all processes, in place; its weights are gathered layer by layer in its forward.

    Args:
        teacher: frozen and on its device, with the same weights on every process.
    """
    names = layers_to_shard(teacher)
    for module in reversed(list(teacher.modules())):
        if module is teacher or type(module).__name__ in names:
            # The outermost too, which FSDP2 else leaves whole after its forward, for a backward that never comes.
            fully_shard(module, reshard_after_forward=True)


def layers_to_shard(student: nn.Module) -> list[str]:
    """The classes of layers whose weights FSDP2 gathers one layer after the other.

    Args:
        student: unwrapped.

    Returns:
        Names: those that a network of transformers says not to split, or else of the outermost repeated blocks, as
        networks of timm name theirs; [] where there are none.
    """
    classes = {type(module).__name__ for module in student.modules() if module is not student}
    if said := sorted(classes.intersection(getattr(student, "_no_split_modules", None) or ())):
        return said
    found: dict[str, int] = {}

    def look(module: nn.Module) -> None:
        for child in module.children():
            name = type(child).__name__
            if _BLOCK.fullmatch(name):
                found[name] = found.get(name, 0) + 1
            else:
                look(child)

    look(student)
    return sorted(found)


def gathered(value: Any, keep: bool) -> Any:
    """A tensor of which every process has a shard, put together in main memory; every process must call it together.

    Args:
        value: anything; what is no such tensor is returned as it is.
        keep: whether the result is wanted on this process.

    Returns:
        The whole tensor, on the CPU; None on a process that does not want it.
    """
    if hasattr(value, "ds_id") or hasattr(value, "_hp_mapping"):
        whole = _gathered_by_deepspeed(value)
        return whole.cpu() if keep else None
    if not isinstance(value, DTensor):
        return value
    # Offloaded shards are sent by the devices that the processes are connected by.
    whole = value.detach().to(value.device_mesh.device_type).full_tensor()
    return whole.cpu() if keep else None


def _gathered_by_deepspeed(parameter: nn.Parameter) -> Tensor:
    """In float32 where it is computed with in less: what the optimizer updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    is_trained = parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"))
    if is_trained and (whole := safe_get_full_fp32_param(parameter)) is not None:
        return whole.to(torch.promote_types(parameter.dtype, torch.float32))
    with _whole_zero3(parameter):
        return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def _whole_zero3(network: nn.Module | nn.Parameter) -> Any:
    """A context manager in which every process has the whole weights that ZeRO-3 keeps in shards, if it does."""
    parameters = [network] if isinstance(network, nn.Parameter) else network.parameters()
    parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that every process has read."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole(student: nn.Module, folder: Path) -> None:
    """Loads the weights of a folder into a student in shards.

    Args:
        student: with its shards.
        folder: with model.safetensors, or its parts.

    Raises:
        ValueError: it lacks weights of the student.
    """
    weights = {name: value for path in sorted(folder.glob("model*.safetensors")) for name, value in
               load_file(path).items()}  # fmt: skip
    _reshard(student)
    left = _load_by_name(student, weights)
    if left and isinstance(student, PreTrainedModel):
        with loading_whole():
            weights = converted_weights(student, folder)
        left = _load_by_name(student, weights)
    refuse_difference(student, folder, left, [])


@torch.no_grad()
def _load_by_name(student: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copies weights into a student in shards; returns the names of those that it lacks."""
    missing: dict[int, str] = {}
    loaded: set[int] = set()
    named = [*student.named_parameters(remove_duplicate=False), *student.named_buffers(remove_duplicate=False)]
    persistent = student.state_dict().keys()
    for name, tensor in named:
        name = _WRAPPERS.sub("", name)
        if name in weights:
            tensor.copy_(shard(weights[name], tensor))
            loaded.add(id(tensor))
        elif name in persistent:
            missing[id(tensor)] = name
    return [name for key, name in missing.items() if key not in loaded]  # of tied weights one is saved


def count_parameters(network: nn.Module) -> int:
    """How many parameters a network has, also where this process has a shard of them alone."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in network.parameters())


def local_part(parameter: Tensor) -> Tensor:
    """What of a parameter this process has."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    # What fills up the last process's shard was never written.
    rank = distributed.get_rank(parameter.ds_process_group)
    return part[: max(0, parameter.ds_numel - rank * part.numel())]


def _reshard(student: nn.Module) -> None:
    """After an evaluation the outermost module still has its weights, in the precision that it computed in."""
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
