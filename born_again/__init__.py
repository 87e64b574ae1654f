"""Born-again networks for the Hugging Face ecosystem.

Importing this package registers its networks with timm and transformers, and does nothing else: at once where one is
imported already, else as soon as one is, so that a program that needs neither does not load torch. Every public name
is imported when it is first used, so that reading a card or a manifest does not load a trainer.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from born_again import models as models
    from born_again.any_model import Lineage as Lineage
    from born_again.hub.publishing import publish_lineage as publish_lineage
    from born_again.lineage.ensemble import LineageEnsemble as LineageEnsemble
    from born_again.lineage.evaluation import load_generation as load_generation
    from born_again.lineage.runner import LineageRunner as LineageRunner
    from born_again.lineage.spec import LineageSpec as LineageSpec
    from born_again.models.char_cnn_lstm import CharCnnLstmConfig as CharCnnLstmConfig
    from born_again.models.char_cnn_lstm import CharCnnLstmForCausalLM as CharCnnLstmForCausalLM
    from born_again.models.image_classifier import create_image_classifier as create_image_classifier
    from born_again.models.lstm_lm import LstmLMConfig as LstmLMConfig
    from born_again.models.lstm_lm import LstmLMForCausalLM as LstmLMForCausalLM
    from born_again.training.arguments import BornAgainTrainingArguments as BornAgainTrainingArguments
    from born_again.training.lm_trainer import BornAgainLMTrainer as BornAgainLMTrainer
    from born_again.training.trainer import BornAgainTrainer as BornAgainTrainer

__version__ = "0.1.0"

# Public name -> module that defines it; the imports above say the same to type checkers.
_HOME = {
    "BornAgainTrainer": "born_again.training.trainer",
    "BornAgainLMTrainer": "born_again.training.lm_trainer",
    "BornAgainTrainingArguments": "born_again.training.arguments",
    "LineageSpec": "born_again.lineage.spec",
    "LineageRunner": "born_again.lineage.runner",
    "LineageEnsemble": "born_again.lineage.ensemble",
    "Lineage": "born_again.any_model",
    "create_image_classifier": "born_again.models.image_classifier",
    "LstmLMConfig": "born_again.models.lstm_lm",
    "LstmLMForCausalLM": "born_again.models.lstm_lm",
    "CharCnnLstmConfig": "born_again.models.char_cnn_lstm",
    "CharCnnLstmForCausalLM": "born_again.models.char_cnn_lstm",
    "load_generation": "born_again.lineage.evaluation",
    "publish_lineage": "born_again.hub.publishing",
}

__all__ = [*_HOME, "models"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("born_again.models")
    if name not in _HOME:
        raise AttributeError(f"module 'born_again' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegistersNetworks(MetaPathFinder):
    """Finds timm and transformers as the finders after it do, and has the networks registered once one is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in _KNOW_NETWORKS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for other in others if (found := other.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module as the loader that was found does, then registers the networks."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # what others ask of a loader, such as get_data

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module("born_again.models")
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


_KNOW_NETWORKS = ("timm", "transformers")
_finder = _RegistersNetworks()
if any(name in sys.modules for name in _KNOW_NETWORKS):
    importlib.import_module("born_again.models")
else:
    sys.meta_path.insert(0, _finder)
