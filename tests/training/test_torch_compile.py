"""torch_compile reaches student and teacher, and changes neither a weight nor the name of one.

The backends "eager" and "aot_eager" do all that torch.compile does but make code, and are exact.
"""

import json

import pytest
import torch
from helpers import arguments, sentences, sequence_classifier
from safetensors.torch import load_file
from tiny_lineage import hashes, runner, spec
from torch import nn

from born_again import BornAgainLMTrainer, BornAgainTrainer, LstmLMConfig, LstmLMForCausalLM
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.data.streams import TokenStreams, collate_windows
from born_again.teacher import FrozenTeacher

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Small(nn.Module):
    """With a BatchNorm to fold, a convolution to lay out, and little to trace."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution, self.norm, self.out = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, pixel_values):
        return {"logits": self.out(self.norm(self.convolution(pixel_values)).relu().mean((2, 3)))}


def images(rows=20):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = ImageSplit(pixels, torch.randint(0, 10, (rows,), generator=generator))
    return ImageDataset(split, *STATISTICS, augment=True, flip=True, seed=0)


def image_trainer(folder, **changes):
    """Two epochs of two batches of 8 and one of 4."""
    settings = {
        "bf16": True,
        "channels_last": True,
        "teacher_precision": "inference",
        "learning_rate": 0.05,
        "max_steps": 6,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "epoch",
        "remove_unused_columns": False,
    }
    args = arguments(folder, **{**settings, **changes})
    data = images()
    return BornAgainTrainer(
        Small(1),
        args,
        teacher=Small(2),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate_batch,
        callbacks=[EpochCallback()],
    )


def recurrent(seed):
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=23, embedding_size=8, hidden_size=8, num_layers=1))


def language_trainer(folder, data=None, **changes):
    settings = {
        "bf16": True,
        "teacher_precision": "inference",
        "objective": "ban+l",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "eval_strategy": "epoch",
        "remove_unused_columns": False,
    }
    if data is None:
        generator = torch.Generator().manual_seed(3)
        data = TokenStreams(torch.randint(23, (4 * 5 * 4,), generator=generator), 4, 5, before=0)
    return BornAgainLMTrainer(
        recurrent(1),
        arguments(folder, **{**settings, **changes}),
        teacher=recurrent(2),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate_windows,
    )


def same(trainer, other):
    ours, theirs = trainer.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def stored_names(folder):
    return [name for path in folder.rglob("*.safetensors") for name in load_file(path)]


@pytest.fixture
def compiled_graphs(monkeypatch):
    """(whether it is trained, sizes of its input, whether any size is dynamic) of each graph that is made."""
    found, compile_ = [], torch.compile

    def record(graph, examples):
        tensors = [part for part in examples if isinstance(part, torch.Tensor)]
        sizes = [size for part in (examples, *(tensor.shape for tensor in tensors)) for size in part]
        inputs = [tuple(part.shape) for part in tensors if not isinstance(part, nn.Parameter) and part.dim()]
        found.append((torch.is_grad_enabled(), inputs[0], any(isinstance(size, torch.SymInt) for size in sizes)))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, **{**options, "backend": record}))
    return found


def test_each_network_is_compiled_once_and_for_full_batches_alone(tmp_path, compiled_graphs):
    """The teacher is evaluated before training, batches of evaluations are larger, the last of an epoch is smaller."""
    changes = {"per_device_eval_batch_size": 16, "teacher_accuracy_samples": 20}
    trainer = image_trainer(tmp_path, torch_compile_backend="eager", **changes)
    trainer.evaluate()
    trainer.train()
    assert trainer.teacher_train_metrics["samples"] == 20 and trainer.state.global_step == 6
    assert compiled_graphs == [(False, (8, 3, 32, 32), False), (True, (8, 3, 32, 32), False)]


def test_a_text_is_compiled_for_whole_windows_alone(tmp_path, compiled_graphs):
    """An LSTM is left alone, so each network has two graphs and one more where it begins with no state; beside these
    accelerate widens outputs. The last window is shorter."""
    generator = torch.Generator().manual_seed(3)
    data = TokenStreams(torch.randint(23, (4 * 18,), generator=generator), 4, 5, before=0)
    trainer = language_trainer(tmp_path, torch_compile_backend="eager", eval_strategy="no", max_steps=8, data=data)
    trainer.train()
    assert not any(is_dynamic for *_, is_dynamic in compiled_graphs)
    assert all(sizes[:2] != (4, 3) for _, sizes, _ in compiled_graphs) and len(compiled_graphs) <= 12


def test_gradients_are_copied_between_micro_batches_where_a_cuda_graph_would_overwrite_them(tmp_path, monkeypatch):
    """As a replayed graph does, the backward pass here writes every gradient of the student to one place."""
    plain = image_trainer(tmp_path / "plain", gradient_accumulation_steps=2)
    plain.train()
    trainer = image_trainer(
        tmp_path / "graphs",
        torch_compile_backend="eager",
        torch_compile_mode="reduce-overhead",
        gradient_accumulation_steps=2,
    )
    begun, static = [], {}
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))

    def in_one_place(name):
        # As a tensor of its own, which autograd takes for the parameter's `grad` without a copy.
        return lambda gradient: static.setdefault(name, torch.empty_like(gradient)).copy_(gradient).detach()

    for name, parameter in trainer.model.named_parameters():
        parameter.register_hook(in_one_place(name))
    trainer.train()
    assert same(plain, trainer) and len(begun) == 9  # 3 batches an epoch, in two steps


@pytest.mark.slow_but_for("image_trainer")
@pytest.mark.parametrize("make", [image_trainer, language_trainer])
def test_weights_and_their_names_are_those_of_a_training_without(tmp_path, make):
    """With an evaluation before training, which must leave training its autocast, checkpoints and a resume."""
    plain = make(tmp_path / "plain")
    plain.train()
    compiled = make(tmp_path / "compiled", torch_compile_backend="aot_eager", save_strategy="steps", save_steps=4)
    assert compiled.args.torch_compile
    compiled.evaluate()
    compiled.train()
    assert same(plain, compiled) and graphs()
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert compiled.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    names = stored_names(tmp_path / "compiled")
    assert names and not any("_orig_mod" in name for name in names)
    resumed = make(tmp_path / "resumed", torch_compile_backend="aot_eager")
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-4"))
    assert same(plain, resumed)


def test_an_evaluation_before_training_leaves_the_student_to_be_prepared(tmp_path):
    trainer = image_trainer(tmp_path, torch_compile_backend="eager")
    trainer.evaluate()
    assert trainer.model_wrapped is trainer.model
    seen = []
    trainer.model.out.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}


def test_a_ragged_batch_is_compiled_for_once(tmp_path):
    shapes = FrozenTeacher(Small(1)).set_precision("inference").to(torch.device("cpu")).compile(backend="eager")
    pixels = torch.randn(8, 3, 32, 32)
    shapes({"pixel_values": pixels})
    first = graphs()
    assert first
    shapes({"pixel_values": pixels[:4]})
    second = graphs()
    for rows in (8, 3, 5, 4, 7):
        shapes({"pixel_values": pixels[:rows]})
    assert graphs() == second <= 2 * first


def test_the_module_that_was_given_stays_as_it_was():
    network = Small(1)
    frozen = FrozenTeacher(network).to(torch.device("cpu")).compile(backend="eager")
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    assert torch.equal(frozen(inputs), network(**inputs)["logits"])
    assert graphs() and network._compiled_call_impl is None and frozen.modules == [network]


@pytest.mark.parametrize("precision", ["autocast", "inference", "float32"])
def test_a_teacher_that_is_compiled_already_is_one(precision):
    network = sequence_classifier(1)
    frozen = FrozenTeacher(torch.compile(network, backend="eager")).set_precision(precision).to(torch.device("cpu"))
    inputs = {"input_ids": torch.randint(1, 23, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    assert torch.equal(frozen({**inputs, "unknown": 1}), network(**inputs).logits)


def test_logits_outlive_the_next_call_where_the_compiler_overwrites_them():
    buffer = torch.zeros(2, 3)

    class Graph(nn.Module):
        def forward(self, x):
            return buffer.fill_(x)

    frozen = FrozenTeacher(Graph()).compile(backend="eager", mode="reduce-overhead")
    frozen._callable = frozen.modules  # as a CUDA graph would, the network's output is always in one place
    first, second = frozen({"x": 1.0}), frozen({"x": 2.0})
    assert first.tolist() == [[1.0] * 3] * 2 and second.tolist() == [[2.0] * 3] * 2


@pytest.mark.slow
def test_a_lineage_is_the_same_and_never_reaches_the_compilers_limit(tmp_path):
    asked, changes = spec(generations=1), {"teacher_precision": "inference", "max_steps": 2}
    runner(tmp_path / "plain", spec=asked, changes=changes).run()
    changes |= {"torch_compile_backend": "eager"}
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        runner(tmp_path / "compiled", spec=asked, changes=changes).run()
    assert hashes(tmp_path / "plain") == hashes(tmp_path / "compiled")
    assert graphs() == 3  # two students and a teacher
    assert not any("_orig_mod" in name for name in stored_names(tmp_path / "compiled"))
    assert len(json.loads((tmp_path / "compiled" / "lineage.json").read_text())["generations"]) == 2


@pytest.mark.slow_but_for("sentences")
@pytest.mark.parametrize("what", ["images", "sentences"])
def test_a_student_that_was_compiled_before_is_saved_and_loaded_as_what_it_was_made_of(tmp_path, what):
    def trainer(folder, student, **changes):
        settings = {"num_train_epochs": 2, "save_strategy": "epoch", "remove_unused_columns": False}
        settings |= {"channels_last": what == "images", "load_best_model_at_end": True, "eval_strategy": "epoch"}
        data, teacher, collate = sentences("sequence"), sequence_classifier(2), None
        if what == "images":
            data, teacher, collate = images(), Small(2), collate_batch
        datasets = {"train_dataset": data, "eval_dataset": data, "data_collator": collate}
        return BornAgainTrainer(student, arguments(folder, **{**settings, **changes}), teacher=teacher, **datasets)

    def student():
        return Small(1) if what == "images" else sequence_classifier(1)

    plain, compiled = student(), student()
    trainer(tmp_path / "plain", plain).train()
    ours = trainer(tmp_path / "compiled", torch.compile(compiled, backend="eager"))
    ours.train()
    ours.save_model(tmp_path / "compiled" / "last")
    assert graphs()
    names = stored_names(tmp_path / "compiled")
    assert names and not any("_orig_mod" in name for name in names)
    expected = plain.state_dict()
    assert all(value.equal(expected[name]) for name, value in compiled.state_dict().items())
    if what == "sentences":
        loaded = type(compiled).from_pretrained(tmp_path / "compiled" / "last")
        assert all(value.equal(expected[name]) for name, value in loaded.state_dict().items())
    first = min((tmp_path / "compiled").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again = student()
    resumed = trainer(tmp_path / "resumed", torch.compile(again, backend="eager"))
    resumed.train(resume_from_checkpoint=str(first))
    assert all(value.equal(expected[name]) for name, value in again.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("make", [image_trainer, language_trainer])
def test_inductor(tmp_path, make):
    plain, compiled = make(tmp_path / "plain"), make(tmp_path / "compiled", torch_compile=True, save_strategy="epoch")
    assert compiled.args.torch_compile_backend == "inductor"
    compiled.evaluate()
    losses = []
    for trainer in (plain, compiled):
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert graphs() and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert not any("_orig_mod" in name for name in stored_names(tmp_path))
