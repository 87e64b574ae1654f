"""Networks of any kind in a lineage: which are served, what tells them apart, how they are saved and loaded."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TimmWrapperForImageClassification

from born_again.lineage.manifest import MANIFEST_NAME
from born_again.models.image_classifier import load_image_classifier, save_image_classifier
from born_again.models.saved import read_settings
from born_again.teacher import carries_state
from born_again.teacher.inputs import unwrapped
from born_again.teacher.loading import SERVED, TASKS, load_network

# Of a config what is no property of the architecture, or is recorded elsewhere.
_NOT_ARCHITECTURE = (
    "transformers_version architectures _name_or_path id2label label2id label_names auto_map _commit_hash "
    "pretrained_cfg architecture num_classes model_args problem_type".split()
)

# ---- Saving and loading ----


def is_saved_by_itself(network: nn.Module) -> bool:
    """Whether a network says how it is saved and loaded, by save_pretrained and from_pretrained."""
    inner = unwrapped(network)
    return hasattr(inner, "save_pretrained") and hasattr(type(inner), "from_pretrained")


def save_network(network: nn.Module, folder: Path) -> None:
    """Writes a trained network so that it loads by plain means; of PEFT its adapters are merged."""
    if hasattr(network, "get_base_model"):  # of PEFT: merged, so that it loads without it
        network = cast(Any, copy.deepcopy(network)).merge_and_unload()
    if isinstance(network, TimmWrapperForImageClassification):
        save_image_classifier(network, folder)
    elif hasattr(network, "config") and hasattr(network, "main_input_name"):
        cast(Any, network).save_pretrained(folder, max_shard_size="1000GB")  # the runner hashes one file
    else:
        cast(Any, network).save_pretrained(folder)


def load_saved(folder: Path, kind: type[nn.Module], attention: str | None) -> nn.Module:
    """The network in the folder of a generation, as the class that model_init makes or that its config.json names."""
    if read_settings(folder).get("model_type") == "timm_wrapper":
        return load_image_classifier(folder)
    options = {} if attention is None else {"attn_implementation": attention}
    if hasattr(kind, "main_input_name"):
        return load_network(folder, like=cast(Any, kind), **options)
    return cast(Any, kind).from_pretrained(folder).eval()


def check_served(network: nn.Module, inner: nn.Module, task: str | None) -> None:
    """Refuses networks that a lineage does not serve.

    Args:
        network: as model_init returned it.
        inner: the same without PEFT.
        task: as the Hub names it, None for an unknown class.

    Raises:
        ValueError: names what is served.
    """
    if task is None or task not in TASKS:
        raise ValueError(
            f"task: got {task!r} for {type(inner).__name__}, which transformers has for no task that it knows, "
            f"expected one of {', '.join(map(repr, TASKS))}; served are {SERVED}."
        )
    if task in ("text-generation", "fill-mask") and getattr(
        getattr(inner, "config", None), "is_encoder_decoder", False
    ):
        raise ValueError(
            f"model: {type(inner).__name__} is an encoder-decoder, for sequence to sequence, expected a network with "
            f"one row of logits for each label; served are {SERVED}. BornAgainTrainer teaches encoder-decoders."
        )
    if carries_state(inner):
        raise ValueError(
            f"model: {type(inner).__name__} carries a state from window to window, which rows of a dataset do not "
            "have; expected a network that reads each row on its own. examples/run_ptb.py trains lineages of these."
        )
    if inner is not network and not hasattr(network, "merge_and_unload"):
        raise ValueError(
            f"model: {type(network).__name__} cannot be merged into its base model (it has no merge_and_unload), "
            "expected adapters that can, such as LoRA, so that a generation loads without PEFT."
        )


# ---- What two calls of model_init tell ----


def weight_hashes(network: nn.Module) -> dict[str, bytes]:
    """A hash of each weight that is not the same number throughout, as many are at the start whatever the seed."""
    found = {}
    for name, value in network.state_dict().items():
        flat = value.detach().flatten()
        if flat.numel() < 2 or not flat.is_floating_point() or bool((flat == flat[0]).all()):
            continue
        part = flat[:: max(1, flat.numel() // 4096)][:4096].to("cpu", torch.float32)
        found[name] = hashlib.sha256(part.numpy().tobytes()).digest()
    return found


def is_generation(source: Any) -> bool:
    """Whether a folder is that of a generation in a lineage's."""
    return isinstance(source, str) and bool(source) and (Path(source).parent / MANIFEST_NAME).is_file()


def architecture_of(network: nn.Module) -> dict[str, Any]:
    """What of a network's config decides its architecture, JSON-able."""
    config = getattr(network, "config", None)
    if isinstance(network, TimmWrapperForImageClassification):
        return {"library": "timm", **(cast(Any, config).model_args or {})}
    if config is None or not hasattr(config, "to_diff_dict"):
        return {"class": f"{type(network).__module__}.{type(network).__qualname__}"}
    values = {name: value for name, value in config.to_diff_dict().items() if name not in _NOT_ARCHITECTURE}
    return {name: value for name, value in values.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(own) for key, own in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)
