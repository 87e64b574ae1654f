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

# A module imports only from lower layers; within a layer only where listed below.
LAYERS = {
    "permuting": 0,
    "allocator": 0,
    "metrics": 0,
    "files": 0,
    "inference_form": 0,
    "view_keys": 0,
    "network_inputs": 0,
    "environment": 0,
    "lineage.spec": 1,
    "lineage.schema": 1,
    "lineage.manifest": 1,
    "lineage.lock": 1,
    "lineage.table": 1,
    "blockwise": 1,
    "curve": 1,
    "pixels": 1,
    "card_markup": 2,
    "objectives": 2,
    "model_card": 4,
    "chunked": 3,
    "models": 3,
    "data": 3,
    "teacher": 3,
    "vocabulary": 3,
    "divergence": 3,
    "schedule": 3,
    "settings": 3,
    "base_trainer": 3,
    "fit": 3,
    "labels": 3,
    "network_loss": 4,
    "label_positions": 5,
    "output_layer": 4,
    "training_args": 4,
    "teacher_cache": 5,
    "step_loss": 6,
    "trainer": 7,
    "lm_trainer": 8,
    "lineage": 9,
    "hub": 10,
    "report": 10,
    "restoring": 11,
    "publishing": 12,
    "launch": 13,
    "cli": 13,
}
NEVER = {"training_args", "trainer", "lm_trainer"}, {"models", "data", "lineage", "hub"}


def parts(path: Path) -> list[str]:
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    return names[:-1] if names[-1] == "__init__" else names


def place(module: list[str]) -> str:
    return next(name for length in (2, 1) if (name := ".".join(module[:length])) in LAYERS)


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
    here = place(parts(path))
    for module in imports(path):
        if not module or module[0] == "models" and here == "models":
            continue
        there = place(list(module))
        same_package = there.split(".")[0] == here.split(".")[0] and LAYERS[there] <= LAYERS[here]
        assert same_package or LAYERS[there] < LAYERS[here], f"{here} imports {there}"
        assert not (here in NEVER[0] and there.split(".")[0] in NEVER[1]), f"{here} imports {there}"


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
        heavy = {"transformers.trainer", "accelerate", "datasets", "evaluate", "sklearn", "born_again.trainer"}
        heavy |= {"pandas", "matplotlib", "jinja2"}
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
