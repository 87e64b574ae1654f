"""From a folder or a Hub repository back to the network of a generation."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from born_again.models.image_classifier import load_image_classifier
from born_again.models.language_models import load_language_model
from born_again.models.saved import read_settings


def load_generation(path_or_repo: str | os.PathLike[str], revision: str | None = None) -> nn.Module:
    """Loads a generation, image classifier or language model, ready to evaluate.

    Args:
        path_or_repo: the folder of a generation, such as OUTPUT_DIR/gen3, or a Hub repository.
        revision: branch, tag or commit of the Hub repository.

    Returns:
        The transformers model in eval mode, weights read from safetensors only.

    Raises:
        FileNotFoundError: a folder that is missing or lacks a file.
        OSError: the Hub has no such repository, or cannot be reached.
        ValueError: what is there is no generation.
    """
    return _loader(path_or_repo, revision)(path_or_repo, revision=revision)


def _loader(path_or_repo: str | os.PathLike[str], revision: str | None):
    try:
        if os.path.isdir(path_or_repo):
            config = read_settings(Path(path_or_repo))
        else:
            config, _ = PretrainedConfig.get_config_dict(path_or_repo, revision=revision)
    except OSError:
        return load_image_classifier  # says what is missing, and what was expected
    # timm's own config.json has an architecture and no model_type.
    is_image = "architecture" in config or config.get("model_type") == "timm_wrapper"
    return load_image_classifier if is_image else load_language_model
