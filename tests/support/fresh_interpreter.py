"""What others do with published networks, in an interpreter of their own: run by test_hub_round_trip.py.

    python fresh_interpreter.py images WORK       # or text, or alone: without this package

WORK/expected.pt has {repository: {"inputs", "logits", "snippets"}}. An exit status of 0 says that all was equal to the
bit; the last line that is printed counts what was compared.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import timm
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    pipeline,
)
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
compared: Counter[str] = Counter()


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "born_again":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def in_a_fork(check: Callable[[], Any]) -> None:
    """Runs what must not stay, such as the import of this package."""
    child = os.fork()
    if not child:
        try:
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def compare(model: torch.nn.Module, known: dict, what: str) -> None:
    assert not model.training, what
    with torch.no_grad():
        answer = model(known["inputs"])
    assert torch.equal(getattr(answer, "logits", answer), known["logits"]), what
    compared[what] += 1


def run_snippet(source: str, known: dict) -> None:
    assert "born_again" not in sys.modules
    names = {"pixel_values": known["inputs"], "input_ids": known["inputs"]}  # of the reader, for an ensemble
    exec(compile(source, "README.md", "exec"), names)
    compare(names["model"], known, "snippet")


def check_classifier(name: str, known: dict) -> None:
    from born_again import load_generation

    compare(timm.create_model(f"hf-hub:{name}", pretrained=True).eval(), known, "timm")
    model = AutoModelForImageClassification.from_pretrained(name)
    compare(model, known, "transformers")
    compare(load_generation(name), known, "load_generation")
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    with torch.no_grad():
        pixels = AutoImageProcessor.from_pretrained(name)(image, return_tensors="pt")
        scores = model(**pixels).logits.softmax(-1)[0]
    given = {entry["label"]: entry["score"] for entry in pipeline("image-classification", model=name)(image)}
    given = torch.tensor([given[label] for label in model.config.id2label.values()])
    torch.testing.assert_close(given, scores, rtol=1e-5, atol=1e-7)  # its softmax is numpy's
    compared["pipeline"] += 1


def check_language_model(name: str, known: dict) -> None:
    from born_again import load_generation

    model = AutoModelForCausalLM.from_pretrained(name)
    compare(model, known, "transformers")
    compare(load_generation(name), known, "load_generation")
    check_tokenizer(name)


def check_tokenizer(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)  # without it some ask
    assert tokenizer("the cat sat <eos>")["input_ids"] == [0, 1, 3, 2]
    assert tokenizer.decode([0, 1, 3]) == "the cat sat"
    compared["tokenizer"] += 1


def check_ensemble(name: str, known: dict) -> None:
    from born_again import LineageEnsemble

    compare(LineageEnsemble.from_pretrained(name), known, "ensemble")


def check_alone(name: str, known: dict) -> None:
    """By the code in the repository, which is asked for."""
    images = "wide-resnet" in name
    auto = AutoModelForImageClassification if images else AutoModelForCausalLM
    compare(auto.from_pretrained(name, trust_remote_code=True), known, "transformers")
    if images:
        compare(timm.create_model(f"hf-hub:{name}", pretrained=True).eval(), known, "timm")  # registered by that code
    else:
        check_tokenizer(name)


def main(what: str, work: str) -> None:
    expected = torch.load(os.path.join(work, "expected.pt"))
    if what == "alone":
        sys.meta_path.insert(0, NotInstalled())
    for known in expected.values():
        for source in known["snippets"]:
            in_a_fork(lambda source=source, known=known: run_snippet(source, known))
            compared["snippet"] += 1
    for name, known in expected.items():
        if what == "alone":
            check_alone(name, known)
            continue
        import born_again  # noqa: F401

        if name.endswith("-ensemble"):
            check_ensemble(name, known)
        else:
            {"images": check_classifier, "text": check_language_model}[what](name, known)
    print(json.dumps(compared))


if __name__ == "__main__":
    main(*sys.argv[1:])
