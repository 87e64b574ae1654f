"""A lineage needs no more memory in its last generation than in its second student."""

import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import arguments
from tiny_lineage import runner

from born_again.hub.launch import train
from born_again.lineage import machine

EXAMPLES = Path(__file__).parents[2] / "examples"

GENERATIONS = 6  # students
WEIGHTS = 20 << 20  # bytes of one network; as many again for its gradients, twice as many for Adam
GROWTH = 1.05

LINEAGE = """
import gc, json, os, sys
import torch
from helpers import CLASSES, arguments, sentences
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, TrainerCallback
from born_again import BornAgainTrainer, LineageRunner, LineageSpec

torch.set_num_threads(1)
data = sentences("sequence", rows=16)
kept = []

def measure(when, generation):
    gc.collect()
    # By type(), since isinstance() asks the object, and lazily imported modules then import themselves.
    kinds = torch.Tensor, BertForSequenceClassification
    found = [value for value in gc.get_objects() if issubclass(type(value), kinds)]
    tensors = [value for value in found if issubclass(type(value), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    networks = len(found) - len(tensors)
    print(json.dumps({"when": when, "generation": generation, "resident": resident,
                      "tensors": sum(storages.values()), "networks": networks}))

class Measure(TrainerCallback):
    def __init__(self, generation):
        self.generation = generation

    def on_train_end(self, *args, **kwargs):
        measure("training", self.generation)

def build_student(generation):
    if generation.index:
        measure("after", generation.index - 1)
    student = BertForSequenceClassification(BertConfig(
        vocab_size=20_000, hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12, num_labels=CLASSES,
    ))
    if sys.argv[3] == "leak":
        kept.append(student)
    return student

def build_trainer(student, teacher, generation):
    args = arguments(generation.checkpoint_dir, objective="ban", optim="adamw_torch", learning_rate=1e-4,
                     max_steps=2, seed=generation.seed)
    return BornAgainTrainer(student, args, teacher=teacher, train_dataset=data, eval_dataset={"test": data},
                            callbacks=[Measure(generation.index)])

generations = int(sys.argv[2])
LineageRunner(
    LineageSpec("memory", "bert", "words", generations=generations, objective="ban", seed=0),
    sys.argv[1],
    build_student=build_student,
    build_trainer=build_trainer,
    load_teacher=AutoModelForSequenceClassification.from_pretrained,
).run()
measure("after", generations)
"""


def measured(folder, *, leak=False):
    """What is in memory in each generation, {"training": [...], "after": [...]}, from a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
        # Left alone, glibc learns to keep blocks as large as our weights for itself, in some runs and not in others.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", LINEAGE, str(folder), str(GENERATIONS), "leak" if leak else "no leak"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"when"')]
    return {when: [line for line in lines if line["when"] == when] for when in ("training", "after")}


def grows(lines, name):
    """By which factor, from generation 2 on."""
    values = [line[name] for line in lines]
    return max(values[3:]) / values[2]


@pytest.mark.slow_but_for("False-False", "True-True")
@pytest.mark.parametrize(("tuned", "frozen_before"), [(False, False), (True, False), (True, True)])
def test_settings_of_the_process_are_changed_only_where_a_script_says_so(tmp_path, monkeypatch, tuned, frozen_before):
    class Frozen(list):
        def append(self, generation):
            super().append(gc.get_freeze_count())

    def c_library(name):
        asked.append(name)
        return SimpleNamespace(mallopt=lambda *_: 1)

    asked = []
    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=c_library))
    monkeypatch.setattr(machine, "_MALLOC_VARIABLES", ())
    if not frozen_before:
        gc.unfreeze()
    try:
        before, during = gc.get_freeze_count(), Frozen()
        args = arguments(tmp_path / "out", loss_normalization="step")
        assert train(runner(tmp_path / "out", built=during), args, "words", tune_process=tuned) == 0
        assert len(during) == 3 and (min(during) > 10_000 if tuned else max(during) == 0)
        assert bool(before) == bool(gc.get_freeze_count()) == frozen_before
        assert asked == [None] * tuned
    finally:
        gc.freeze()


@pytest.mark.parametrize("name", ["run_cifar", "run_ptb"])
def test_the_scripts_say_so_unless_the_user_does_not(tmp_path, monkeypatch, name):
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)
    said = []
    monkeypatch.setitem(script["main"].__globals__, "train", lambda *_, tune_process: said.append(tune_process) or 0)
    for words in ([], ["--no_tune_process"]):
        script["start"](["--smoke", "--threads", "1", "--output_dir", str(tmp_path / "out"), *words])
    assert said == [True, False]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_is_flat_over_a_lineage(tmp_path):
    lines = measured(tmp_path / "out")
    assert [[line["generation"] for line in lines[when]] for when in lines] == [list(range(GENERATIONS + 1))] * 2
    training, after = lines["training"], lines["after"]
    assert [line["networks"] for line in training] == [1] + [2] * GENERATIONS  # the student, and its teacher
    assert all(line["tensors"] > 3 * WEIGHTS for line in training)
    assert grows(training, "tensors") < GROWTH and grows(training, "resident") < GROWTH
    assert [line["networks"] for line in after] == [0] * (GENERATIONS + 1)
    assert all(line["tensors"] < 0.05 * WEIGHTS for line in after)
    assert grows(after, "resident") < GROWTH


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_network_that_is_kept_would_be_seen(tmp_path):
    lines = measured(tmp_path / "out", leak=True)
    assert [line["networks"] for line in lines["after"]] == list(range(1, GENERATIONS + 2))
    for when, name in (("training", "tensors"), ("training", "resident"), ("after", "tensors"), ("after", "resident")):
        assert grows(lines[when], name) > GROWTH, (when, name)
