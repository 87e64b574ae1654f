"""The house rules that a reader would not see broken: layers, sizes, and what an import costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import born_again

ROOT = Path(born_again.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A module imports from its own room and from rooms of lower layers only.
LAYERS = {
    "_files": 0,
    "objectives": 0,
    "metrics": 0,
    "models": 1,
    "data": 1,
    "teacher": 1,
    "training": 2,
    "lineage": 3,
    "hub": 4,
    "report": 4,
    "any_model": 5,
    "cli": 5,
}
NEVER = {("training", "models"), ("training", "data")}


def parts(path: Path) -> list[str]:
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    return names[:-1] if names[-1] == "__init__" else names


def imports(path: Path) -> set[tuple[str, ...]]:
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            if node.level:
                package = ["born_again", *path.relative_to(ROOT).parent.parts][
                    : len(path.relative_to(ROOT).parts) + 1 - node.level
                ]
                names = [".".join([*package, node.module or ""])]
            else:
                names = [node.module]
        found |= {tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "born_again"}
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path != ROOT / "__init__.py"], ids=str)
def test_imports_go_downward_only(path):
    here = parts(path)[0]
    for module in imports(path):
        there = module[0] if module else "models"  # importing the package imports its models
        assert here == there or LAYERS[there] < LAYERS[here], f"{here} imports {there}"
        assert (here, there) not in NEVER, f"{here} imports {there}"


def test_the_package_has_no_other_rooms():
    assert {parts(path)[0] for path in FILES if parts(path)} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_have_one_job(path):
    assert len(path.read_text().splitlines()) <= 700


REGISTRATION = """
import importlib, os, sys, traceback
import torch

def check(*modules):
    for name in modules:
        before = set(sys.modules)
        importlib.import_module(name)
    assert "born_again.models" in sys.modules
    if modules[-1] == "born_again":
        heavy = {"transformers.trainer", "accelerate", "datasets", "evaluate", "sklearn", "pandas", "matplotlib"}
        heavy |= {"jinja2", "born_again.training.trainer"}
        assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
    import timm, transformers
    assert timm.is_model("densenet90_60_cifar") and timm.is_model("wide_resnet28_10_cifar")
    assert timm.create_model("wide_resnet28_1_cifar").num_classes == 10
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    assert type(model).__name__ == "LstmLMForCausalLM"
    for module in (timm, transformers):  # as if nobody had looked
        assert type(module.__spec__.loader).__module__ != "born_again"
    assert not any(type(finder).__module__ == "born_again" for finder in sys.meta_path)

for order in (
    ("timm", "transformers", "born_again"),
    ("born_again", "transformers.models.timm_wrapper.modeling_timm_wrapper"),
    ("born_again.objectives", "timm.models.resnet"),
):
    child = os.fork()
    if not child:
        try:
            check(*order)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each order in a fork of one interpreter")
def test_the_networks_are_registered_whatever_is_imported_first_and_no_trainer_is_loaded(tmp_path):
    born_again.LstmLMForCausalLM(born_again.LstmLMConfig(vocab_size=7, hidden_size=4)).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", REGISTRATION, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_alone_loads_no_library():
    code = "import sys, born_again; assert born_again.__all__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "timm", "transformers", "numpy"} & set(done.stdout.split())


def test_type_checkers_see_the_names_that_are_imported_when_they_are_used():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {**born_again._HOME, "models": "born_again"}
    assert (ROOT / "py.typed").is_file()


def test_every_public_name_is_there():
    for name in born_again.__all__:
        assert getattr(born_again, name) is not None
    assert set(born_again.__all__) <= set(dir(born_again))
    with pytest.raises(
        AttributeError, match="has no attribute 'Trainer'; it has BornAgainLMTrainer, BornAgainTrainer"
    ):
        born_again.Trainer  # noqa: B018
