"""A published network loads where this package is not installed, and as before where it is."""

import ast
import copy
import inspect
import json
import os
import subprocess
import sys
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import auto_factory

from born_again import load_generation
from born_again.data.text import word_tokenizer
from born_again.models.image_classifier import create_image_classifier, save_image_classifier
from born_again.models.language_models import create_language_model
from born_again.models.remote_code import remote_code, with_relative_imports

LABELS = ["cat", "dog", "ox"]
WORDS = ["the", "cat", "<eos>", "sat", "on", "a", "mat", "<unk>", "N", "of"]
CHAR = {"hidden_size": 8, "filter_widths": [1, 2], "filter_counts": [3, 4], "character_embedding_size": 5}
IMAGE = ["test_densenet_cifar", "test_wide_resnet_cifar", "test_resnet_student_cifar"]
LANGUAGE = ["test-lstm", "char-cnn-lstm"]
SPELLED = {"test-lstm": "lstm_lm", "char-cnn-lstm": "char_cnn_lstm"}
FILES = {
    "test_densenet_cifar": {"cifar_network.py", "densenet_cifar.py", "modeling_densenet_cifar.py"},
    "test_wide_resnet_cifar": {"cifar_network.py", "wide_resnet_cifar.py", "modeling_wide_resnet_cifar.py"},
    "test_resnet_student_cifar": {"cifar_network.py", "resnet_students.py", "modeling_resnet_students.py"},
    "test-lstm": {"lstm_lm.py", "lstm_precision.py", "language_configs.py"},
    "char-cnn-lstm": {"char_cnn_lstm.py", "lstm_lm.py", "lstm_precision.py", "language_configs.py"},
}
COMMIT = "0123456789" * 4
# An older one takes a network with a configuration of its own, as TimmWrapperConfig is, for one of its own.
SAVES_CODE = "We don't want to override the autoclass" not in inspect.getsource(auto_factory)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def _inputs(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name in IMAGE:
        return torch.randn(2, 3, 32, 32, generator=generator)
    return torch.randint(len(WORDS), (2, 6), generator=generator)


def _generation(name: str, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    if name in IMAGE:
        model = create_image_classifier(name, LABELS, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
        with torch.no_grad():
            model(_inputs(name) * 2 + 1)  # running statistics other than the initial ones
        save_image_classifier(model, folder)
    else:
        create_language_model(name, WORDS, **(CHAR if name == "char-cnn-lstm" else {})).save_pretrained(folder)
        word_tokenizer(WORDS).save_pretrained(folder)
    return folder


def _publish(folder: Path, target: Path) -> Path:
    settings, code = remote_code(json.loads((folder / "config.json").read_text()))
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for name, text in {**code, "config.json": json.dumps(settings, indent=2)}.items():
        (target / name).write_text(text)
    return target


def _snapshot(hub: Path, repository: str) -> Path:
    """Where the Hub's cache has a repository that was downloaded."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Generations as they are locally and as they are in the Hub's cache, and what they give."""
    work = tmp_path_factory.mktemp("remote")
    expected = {}
    for name in IMAGE + LANGUAGE:
        folder = _generation(name, work / "local" / name)
        _publish(folder, _snapshot(work / "hub", f"some-one/{name}-gen1.0"))
        with torch.no_grad():
            expected[name] = {"inputs": _inputs(name), "logits": load_generation(folder)(_inputs(name)).logits}
    # Another repository of the same network, whose code has gone on since.
    newer = _publish(_generation("test-lstm", work / "newer_local", seed=1), work / "newer")
    code = (newer / "lstm_lm.py").read_text()
    assert code.count("self.decoder(hidden.contiguous())") == 1
    (newer / "lstm_lm.py").write_text(
        code.replace("self.decoder(hidden.contiguous())", "2 * self.decoder(hidden.contiguous())")
    )
    with torch.no_grad():
        logits = 2 * load_generation(work / "newer_local")(_inputs("test-lstm")).logits
    expected["newer"] = {"inputs": _inputs("test-lstm"), "logits": logits}
    second = _publish(_generation(IMAGE[0], work / "second_local", seed=1), work / "second")
    with torch.no_grad():
        logits = load_generation(second)(_inputs(IMAGE[0])).logits
    expected["second"] = {"inputs": _inputs(IMAGE[0]), "logits": logits}
    torch.save(expected, work / "expected.pt")
    np.save(work / "pixels.npy", np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    return work


# ---- what is published ----


@pytest.mark.parametrize("name", IMAGE + LANGUAGE)
def test_settings_are_a_copy_with_the_classes_in_it(name, work):
    settings = json.loads((work / "local" / name / "config.json").read_text())
    before = copy.deepcopy(settings)
    published, code = remote_code(settings)
    assert settings == before and set(code) == FILES[name]
    auto_map = published.pop("auto_map")
    assert published == before
    assert set(auto_map) == (
        {"AutoModelForImageClassification"} if name in IMAGE else {"AutoConfig", "AutoModelForCausalLM"}
    )
    for reference in auto_map.values():
        file, kind = reference.split(".")
        classes = [node.name for node in ast.parse(code[f"{file}.py"]).body if isinstance(node, ast.ClassDef)]
        assert kind in classes
    published["model_args" if name in IMAGE else "alphabet"] = "changed"
    assert settings == before
    # An old one, of a repository that the configuration was taken from, is not kept.
    assert remote_code({**settings, "auto_map": {"AutoConfig": "other.Config"}})[0]["auto_map"] == auto_map


@pytest.mark.parametrize("name", IMAGE + LANGUAGE)
def test_code_is_the_packages_own_and_needs_nothing_else(name, work):
    _, code = remote_code(json.loads((work / "local" / name / "config.json").read_text()))
    libraries = {"torch", "transformers"} | ({"timm"} if name in IMAGE else set())
    for file, text in code.items():
        compile(text, file, "exec")
        for node in ast.walk(ast.parse(text)):
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or f"{node.module}.py" in code
                roots = [] if node.level else [node.module]
            assert {root.split(".")[0] for root in roots} <= libraries | set(sys.stdlib_module_names)
        if not file.startswith("modeling_"):
            source = resources.files("born_again.models").joinpath(file).read_text()
            assert text.replace("\nfrom .", "\nfrom born_again.models.") == source


@pytest.mark.parametrize("name", IMAGE + LANGUAGE)
def test_transformers_finds_every_file(name, work):
    folder = work / "hub" / f"models--some-one--{name}-gen1.0" / "snapshots" / COMMIT
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    files = {f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    found = {Path(path).name for file in files for path in get_relative_import_files(folder / file)}
    assert files | found == FILES[name]


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 3},
        {"model_type": "gpt2", "n_layer": 2},
        {"architecture": "resnet18"},
        {},
    ],
)
def test_a_network_of_the_libraries_needs_no_code(settings):
    published, code = remote_code(settings)
    assert published == settings and published is not settings and code == {}


def test_every_registered_network_has_its_code():
    for architecture in timm.list_models(["*_cifar"]):
        assert remote_code({"model_type": "timm_wrapper", "architecture": architecture})[1]


def test_imports_alone_are_rewritten():
    source = '''"""Use:

    from born_again.models.x import y
"""
from born_again.models.one import A  # said twice: from born_again.models.one import A
from born_again.models.two import (
    B,
    C,
)
def late():
    from born_again.models.three import D
    return "born_again.models.three", D, torch
import torch
'''
    text, needed = with_relative_imports(source, "m.py")
    assert sorted(needed) == ["one", "three", "two"]
    assert text == (
        source.replace("\nfrom born_again.models.", "\nfrom .").replace(
            "def late():\n    from born_again.models.", "def late():\n    from ."
        )
    )


@pytest.mark.parametrize(
    "line",
    [
        "import born_again",
        "import torch, born_again.models.saved",
        "from born_again import models",
        "from born_again.models import saved",
        "from born_again.data.text import EOS",
        "from . import saved",
        "from ..data import text",
        "x = 1; from born_again.models.saved import loading",
        "from born_again.models.saved import loading; from born_again.models.lstm_lm import State",
        "if x: from born_again.models.saved import loading",
    ],
)
def test_an_import_that_would_not_be_found_is_refused(line):
    with pytest.raises(ValueError, match=r"m.py, line 2: imports '.*expected nothing of this package but.*move what"):
        with_relative_imports(f'"""Doc."""\n{line}\n', "m.py")


# ---- without the package ----

ALONE = """
import contextlib, importlib.abc, io, json, os, shutil, socket, sys, warnings


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "born_again":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def no_network(*_):
    raise AssertionError("the network was asked for")


blocker = NotInstalled()
sys.meta_path.insert(0, blocker)
socket.socket.connect = no_network

import numpy as np, timm, torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, pipeline,
)
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
work = sys.argv[1]
expected = torch.load(work + "/expected.pt")
image = Image.fromarray(np.load(work + "/pixels.npy"))
repositories = {name: f"some-one/{name}-gen1.0" for name in expected if name not in ("newer", "second")}
images = [name for name in repositories if name.endswith("_cifar")]
words = [name for name in repositories if name not in images]
found = {"errors": {}, "equal": {}, "facts": {}}


def error(f, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            f(*args, **kwargs)
        except Exception as error:
            return f"{type(error).__name__}: {error}", out.getvalue()
    return None, out.getvalue()


def auto(name):
    return AutoModelForImageClassification if name in images or name == "second" else AutoModelForCausalLM


def load(name, source, **kwargs):
    return auto(name).from_pretrained(source, trust_remote_code=True, **kwargs).eval()


def same(name, model):
    with torch.no_grad():
        logits = model(expected[name]["inputs"])
    return torch.equal(getattr(logits, "logits", logits), expected[name]["logits"])


# What is met by someone who asks for nothing.
densenet, lstm = repositories[images[0]], repositories[words[0]]
found["errors"] = {
    "image": error(AutoModelForImageClassification.from_pretrained, densenet),
    "pipeline": error(pipeline, "image-classification", model=densenet),
    "timm": error(timm.create_model, "hf-hub:" + densenet, pretrained=True),
    "words": error(AutoModelForCausalLM.from_pretrained, lstm),
    "words refused": error(AutoModelForCausalLM.from_pretrained, lstm, trust_remote_code=False),
}
# These need no code.
found["facts"]["processor"] = type(AutoImageProcessor.from_pretrained(densenet)).__name__
found["facts"]["ids"] = AutoTokenizer.from_pretrained(lstm, trust_remote_code=False)("the cat sat")["input_ids"]

models = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name, source in repositories.items():
        models[name] = model = load(name, source)
        found["equal"][name] = same(name, model)
        found["facts"][name] = [type(model).__name__, type(model).__module__.split(".")[0]]
    for name in ("newer", "second"):
        models[name] = load(name, os.path.join(work, name))
        found["equal"][name] = same(name, models[name])
found["facts"]["overwritten"] = [str(w.message) for w in caught if "Overwriting" in str(w.message)]

for name in images:
    classify = pipeline("image-classification", model=repositories[name], trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(repositories[name], trust_remote_code=True)
    with torch.no_grad():
        scores = models[name](processor(image)["pixel_values"]).logits[0].tolist()
    # The pipeline's own softmax is numpy's, and not to be compared by the bit.
    given = {entry["label"]: entry["score"] for entry in classify(image, function_to_apply="none")}
    found["equal"][name + " pipeline"] = list(map(given.get, ("cat", "dog", "ox"))) == scores
    labels = torch.tensor([0, 2])
    loss = models[name](expected[name]["inputs"], labels=labels).loss
    found["equal"][name + " loss"] = torch.allclose(
        loss, torch.nn.functional.cross_entropy(expected[name]["logits"], labels)
    )
    network = timm.create_model("hf-hub:" + repositories[name], pretrained=True)
    found["equal"][name + " timm"] = same(name, network.eval())

for name in words:
    tokenizer = AutoTokenizer.from_pretrained(repositories[name], trust_remote_code=True)
    prompt = tokenizer("the cat sat", return_tensors="pt")
    asked = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    carried = models[name].generate(**prompt, **asked)
    read_again = models[name].generate(**prompt, **asked, use_cache=False)
    found["equal"][name + " generate"] = torch.equal(carried, read_again)
    write = pipeline("text-generation", model=repositories[name], trust_remote_code=True)
    written = write("the cat sat", return_tensors=True, **asked)[0]["generated_token_ids"]
    found["equal"][name + " pipeline"] = written == carried[0].tolist()
found["facts"]["tied"] = models["test-lstm"].decoder.weight is models["test-lstm"].embeddings.weight

for name in repositories:
    target = os.path.join(work, "saved", name)
    models[name].save_pretrained(target)
    found["facts"][name + " saved"] = sorted(os.listdir(target))
    if name in words or len(found["facts"][name + " saved"]) > 2:  # else its code is not with it
        found["equal"][name + " saved"] = same(name, load(name, target))

found["facts"]["loaded"] = [name for name in sys.modules if name.split(".")[0] == "born_again"]

# The package comes into the same process.
sys.meta_path.remove(blocker)
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    import born_again
for name, source in repositories.items():
    model = load(name, source)
    found["equal"][name + " with the package"] = same(name, model) and same(name, models[name])
    found["equal"][name + " by the package"] = same(name, born_again.load_generation(source))
    saved = os.path.join(work, "saved", name)
    found["equal"][name + " saved, by the package"] = same(name, born_again.load_generation(saved))
    network = model.timm_model if name in images else model
    found["facts"][name + " with the package"] = type(network).__module__.split(".")[0]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(work):
    run = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(work)],
        cwd=work,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(work / "hub"),
            "HF_MODULES_CACHE": str(work / "modules"),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_all_is_equal_to_the_bit(alone):
    assert [name for name, same in alone["equal"].items() if not same] == []
    assert len(alone["equal"]) == 5 + 2 + 3 * 3 + 2 * 2 + (5 if SAVES_CODE else 2) + 3 * 5


def test_the_classes_are_the_repositorys_own(alone):
    facts = alone["facts"]
    assert [facts[name] for name in IMAGE + LANGUAGE] == [
        ["DenseNetCifarForImageClassification", "transformers_modules"],
        ["WideResNetCifarForImageClassification", "transformers_modules"],
        ["ResNetStudentCifarForImageClassification", "transformers_modules"],
        ["LstmLMForCausalLM", "transformers_modules"],
        ["CharCnnLstmForCausalLM", "transformers_modules"],
    ]
    assert facts["loaded"] == [] and facts["overwritten"] == [] and facts["tied"]
    assert facts["processor"] == "TimmWrapperImageProcessor" and facts["ids"] == [0, 1, 3]


@pytest.mark.parametrize("name", IMAGE + LANGUAGE)
def test_a_model_that_is_saved_again_has_its_code_with_it(name, alone, work):
    if name in IMAGE and not SAVES_CODE:
        pytest.skip("this transformers saves no code of a network whose configuration is one of its own")
    files = {"config.json", "model.safetensors"} | FILES[name]
    files |= {"generation_config.json"} if name in LANGUAGE else set()
    assert set(alone["facts"][f"{name} saved"]) == files
    published = work / "hub" / f"models--some-one--{name}-gen1.0" / "snapshots" / COMMIT
    saved = work / "saved" / name
    for file in FILES[name] | {"model.safetensors"}:
        assert (saved / file).read_bytes() == (published / file).read_bytes()
    settings = [json.loads((folder / "config.json").read_text()) for folder in (saved, published)]
    assert settings[0]["auto_map"] == settings[1]["auto_map"]


def test_the_package_takes_over_where_it_is_imported_later(alone):
    assert {alone["facts"][f"{name} with the package"] for name in IMAGE + LANGUAGE} == {"born_again"}


def test_what_someone_meets_who_asks_for_nothing(alone):
    """The card tells of these."""
    errors = alone["errors"]
    unknown = (
        "ImportError: The model architecture 'test_densenet_cifar' is not supported in your version of timm "
        f"({timm.__version__}). Please upgrade timm to a more recent version with `pip install -U timm`."
    )
    assert errors["image"] == errors["pipeline"] == [unknown, ""]
    assert errors["timm"] == ["RuntimeError: Unknown model (test_densenet_cifar)", ""]
    custom = "ValueError: The repository some-one/test-lstm-gen1.0 contains custom code which must be executed to corr"
    for case in ("words", "words refused"):
        assert errors[case][0].startswith(custom)
        assert "Please pass the argument `trust_remote_code=True` to allow custom code to be run." in errors[case][0]
    assert "Do you wish to run the custom code? [y/N]" in errors["words"][1] and not errors["words refused"][1]


# ---- with the package ----


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("trust", [True, False, None])
@pytest.mark.parametrize("name", IMAGE + LANGUAGE)
@torch.no_grad()  # an LSTM takes another kernel with gradients, whose last bits differ
def test_the_package_comes_first_where_it_is_imported(name, trust, work, modules):
    folder = work / "hub" / f"models--some-one--{name}-gen1.0" / "snapshots" / COMMIT
    expected = torch.load(work / "expected.pt")[name]
    auto = AutoModelForImageClassification if name in IMAGE else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Overwriting")
        model = auto.from_pretrained(folder, trust_remote_code=trust).eval()
    assert torch.equal(model(expected["inputs"]).logits, expected["logits"])
    assert torch.equal(load_generation(folder)(expected["inputs"]).logits, expected["logits"])
    network = model.timm_model if name in IMAGE else model
    assert type(network).__module__.startswith("born_again.models.")
    assert type(load_generation(folder)).__module__.split(".")[0] != "transformers_modules"
    if name in IMAGE:
        local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(local(expected["inputs"]), expected["logits"])
    else:
        assert type(AutoConfig.for_model(SPELLED[name])) is type(model.config)
