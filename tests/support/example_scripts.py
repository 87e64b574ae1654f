"""The scripts in examples/ as modules of a test's own process."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str, writes_report: bool = False) -> ModuleType:
    """examples/NAME.py, executed anew at every call; by default without the report, which costs a second each time."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    if hasattr(module, "LineageArguments"):  # whose field is that of all lineages' flags
        module.LineageArguments.__dataclass_fields__["report"].default = writes_report
    return module
