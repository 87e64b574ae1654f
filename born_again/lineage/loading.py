"""From a folder or a Hub repository back to the network of a generation."""

from __future__ import annotations

import os

from torch import nn

from born_again.models.image_classifier import load_image_classifier


def load_generation(path_or_repo: str | os.PathLike[str], revision: str | None = None) -> nn.Module:
    """Loads a generation, ready to evaluate.

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
    return load_image_classifier(path_or_repo, revision=revision)
