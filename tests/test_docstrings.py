"""The documentation says what the code does: public docstrings, their examples, and the pages in examples/."""

import argparse
import dataclasses
import doctest
import functools
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from helpers import arguments
from lineage_folders import lineage, network

import born_again
from born_again import BornAgainTrainer, cli, objectives

ROOT = Path(born_again.__file__).parents[1]
PAGES = [ROOT / "examples/FAQ.md", *sorted((ROOT / "examples").rglob("README.md"))]

# What users call beside born_again.__all__; None stands for every function and class that a module defines.
PUBLIC = {
    "born_again.objectives": None,
    "born_again.metrics": None,
    "born_again.metrics.accuracy": ["Accuracy"],
    "born_again.metrics.calibration": ["Calibration"],
    "born_again.metrics.perplexity": ["Perplexity", "token_nlls"],
    "born_again.models.image_classifier": [
        "create_image_classifier",
        "load_image_classifier",
        "save_image_classifier",
    ],
    "born_again.models.language_models": ["create_language_model", "load_language_model"],
    "born_again.data.images": ["ImageSplit", "ImageData", "load_images"],
    "born_again.data.image_dataset": None,
    "born_again.data.streams": None,
    "born_again.data.text": ["TextData", "load_text"],
    "born_again.data.decode": ["to_rgb"],
    "born_again.data.grammar": ["grammar_entropy", "grammar_nll", "sample_grammar", "grammar_corpus"],
    "born_again.lineage.runner": ["Generation", "LineageRunner"],
}
# Summaries that begin so name what is returned.
_NAMES_RESULT = re.compile(
    r"(The|A|An|Whether|Why|How many|False for|Make|Makes|Builds|Loads|exp of|Mean|SHA-256|Size|Side)\b"
)


def public():
    """(path, object, class or None) of everything public that is documented here."""
    objects = {f"born_again.{name}": getattr(born_again, name) for name in born_again.__all__ if name != "models"}
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        for name, value in list(vars(module).items()):
            is_own = inspect.isfunction(value) or inspect.isclass(value)
            if is_own and value.__module__ == module_name and not name.startswith("_"):
                if names is None or name in names:
                    objects.setdefault(f"{module_name}.{name}", value)
    for path, value in objects.items():
        yield path, value, None
        if inspect.isclass(value):
            for name, method in vars(value).items():
                for inner in ("__func__", "fget", "func"):  # of class methods, properties and cached ones
                    method = getattr(method, inner, method)
                if inspect.isfunction(method) and not name.startswith("_"):
                    yield f"{path}.{name}", method, value


CASES = [pytest.param(*case[1:], id=case[0]) for case in public()]


def documented(value) -> str:
    """The docstring of an object, for a class with that of __init__."""
    own = value.__init__.__doc__ or "" if inspect.isclass(value) and "__init__" in vars(value) else ""
    return "\n\n".join(filter(None, [inspect.cleandoc(value.__doc__ or ""), inspect.cleandoc(own)]))


def section(doc: str, name: str) -> dict[str, str]:
    """The entries of a section by name, those named together each with their text."""
    found = re.search(rf"^{name}:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    entries: dict[str, str] = {}
    if found is None:
        return entries
    for entry in re.split(r"^    (?=\S)", found[1], flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(":")
        entries |= dict.fromkeys(re.findall(r"\w+", names), text)
    return entries


def parameters(value) -> tuple[set[str], set[str]]:
    """The arguments that must be documented, and those that may be."""
    allowed = {*inspect.signature(value).parameters} - {"self", "cls"}
    if not dataclasses.is_dataclass(value):
        return allowed, allowed
    own = [entry for entry in dataclasses.fields(value) if entry.name in inspect.get_annotations(value)]
    # Not what is hidden from --help, and what a base class documents and has with another default.
    required = {entry.name for entry in own if entry.init and entry.metadata.get("help") != argparse.SUPPRESS}
    return required - {name for base in value.__mro__[1:] for name in inspect.get_annotations(base)}, allowed


def declared_above(method, owner) -> bool:
    """Whether a base class, mostly a library's, declares a method and documents it."""
    return owner is not None and any(hasattr(base, method.__name__) for base in owner.__mro__[1:])


@pytest.mark.parametrize(("value", "owner"), CASES)
def test_docstrings_fit_the_code(value, owner):
    doc, is_declared_above = documented(value), declared_above(value, owner)
    if is_declared_above and not doc:
        return
    summary = doc.partition("\n")[0]
    assert summary.endswith((".", ":"))
    if inspect.isclass(value) and "__init__" not in vars(value):
        return  # made as its base class is
    told = section(doc, "Args") | (section(doc, "Attributes") if dataclasses.is_dataclass(value) else {})
    required, allowed = parameters(value)
    # One argument of a method, and the configuration of a network, may be told of in the summary.
    is_simple = is_declared_above or len(required) < 2 and (owner is not None or required == {"config"})
    if told or not is_simple:
        assert required <= {*told} <= allowed
    if inspect.isclass(value) or is_declared_above:
        return
    source = inspect.getsource(value)
    if re.search(r"^\s+raise [A-Z]", source, re.MULTILINE):
        assert section(doc, "Raises"), "raises, and does not say so"
    returns = inspect.signature(value).return_annotation
    if returns not in (None, "None", inspect.Signature.empty) and not _NAMES_RESULT.match(summary):
        assert "\nReturns:\n" in doc or "\nYields:\n" in doc, f"returns {returns}, and does not say so"


@pytest.mark.parametrize(
    "value",
    [pytest.param(case.values[0], id=case.id) for case in CASES if case.id.startswith("born_again.objectives.")],
)
def test_tensors_are_documented_with_shape_and_dtype(value):
    told = section(documented(value), "Args")
    for name, parameter in inspect.signature(value).parameters.items():
        if "Tensor" in str(parameter.annotation):
            assert re.search(r"\((items|\.\.\.)?.*\)|[Ss]calar", told[name]), f"{name} has no shape: {told[name]}"
            assert re.search(r"float|int|bool|dtype", told[name]), f"{name} has no dtype: {told[name]}"


# ---- Examples ----

EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "born_again").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to run examples in, with the lineage that some of them load."""
    folder = tmp_path_factory.mktemp("examples")
    lineage(
        folder / "outputs/wide-resnet-digits",
        [network("image", seed, labels=list("0123456789")) for seed in range(3)],
    )
    return folder


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_run(module, folder, monkeypatch):
    monkeypatch.chdir(folder)
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert tried and not failed


def test_what_users_begin_with_has_an_example():
    names = "BornAgainTrainer BornAgainTrainingArguments Lineage LineageEnsemble LineageSpec create_image_classifier"
    values = [getattr(born_again, name) for name in [*names.split(), "load_generation"]]
    losses = "hard_label_loss dark_knowledge_loss confidence_weighted_loss permuted_dark_knowledge_loss".split()
    for value in [*values, *(getattr(objectives, name) for name in losses)]:
        assert ">>> " in documented(value), value.__name__


# ---- Pages ----


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"] == born_again.__version__
    assert project["license"] == citation["license"]


def test_the_code_of_the_questions_and_answers_trains(tmp_path):
    mixup, loss = (
        block for block in re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)
    )
    names: dict = {}
    exec(mixup + loss, names)

    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": row % 2} for row in range(8)]
    mixed = names["Mixup"](images)
    items = [mixed[row] for row in range(8)]
    pixels, before = (torch.stack([item["pixel_values"] for item in each]) for each in (items, images))
    assert pixels.shape == before.shape and not torch.equal(pixels, before)
    assert [item["labels"] for item in items] == [row % 2 for row in range(8)]
    for objective in (None, names["objective"]):
        args = arguments(tmp_path, max_steps=1, teacher_accuracy_samples=0)
        trainer = BornAgainTrainer(
            network("image", 1), args, train_dataset=mixed, teacher=network("image", 2), objective=objective
        )
        assert trainer.train().training_loss > 0
    # The loss is Hinton's, of which a student that is its teacher has the entropy of the target left.
    assert isinstance(names["objective"], functools.partial) and names["objective"].keywords == {"temperature": 2.0}
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    losses, weights = names["hinton"](logits, logits, labels, alpha=0.0)
    target = (logits / 4).softmax(-1)
    torch.testing.assert_close(losses, -(target * target.log()).sum(-1) * 16)
    assert torch.equal(weights, torch.ones(5, dtype=torch.float64))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_flags_on_the_pages_exist(page):
    # Those of other programs: accelerate launch, sbatch.
    known = set("help config_file num_processes machine_rank main_process_ip array nodes".split())
    known |= {entry.name for entry in dataclasses.fields(born_again.BornAgainTrainingArguments)}
    for path in [*(ROOT / "examples").rglob("*.py"), *(ROOT / "born_again").rglob("*.py")]:
        declared = re.findall(r'^    (\w+): .*= field\(|"--(\w+)"', path.read_text(), re.MULTILINE)
        known |= {name for pair in declared for name in pair}
    commands = next(action for action in cli._parser()._actions if action.choices)
    for parser in commands.choices.values():
        known |= {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    for flag in re.findall(r"(?<![\w-])--(\w+)", page.read_text()):
        assert flag in known or flag.removeprefix("no_") in known, f"--{flag}"


def test_every_script_and_folder_is_on_the_page_of_examples():
    page = (ROOT / "examples/README.md").read_text()
    scripts = [path.name for path in (ROOT / "examples").glob("*.py")]
    folders = [path.name for path in (ROOT / "examples").iterdir() if path.is_dir() and path.name != "__pycache__"]
    for name in [*scripts, *folders]:
        assert f"]({name})" in page, name
