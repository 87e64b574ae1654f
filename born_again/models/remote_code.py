"""What is published beside the weights so that a network loads without this package, by `trust_remote_code=True`.

An image classifier then needs transformers and timm, a recurrent language model transformers alone. The files are
those of this package, their imports of each other made relative, since transformers fetches what a file imports so.

Where the package is imported before, language models are the package's own and the code beside them is not run; an
image classifier has the repository's class around the package's network. Where it is imported later, that holds for
what is loaded from then on.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from born_again.models import densenet_cifar, resnet_students, wide_resnet_cifar

_PACKAGE = "born_again.models"
_IMPORT = re.compile(rf"^(\s*from ){re.escape(_PACKAGE)}(\.\w+ import\b)")

# Of a timm architecture: the file it is in, and the class that the file defines.
_NETWORKS = {
    architecture: (file, network)
    for file, network, architectures in (
        ("densenet_cifar", "DenseNetCifar", densenet_cifar.default_cfgs),
        ("wide_resnet_cifar", "WideResNetCifar", wide_resnet_cifar.default_cfgs),
        ("resnet_students", "ResNetStudentCifar", resnet_students.default_cfgs),
    )
    for architecture in architectures
}
# Of a model type: the file that the network is in, network and configuration.
_LANGUAGE_MODELS = {
    "lstm_lm": ("lstm_lm", "LstmLMForCausalLM", "LstmLMConfig"),
    "char_cnn_lstm": ("char_cnn_lstm", "CharCnnLstmForCausalLM", "CharCnnLstmConfig"),
}

_IMAGE_CLASSIFIER = '''"""transformers' image classifier around the networks of {file}.py, which timm does not have."""

import timm
from transformers import TimmWrapperForImageClassification
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# A name has one network. Where the package born_again, or the same file of another repository, has registered it, a
# second registration would put aside what other models are made of.
if not timm.is_model("{architecture}"):
    from .{file} import {network}  # noqa: F401  (registers its networks with timm)


class {network}ForImageClassification(TimmWrapperForImageClassification):
    """A `TimmWrapperForImageClassification`, for `trust_remote_code=True`."""


# transformers does so for its own classes alone; without it weights are saved under names that timm cannot read.
register_checkpoint_conversion_mapping(
    "{network}ForImageClassification", get_checkpoint_conversion_mapping("timm_wrapper"), overwrite=True
)
'''


def remote_code(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The code to publish with a generation, so that transformers can load it without this package.

    Args:
        settings: the content of its config.json.

    Returns:
        The content of the config.json to publish, a copy with `auto_map` in it; and the code beside it, by file name.
        A network that is not of this package needs none: the settings are unchanged, and there are no files.

    Raises:
        ValueError: a file of this package imports another part of it than the files beside it.
    """
    published = copy.deepcopy(dict(settings))
    kind = settings.get("model_type")
    if kind == "timm_wrapper" and settings.get("architecture") in _NETWORKS:
        architecture = settings["architecture"]
        file, network = _NETWORKS[architecture]
        modeling = f"modeling_{file}"
        code = _IMAGE_CLASSIFIER.format(architecture=architecture, file=file, network=network)
        published["auto_map"] = {"AutoModelForImageClassification": f"{modeling}.{network}ForImageClassification"}
        return published, {f"{modeling}.py": code, **_files(file)}
    if kind in _LANGUAGE_MODELS:
        file, network, config = _LANGUAGE_MODELS[kind]
        published["auto_map"] = {
            "AutoConfig": f"language_configs.{config}",
            "AutoModelForCausalLM": f"{file}.{network}",
        }
        return published, _files(file)
    return published, {}


def _files(name: str) -> dict[str, str]:
    """The source of a module and of the modules that it imports, by file name."""
    files: dict[str, str] = {}
    pending = [name]
    while pending:
        name = pending.pop()
        source = resources.files(_PACKAGE).joinpath(f"{name}.py").read_text(encoding="utf-8")
        files[f"{name}.py"], needed = with_relative_imports(source, f"{name}.py")
        pending += [other for other in needed if f"{other}.py" not in files]
    return files


def with_relative_imports(source: str, name: str) -> tuple[str, list[str]]:
    """Makes a module's imports of its neighbours relative: `from born_again.models.x import y` to `from .x import y`.

    Args:
        source: of the module.
        name: of its file, for messages.

    Returns:
        The new source, in which nothing else is changed, and the names of the neighbours.

    Raises:
        ValueError: it imports from this package in another way, which would fail where the package is not installed,
            or which transformers would not follow.
    """
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            lines[node.lineno - 1] = _IMPORT.sub(r"\1\2", lines[node.lineno - 1])
    relative = "\n".join(lines)
    needed: list[str] = []
    for node in ast.walk(ast.parse(relative)):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            # transformers looks for lines that start so; it does not see `from . import x`.
            if node.level == 1 and re.match(r"\s*from \.\w+ import\b", lines[node.lineno - 1]):
                needed.append(str(node.module))
                continue
            imported = ["." * node.level + (node.module or "")]
        for module in imported:
            if module.startswith(".") or module.split(".")[0] == _PACKAGE.split(".")[0]:
                raise ValueError(
                    f"{name}, line {node.lineno}: imports {module!r}, expected nothing of this package but "
                    f"'from {_PACKAGE}.x import y' on a line of its own, since the file is published beside weights; "
                    "move what it needs into a file beside it."
                )
    return relative, needed
