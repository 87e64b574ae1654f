"""The teacher's forward is captured where sizes come again, bounded in number, and gives what the eager one gives.

Without a GPU a stand-in plays the part of torch.cuda.graph: it reads from the same memory and writes to the same
memory at each replay. The real one is tested in tests/training/test_gpu.py.
"""

import pytest
import torch
from helpers import arguments, language_model, sentences
from torch import nn
from torch.utils._pytree import tree_leaves

from born_again import (
    BornAgainLMTrainer,
    BornAgainTrainer,
    LstmLMConfig,
    LstmLMForCausalLM,
    create_image_classifier,
)
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.data.streams import TokenStreams, collate_windows
from born_again.teacher import FrozenTeacher
from born_again.teacher.graphs import MAX_GRAPHS
from born_again.teacher.output_layer import without_output_layer

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CPU = torch.device("cpu")


class StandIn:
    """Counts captures and replays; `error` is raised instead of the first capture."""

    def __init__(self, error=None, changes=0.0):
        self.captures = self.replays = 0
        self.error, self.changes = error, changes

    def __call__(self, call, pool):
        self.captures += 1
        if self.error is not None:
            raise self.error
        outputs = call()

        def replay():
            self.replays += 1
            for static, value in zip(tree_leaves(outputs), tree_leaves(call()), strict=True):
                if isinstance(static, torch.Tensor):
                    static.copy_(value + self.changes)

        return replay, outputs


class Small(nn.Module):
    def __init__(self, draws=False):
        super().__init__()
        torch.manual_seed(1)
        self.out, self.draws = nn.Linear(5, 3), draws

    def forward(self, x):
        return self.out(x + torch.rand(()) if self.draws else x)


def captured(network, stand_in, precision="autocast", dtype=None):
    frozen = FrozenTeacher(network).set_precision(precision, dtype).to(CPU)
    frozen.warn = pytest.fail
    return frozen.capture_graphs(capture=stand_in, device_type="cpu")


def classifier():
    torch.manual_seed(1)
    return create_image_classifier("test_wide_resnet_cifar", list("ab"), *STATISTICS)


@pytest.mark.parametrize("precision", ["autocast", "inference", "float32"])
def test_images_a_smaller_last_batch_and_outputs_that_are_kept(precision):
    stand_in, network = StandIn(), classifier()
    eager = FrozenTeacher(network).set_precision(precision, torch.bfloat16).to(CPU)
    frozen = captured(network, stand_in, precision, torch.bfloat16)
    batches = [{"pixel_values": torch.randn(rows, 3, 32, 32)} for rows in (4, 4, 4, 2, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [frozen(batch) for batch in batches]
        expected = [eager(batch) for batch in batches]
    assert all(map(torch.equal, found, expected))
    assert (stand_in.captures, stand_in.replays) == (1, 1 + 2)  # one to compare
    frozen(batches[0])  # outside autocast, in which the graph was made
    assert stand_in.replays == (3 if precision == "autocast" else 4)


def test_a_recurrent_state_goes_from_graph_to_graph_and_is_the_callers():
    torch.manual_seed(1)
    network = LstmLMForCausalLM(LstmLMConfig(vocab_size=23, embedding_size=8, hidden_size=8, num_layers=2))
    stand_in = StandIn()
    eager, frozen = FrozenTeacher([network] * 2).to(CPU), captured([network] * 2, stand_in)
    windows = [{"input_ids": torch.randint(23, (3, time))} for time in (5, 5, 5, 5, 2)]
    for _ in range(2):
        ours = theirs = [None, None]
        for window in windows:
            aside = ours
            logits, ours = frozen.forward_with_states(window, ours)
            expected, theirs = eager.forward_with_states(window, theirs)
            assert torch.equal(logits, expected)
            assert all(map(torch.equal, tree_leaves(ours), tree_leaves(theirs)))
            frozen.forward_with_states(windows[0], aside)  # another text meanwhile
            assert all(map(torch.equal, tree_leaves(ours), tree_leaves(theirs)))
    assert stand_in.captures == 2 * 3  # of each network: first windows, others, last ones


def test_their_number_is_bounded():
    stand_in = StandIn()
    frozen = captured(Small(), stand_in)
    for _ in range(3):
        for rows in range(1, MAX_GRAPHS + 4):
            x = torch.randn(rows, 5)
            assert torch.equal(frozen({"x": x}), frozen.modules[0](x))
    assert stand_in.captures == MAX_GRAPHS


def test_the_output_layer_may_be_stood_in_for():
    network, stand_in = language_model(1), StandIn()
    frozen, batch = captured(network, stand_in), {"input_ids": torch.randint(1, 23, (2, 6))}
    for _ in range(3):
        logits = frozen(batch)
        with without_output_layer(network) as layer:
            hidden = frozen(batch)
        assert torch.equal(layer(hidden), logits) and hidden.shape[-1] == layer.in_features
    assert stand_in.captures == 2


@pytest.mark.parametrize(
    ("network", "stand_in", "reason", "captures"),
    [
        (Small(), StandIn(error=RuntimeError("operation not permitted\nwhen capturing")), "cannot be captured", 1),
        (Small(), StandIn(changes=1.0), "its outputs would differ", 1),
        (Small(draws=True), StandIn(), "it draws random numbers", 0),
    ],
)
def test_what_cannot_be_captured_stays_eager_and_is_said_once(network, stand_in, reason, captures):
    frozen, said = captured(network, stand_in), []
    frozen.warn = said.append
    x = torch.randn(2, 5)
    for seed in range(4):
        torch.manual_seed(seed)
        found = frozen({"x": x})
        torch.manual_seed(seed)
        assert torch.equal(found, network(x))
    assert len(said) == 1 and reason in said[0] and "Small is not replayed as a CUDA graph" in said[0]
    assert stand_in.captures == captures


def test_hooks_are_called():
    network, stand_in, seen = Small(), StandIn(), []
    frozen, x = captured(network, stand_in), torch.randn(2, 5)
    for _ in range(3):
        frozen({"x": x})
    replays = stand_in.replays
    hook = network.out.register_forward_hook(lambda *args: seen.append(1))
    frozen({"x": x})
    hook.remove()
    assert seen == [1] and stand_in.replays == replays
    frozen({"x": x})
    assert seen == [1] and stand_in.replays == replays + 1
    network.register_forward_hook(lambda *args: seen.append(2))
    frozen, said = captured(network, stand_in), []
    frozen.warn = said.append
    for _ in range(3):
        frozen({"x": x})
    assert seen == [1, 2, 2, 2] and "since it has hooks" in said[0]


def image_trainer(folder, **changes):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8, generator=generator)
    data = ImageDataset(ImageSplit(pixels, torch.arange(20) % 2), *STATISTICS, augment=True, flip=True, seed=0)
    args = arguments(
        folder,
        max_steps=6,
        bf16=True,
        channels_last=True,
        teacher_precision="inference",
        teacher_accuracy_samples=20,
        learning_rate=0.05,
        remove_unused_columns=False,
        **changes,
    )
    torch.manual_seed(2)
    student = create_image_classifier("test_wide_resnet_cifar", list("ab"), *STATISTICS)
    datasets = {"train_dataset": data, "data_collator": collate_batch, "callbacks": [EpochCallback()]}
    return BornAgainTrainer(student, args, teacher=classifier(), **datasets)


def text_trainer(folder):
    generator = torch.Generator().manual_seed(3)
    data = TokenStreams(torch.randint(23, (4 * 18,), generator=generator), 4, 5, before=0)
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        networks.append(LstmLMForCausalLM(LstmLMConfig(vocab_size=23, embedding_size=8, hidden_size=8, num_layers=1)))
    args = arguments(
        folder, objective="ban+l", max_steps=12, per_device_train_batch_size=4, remove_unused_columns=False
    )
    return BornAgainLMTrainer(
        networks[0], args, teacher=networks[1], train_dataset=data, data_collator=collate_windows
    )


def chunked_trainer(folder):
    args = arguments(folder, loss_implementation="chunked", num_train_epochs=2, max_steps=-1)
    return BornAgainTrainer(
        language_model(1), args, train_dataset=sentences("next", rows=24), teacher=language_model(2)
    )


@pytest.mark.parametrize(
    "make",
    [
        image_trainer,
        lambda folder: image_trainer(folder, objective="cwtm", gradient_accumulation_steps=3),
        text_trainer,
        chunked_trainer,
    ],
    ids=["images", "weights of several micro-batches", "text", "chunked"],
)
def test_a_training_is_the_same(tmp_path, make):
    plain, trainer, stand_in = make(tmp_path), make(tmp_path), StandIn()
    trainer.teacher.capture_graphs(capture=stand_in, device_type="cpu")
    trainer.teacher.warn = pytest.fail
    plain.train()
    trainer.train()
    assert stand_in.captures and stand_in.replays > stand_in.captures
    expected = plain.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())


def test_only_on_cuda_and_not_with_other_weights(tmp_path):
    trainer = image_trainer(tmp_path)
    assert trainer.teacher._graphs is None
    assert "teacher_cuda_graph" not in arguments(tmp_path, teacher_cuda_graph=False).weight_affecting()
