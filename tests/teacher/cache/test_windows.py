"""Trainings on text whose teacher's hidden states are cached: bit-equal weights, and no window computed twice."""

import logging
from pathlib import Path

import pytest
import torch
from cached_trainings import STREAMS, WINDOW, gpt2, hits, lstm, named, text, text_trainer, weights
from transformers import Gemma2Config, Gemma2ForCausalLM

from born_again.data.streams import collate_windows
from born_again.teacher import FrozenTeacher
from born_again.teacher.cache.cached_teacher import VIEW_KEYS
from born_again.training.lm_trainer import CarriedState


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    """Networks this small gain nothing from a second one."""
    torch.set_num_threads(1)


@pytest.fixture
def counted(monkeypatch):
    """The windows that a teacher has read."""
    read, calls = FrozenTeacher.logits_by_network, []

    def count(self, *args):
        calls.append(1)
        return read(self, *args)

    monkeypatch.setattr(FrozenTeacher, "logits_by_network", count)
    return calls


def trained(folder, cache, student=lstm, teachers=(2,), **changes):
    checkpoint = changes.pop("checkpoint", None)
    changes.setdefault("teacher_accuracy_samples", 2048)
    trainer = text_trainer(folder, student(1), [student(seed, 6) for seed in teachers], teacher_cache=cache, **changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


SETTINGS = {
    "plain": {},
    "bf16": {"bf16": True},
    "inference": {"bf16": True, "teacher_precision": "inference"},
    "float32": {"bf16": True, "teacher_precision": "float32"},
    "chunked": {"loss_implementation": "chunked"},
    "chunked inference": {"bf16": True, "loss_implementation": "chunked", "teacher_precision": "inference"},
    "chunked cwtm": {"loss_implementation": "chunked", "objective": "cwtm", "gradient_accumulation_steps": 2},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "num_train_epochs": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "cwtm": {"objective": "cwtm", "gradient_accumulation_steps": 2},
    "workers": {"dataloader_num_workers": 2, "num_train_epochs": 2},
    "two teachers": {"teachers": (2, 3)},
}


@pytest.mark.slow_but_for("plain-lstm", "accumulation-gpt2", "chunked inference-lstm")
@pytest.mark.parametrize("student", [lstm, gpt2])
@pytest.mark.parametrize("name", named(SETTINGS))
def test_weights_are_those_without_a_cache_and_each_window_is_read_once(tmp_path, counted, name, student):
    expected = weights(trained(tmp_path, "off", student, **SETTINGS[name]))
    for cache in ("memory", "disk"):
        counted.clear()
        trainer = trained(tmp_path, cache, student, **SETTINGS[name])
        assert torch.equal(weights(trainer), expected), cache
        assert hits(trainer)[-1] == 1.0
        # Two more to see that the output layer alone makes the logits; what is compiled is not taken apart. The fit
        # reads the windows before the training.
        looked = 2 if "chunked" in name else 0  # at the first row, to choose the loss implementation
        assert len(counted) == text().windows + looked + (0 if name == "compiled" else 2)
        counted.clear()
    assert torch.equal(weights(trained(tmp_path, "disk", student, **SETTINGS[name])), expected)
    assert len(counted) == looked  # a further student


def test_a_state_that_was_not_carried_would_be_seen(tmp_path, monkeypatch):
    """The test above can fail: a teacher that begins anew in every window gives other weights."""
    expected = weights(trained(tmp_path, "off"))
    read = FrozenTeacher.logits_by_network
    monkeypatch.setattr(FrozenTeacher, "logits_by_network", lambda self, inputs, states: read(self, inputs, [None]))
    assert not torch.equal(weights(trained(tmp_path, "off")), expected)


@pytest.mark.slow_but_for("6240-disk")
@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("limit", [None, 6 * STREAMS * 260])
def test_resuming_in_an_epoch_gives_the_same_weights(tmp_path, cache, limit):
    """From a checkpoint after windows that were found: the state is that cached with them."""
    changes = {"save_strategy": "steps", "save_steps": 14}
    expected = weights(trained(tmp_path / "whole", "off", **changes))
    changes |= {"teacher_cache_limit_gib": limit and limit / 2**30}
    trained(tmp_path / "cut", cache, **changes)
    checkpoint = tmp_path / "cut" / "checkpoint-14"
    assert CarriedState.load(next(Path(checkpoint).glob("carried*")), 1, torch.device("cpu")).teachers[0] is not None
    again = trained(tmp_path / "cut", cache, checkpoint=str(checkpoint), **changes)
    assert torch.equal(weights(again), expected)
    assert (hits(again)[-1] == 1.0) == (limit is None)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_windows_beyond_the_limit_are_computed_with_the_cached_state(tmp_path, cache, counted):
    expected = weights(trained(tmp_path, "off"))
    counted.clear()
    limited = trained(tmp_path, cache, teacher_cache_limit_gib=4 * STREAMS * 260 / 2**30)
    assert torch.equal(weights(limited), expected)
    assert text().windows + 2 < len(counted) < 4 * text().windows


def test_evaluation_in_between_does_not_disturb(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 4}
    expected = trained(tmp_path, "off", **changes)
    trainer = trained(tmp_path, "memory", **changes)
    assert torch.equal(weights(trainer), weights(expected))
    losses = [each.evaluate(each.train_dataset)["eval_loss"] for each in (trainer, expected)]
    assert losses[0] == losses[1]
    assert trainer.teacher_train_metrics == expected.teacher_train_metrics
    assert trainer.predict(text(seed=8)).predictions.shape == (9 * STREAMS, WINDOW)


def gemma(seed: int, units: int = 8) -> Gemma2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=17, final_logit_softcapping=0.01, **sizes, **heads))


def test_logits_are_cached_where_hidden_states_do_not_give_them(tmp_path, caplog):
    expected = weights(trained(tmp_path, "off", gemma))
    with caplog.at_level(logging.WARNING):
        first = trained(tmp_path, "disk", gemma)
    assert "the teacher's logits are not the output of its output layer alone" in caplog.text
    assert first.teacher.output_layers is None and first.teacher.outputs.kind == "logits"
    for trainer in (first, trained(tmp_path, "disk", gemma), trained(tmp_path, "memory", gemma)):
        assert torch.equal(weights(trainer), expected) and hits(trainer)[-1] == 1.0


def test_hidden_states_are_offered_as_such(tmp_path):
    trainer = trained(tmp_path, "memory", teachers=(2,))
    data = trainer.train_dataset
    data.emit_view_keys = True
    states = plain = [None]
    for window in range(data.windows):
        batch = data.__getitems__(range(window * STREAMS, (window + 1) * STREAMS))
        del batch["labels"]
        (hidden,), states = trainer.teacher.hidden_with_states(batch, states)
        logits, plain = trainer.teacher.frozen.forward_with_states({"input_ids": batch["input_ids"]}, plain)
        (layer,) = trainer.teacher.output_layers
        assert hidden.shape == (*batch["input_ids"].shape, 6) and torch.equal(layer(hidden), logits)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(states[0], plain[0], strict=True))
    assert trainer.teacher.pop_hit_counts() == (9 * STREAMS, 9 * STREAMS)


def test_a_window_without_the_state_before_it_is_not_cached(tmp_path):
    trainer = text_trainer(tmp_path, lstm(1), lstm(2), teacher_cache="memory")
    data = trainer.train_dataset
    data.emit_view_keys = True
    batch = data.__getitems__(range(STREAMS, 2 * STREAMS))
    del batch["labels"]
    trainer.teacher.forward_with_states(batch, [None])
    assert trainer.teacher.outputs.layout is None


def test_a_key_names_stream_and_window():
    data = text()
    assert VIEW_KEYS not in data.__getitems__([4, 5]) and data.view_count == len(data)
    data.emit_view_keys = True
    assert data.__getitems__([5, 4, 7])[VIEW_KEYS].tolist() == [5, 4, 7]
    assert collate_windows([data[5], data[4]])[VIEW_KEYS].tolist() == [5, 4]
    assert set(collate_windows([data[5]])) == {"input_ids", "labels", VIEW_KEYS}


def test_the_fingerprint_tells_texts_and_cuts_apart():
    assert text().cache_fingerprint == text().cache_fingerprint
    assert len({text().cache_fingerprint, text(seed=4).cache_fingerprint, text(streams=2).cache_fingerprint}) == 3
