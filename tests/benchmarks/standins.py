"""What stands in for `datasets` and `evaluate` on a machine that has neither, for benchmarks that read no dataset.

The package imports both where images are decoded and where metrics are declared; random images and sums need neither.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import transformers


class _Anything(ModuleType):
    """A module in which every name is an empty class, or a module where it is one of `datasets`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **kwargs: None, "num_process": 1, "name": name})
        setattr(self, name, made)
        return made


def stand_in_for_missing_libraries() -> list[str]:
    """Puts stand-ins in place of what is missing, before the package is imported; returns their names."""
    transformers.utils.is_datasets_available()  # remembers the answer
    missing = [name for name in ("datasets", "evaluate") if importlib.util.find_spec(name) is None]
    parts = {"datasets": ("", ".exceptions", ".utils", ".utils.file_utils"), "evaluate": ("",)}
    for name in (library + part for library in missing for part in parts[library]):
        module = _Anything(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
    return missing
