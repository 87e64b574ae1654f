"""What only a GPU can show; `python -m tests.benchmarks.cuda` runs these tests with its measurements."""

import os

import pytest
import torch
from helpers import arguments
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

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
from born_again.teacher.graphs import GraphedForward

pytestmark = pytest.mark.gpu

# Which deterministic algorithms need, and cuBLAS reads once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CUDA = torch.device("cuda")


def classifier(seed):
    torch.manual_seed(seed)
    return create_image_classifier("test_wide_resnet_cifar", list("ab"), *STATISTICS)


def recurrent(seed):
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=23, embedding_size=64, hidden_size=64, num_layers=2))


def images(folder, rows=20, device=CUDA, **changes):
    """Batches of 8, the last of an epoch smaller."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = ImageSplit(pixels.to(device), (torch.arange(rows) % 2).to(device))
    settings = {
        "bf16": True,
        "channels_last": True,
        "teacher_precision": "inference",
        "learning_rate": 0.05,
        "teacher_accuracy_samples": 16,
    }
    data = ImageDataset(split, *STATISTICS, augment=True, flip=True, seed=0)
    return BornAgainTrainer(
        classifier(1),
        on_cuda(folder, device, **{**settings, **changes}),
        teacher=classifier(2),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate_batch,
        callbacks=[EpochCallback()],
    )


def text(folder, rows=18, device=CUDA, **changes):
    """Windows of 5 words of 4 streams, the last one shorter."""
    tokens = torch.randint(23, (4 * rows,), generator=torch.Generator().manual_seed(3))
    data = TokenStreams(tokens.to(device), 4, 5, before=0)
    settings = {"objective": "ban+l", "bf16": True, "teacher_precision": "inference", "max_grad_norm": 0.25}
    settings |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return BornAgainLMTrainer(
        recurrent(1),
        on_cuda(folder, device, **{**settings, **changes}),
        teacher=recurrent(2),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate_windows,
    )


def on_cuda(folder, data_device, **changes):
    settings = {"use_cpu": False, "remove_unused_columns": False, "dataloader_pin_memory": data_device.type == "cpu"}
    return arguments(folder, **{"max_steps": 8, **settings, **changes})


def same_weights(trainer, other):
    theirs = other.model.state_dict()
    return all(value.equal(theirs[name]) for name, value in trainer.model.state_dict().items())


def captured(trainer):
    return [len(called._graphs) for called in trainer.teacher._callable if isinstance(called, GraphedForward)]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["autocast", "inference", "float32"])
def test_a_captured_teacher_gives_the_bits_of_an_eager_one(precision):
    """Images and text, a smaller last batch, and a state carried from window to window."""
    batches = [{"pixel_values": torch.randn(rows, 3, 32, 32, device=CUDA)} for rows in (16, 16, 16, 5, 16)]
    windows = [{"input_ids": torch.randint(23, (8, time), device=CUDA)} for time in (35, 35, 35, 35, 7)]
    for network, texts, graphs in ((classifier(1), batches, 1), (recurrent(1), windows * 2, 3)):
        eager, frozen = (FrozenTeacher(network).set_precision(precision, torch.bfloat16).to(CUDA) for _ in range(2))
        frozen.warn = pytest.fail
        frozen.capture_graphs()
        ours = theirs = [None]
        for index, batch in enumerate(texts):
            if index == len(windows):
                ours = theirs = [None]
            with torch.autocast("cuda", torch.bfloat16):
                logits, ours = frozen.forward_with_states(batch, ours)
                expected, theirs = eager.forward_with_states(batch, theirs)
            assert torch.equal(logits, expected)
            pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
            assert all(a is b or torch.equal(a, b) for a, b in pairs)
        assert len(frozen._callable[0]._graphs) == graphs


@pytest.mark.parametrize("make", [images, text])
def test_a_training_is_the_same_with_a_captured_teacher_and_wherever_the_data_is(tmp_path, make, deterministic):
    trainers = [
        make(tmp_path / "captured"),
        make(tmp_path / "eager", teacher_cuda_graph=False),
        make(tmp_path / "main memory", device=torch.device("cpu")),
    ]
    for trainer in trainers:
        trainer.train()
    assert sum(captured(trainers[0])) and not captured(trainers[1])
    assert same_weights(trainers[0], trainers[1]) and same_weights(trainers[0], trainers[2])


@pytest.mark.parametrize("make", [images, text])
def test_a_training_killed_and_resumed_has_the_same_weights(tmp_path, make, deterministic):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole, killed = make(tmp_path / "whole"), make(tmp_path / "killed", save_strategy="steps", save_steps=4)
    whole.train()
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(tmp_path / "killed", save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("make", [images, text])
def test_a_compiled_training_with_cuda_graphs(tmp_path, make):
    """Losses of the trained networks agree to 2 %: the compiler fuses, and rounds otherwise."""
    plain = make(tmp_path / "plain", gradient_accumulation_steps=2)
    changes = {"torch_compile": True, "torch_compile_mode": "reduce-overhead", "gradient_accumulation_steps": 2}
    compiled = make(tmp_path / "compiled", save_strategy="steps", save_steps=4, eval_strategy="epoch", **changes)
    compiled.evaluate()
    losses = []
    for trainer in (plain, compiled):
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    resumed = make(tmp_path / "compiled", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-4"))
    assert resumed.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=0.02)
    assert not any("_orig_mod" in name for name in torch.nn.Module.state_dict(compiled.model))


def test_fp16_goes_on_after_gradients_that_overflow_once(tmp_path):
    trainer = images(tmp_path, bf16=False, fp16=True)
    calls = []

    def overflow_once(gradient):
        calls.append(1)
        return gradient * torch.inf if len(calls) == 3 else gradient

    next(trainer.model.parameters()).register_hook(overflow_once)
    first = trainer.accelerator.scaler.get_scale()
    trainer.train()
    assert trainer.state.global_step == len(calls) == 8
    assert trainer.accelerator.scaler.get_scale() < first
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("make", [images, text])
def test_the_host_waits_for_nothing_in_a_steady_step(tmp_path, make):
    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 28:
                torch.cuda.set_sync_debug_mode("default")

    trainer = make(tmp_path, rows=8 * 30, max_steps=30, logging_steps=100)
    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 30
