"""Born-again networks for the Hugging Face ecosystem.

Importing this package registers its networks with timm and transformers, and does nothing else: every public name is
imported when it is first used, so that reading a card or a manifest does not load a trainer.
"""

from __future__ import annotations

import importlib
from typing import Any

from born_again import models as models  # registers the architectures with timm and transformers

__version__ = "0.1.0"

_HOME = {
    "BornAgainTrainer": "born_again.trainer",
    "BornAgainLMTrainer": "born_again.lm_trainer",
    "BornAgainTrainingArguments": "born_again.training_args",
    "LineageSpec": "born_again.lineage.spec",
    "LineageRunner": "born_again.lineage.runner",
    "LineageEnsemble": "born_again.lineage.ensemble",
    "create_image_classifier": "born_again.models.image_classifier",
    "LstmLMConfig": "born_again.models.lstm_lm",
    "LstmLMForCausalLM": "born_again.models.lstm_lm",
    "CharCnnLstmConfig": "born_again.models.char_cnn_lstm",
    "CharCnnLstmForCausalLM": "born_again.models.char_cnn_lstm",
    "load_generation": "born_again.lineage.loading",
    "publish_lineage": "born_again.publishing",
}

__all__ = [*_HOME, "models"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'born_again' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
