"""Trainings on images with a teacher cache: bit-equal weights, and fewer teacher forwards."""

import logging

import pytest
import torch
from cached_trainings import STATISTICS, Convolutions, TwoViews, hits, image_trainer, images, named, weights
from helpers import Network, arguments, sentences, sequence_classifier, vectors
from transformers import TrainerCallback

from born_again import BornAgainTrainer
from born_again.data.augment import count_views
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.objectives import OBJECTIVES
from born_again.teacher import FrozenTeacher
from born_again.teacher.cache import storage
from born_again.teacher.cache.cached_teacher import VIEW_KEYS


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    """Networks this small gain nothing from a second one."""
    torch.set_num_threads(1)


def trained(folder, cache, **changes) -> torch.Tensor:
    trainer = image_trainer(folder, teacher_cache=cache, **changes)
    trainer.train()
    return weights(trainer)


SETTINGS = {
    "plain": {},
    "ragged": {"per_device_train_batch_size": 8},
    "accumulation": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},
    "cwtm": {"objective": "cwtm", "gradient_accumulation_steps": 2},
    "dkpp": {"objective": "dkpp"},
    "bf16": {"bf16": True, "channels_last": True, "num_train_epochs": 5},
    "inference": {"bf16": True, "channels_last": True, "num_train_epochs": 5, "teacher_precision": "inference"},
    "float32": {"bf16": True, "num_train_epochs": 5, "teacher_precision": "float32"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "num_train_epochs": 5},
    "workers": {"dataloader_num_workers": 2, "num_train_epochs": 2},
    "persistent workers": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "num_train_epochs": 3,
    },
}


@pytest.mark.slow_but_for("plain", "ragged", "cwtm")
@pytest.mark.parametrize("name", named(SETTINGS))
def test_weights_are_those_without_a_cache(tmp_path, name):
    expected = trained(tmp_path, "off", **SETTINGS[name])
    for cache in ("memory", "disk"):
        trainer = image_trainer(tmp_path, teacher_cache=cache, **SETTINGS[name])
        trainer.train()
        assert torch.equal(weights(trainer), expected), cache
        seen = hits(trainer)
        assert seen[-1] > 0.5 or len(seen) < 6
        rows = round(trainer.args.num_train_epochs) * len(trainer.train_dataset)
        assert (
            sum(trainer.teacher.modules[0].answered) < rows + 250
        )  # its accuracy, and the batch sizes that were checked
        assert not trainer.train_dataset.emit_view_keys


def test_another_view_would_be_seen(tmp_path):
    """The test above can fail: outputs for other views give other weights."""
    wrong = images()
    wrong.views = lambda samples: torch.zeros_like(samples)
    assert not torch.equal(trained(tmp_path, "off"), trained(tmp_path, "off", dataset=wrong))


@pytest.mark.parametrize("habit", ["size", "some", "layer"])
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_batch_sizes_that_round_differently_are_not_computed_alone(tmp_path, cache, habit):
    """Batches of 8 out of 50 leave 2, whose outputs are those of a small batch."""
    changes = {"per_device_train_batch_size": 8}
    expected = trained(tmp_path, "off", teacher=Convolutions(2, habit), **changes)
    teacher = Convolutions(2, habit)
    trainer = image_trainer(tmp_path, teacher=teacher, teacher_cache=cache, **changes)
    trainer.train()
    assert torch.equal(weights(trainer), expected)
    assert {size: exact for size, exact in trainer.teacher.outputs.sizes.items() if size < 5} == {
        size: False for size in trainer.teacher.outputs.sizes if size < 5
    }
    assert trainer.teacher.outputs.sizes[2] is False and 5 in teacher.answered and hits(trainer)[-1] > 0.5


def test_a_teacher_whose_outputs_depend_on_the_order_of_rows_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, "memory", num_train_epochs=2)
        assert "the last bits of the teacher's output" not in caplog.text
        trained(tmp_path, "memory", num_train_epochs=2, teacher=Convolutions(2, "place"))
    assert "equal uncached ones only up to that rounding" in caplog.text


def test_several_networks_teach_from_one_cache(tmp_path):
    expected = trained(tmp_path, "off", teacher=[Convolutions(2), Convolutions(3)])
    assert torch.equal(trained(tmp_path, "memory", teacher=[Convolutions(2), Convolutions(3)]), expected)


def test_further_students_never_call_the_teacher(tmp_path, monkeypatch):
    shared = {"teacher_cache_dir": str(tmp_path / "shared")}
    trained(tmp_path, "disk", dataset=images(40, kind=TwoViews), num_train_epochs=14, **shared)
    shared["num_train_epochs"] = 2
    expected = {}
    for seed, objective in enumerate(OBJECTIVES, 3):
        changes = {"dataset": images(40, seed, kind=TwoViews), "objective": objective, "num_train_epochs": 2}
        expected[objective, seed] = trained(tmp_path, "off", **changes)

    def refuse(*args):
        raise AssertionError("the teacher was called")

    monkeypatch.setattr(FrozenTeacher, "logits_by_network", refuse)
    for (objective, seed), other in expected.items():
        trainer = image_trainer(
            tmp_path,
            teacher_cache="disk",
            dataset=images(40, seed, kind=TwoViews),
            objective=objective,
            per_device_eval_batch_size=10,
            **shared,
        )
        trainer.train()
        assert torch.equal(weights(trainer), other) and hits(trainer) == [1.0]


def folders(path) -> int:
    return len([folder for folder in path.iterdir() if folder.is_dir()])


@pytest.mark.slow
def test_another_teacher_data_or_precision_has_a_cache_of_its_own(tmp_path):
    shared = {"teacher_cache_dir": str(tmp_path / "shared"), "num_train_epochs": 2}
    trained(tmp_path, "disk", **shared)
    others = [
        {"teacher": Convolutions(4)},
        {"dataset": images(mean=(0.4, 0.5, 0.5))},
        {"bf16": True},
        {"channels_last": True},
        {"per_device_train_batch_size": 25},
    ]
    for count, other in enumerate(others, 2):
        expected = trained(tmp_path, "off", num_train_epochs=2, **other)
        assert torch.equal(trained(tmp_path, "disk", **other, **shared), expected)
        assert folders(tmp_path / "shared") == count
    trained(tmp_path, "disk", **shared, dataset=images(seed=9), seed=11, learning_rate=0.2)
    assert folders(tmp_path / "shared") == len(others) + 1


@pytest.mark.slow_but_for("disk")
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_resuming_in_an_epoch_gives_the_same_weights(tmp_path, cache):
    changes = {"save_strategy": "steps", "save_steps": 13, "num_train_epochs": 6}
    expected = trained(tmp_path / "whole", "off", **changes)
    trained(tmp_path / "cut", cache, **changes)
    again = image_trainer(tmp_path / "cut", teacher_cache=cache, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-13"))
    assert torch.equal(weights(again), expected)
    first = hits(again)[2]  # two were logged before the checkpoint
    assert first == 1.0 if cache == "disk" else first < 1


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_what_does_not_fit_is_computed_by_the_teacher(tmp_path, cache, caplog):
    with caplog.at_level(logging.INFO):
        limited = trained(tmp_path, cache, teacher_cache_limit_gib=1000 / 2**30)
    assert torch.equal(limited, trained(tmp_path, "off"))
    assert "Teacher cache: full with" in caplog.text


def test_a_disk_that_fills_up_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    write, calls = storage._write_all, []

    def full_after_a_while(file, content):
        calls.append(len(content))
        if len(calls) > 21:
            raise OSError(28, "No space left on device")
        write(file, content)

    monkeypatch.setattr(storage, "_write_all", full_after_a_while)
    weights_ = trained(tmp_path, "disk")
    assert torch.equal(weights_, trained(tmp_path, "off"))
    assert len(calls) == 22 and caplog.text.count("cannot be written (No space left on device)") == 1


def test_a_training_set_without_keys_is_refused(tmp_path):
    args = arguments(tmp_path, teacher_cache="memory")
    with pytest.raises(
        ValueError, match="teacher_cache: got 'memory' beside a training set .list. whose samples have"
    ):
        BornAgainTrainer(Network(1), args, train_dataset=vectors(), teacher=Network(2))
    labels_alone = BornAgainTrainer(sequence_classifier(1), args, train_dataset=sentences("sequence"))
    labels_alone.train()  # without a teacher there is nothing to keep


def test_evaluation_on_the_training_set_in_between_knows_no_keys(tmp_path):
    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])

    seen = []
    trainer = image_trainer(tmp_path, teacher_cache="memory", num_train_epochs=1, callbacks=[Evaluate()])
    trainer.train()
    plain = image_trainer(tmp_path, num_train_epochs=1)
    plain.train()
    assert len(seen) == 5 and seen[-1] == plain.evaluate(plain.train_dataset)["eval_loss"]
    assert trainer.predict(trainer.train_dataset).predictions.shape == (50, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_cache_limit_gib": 1.0}, "teacher_cache_limit_gib: got 1.0 with teacher_cache 'off'"),
        ({"teacher_cache": "disk", "teacher_cache_limit_gib": 0.0}, "teacher_cache_limit_gib: got 0.0, expected"),
        ({"teacher_cache": "memory", "teacher_cache_dir": "x"}, "teacher_cache_dir: got 'x' with teacher_cache 'mem"),
    ],
)
def test_arguments_that_would_not_be_read_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_the_cache_affects_no_weight(tmp_path):
    changes = {"teacher_cache": "disk", "teacher_cache_dir": "x", "teacher_cache_limit_gib": 2.0}
    assert arguments(tmp_path, **changes).weight_affecting() == arguments(tmp_path).weight_affecting()


# ---- Keys ----


def test_a_key_names_sample_and_view(tmp_path):
    dataset = images(kind=ImageDataset)
    assert VIEW_KEYS not in dataset.__getitems__([1, 2]) and dataset.view_count == 50 * count_views(True)
    dataset.emit_view_keys = True
    dataset.set_epoch(5)
    samples = torch.tensor([4, 0, 49])
    keys = dataset.__getitems__(samples.tolist())[VIEW_KEYS]
    assert keys.tolist() == (samples * 162 + dataset.views(samples)).tolist() and keys.dtype == "int64"
    stacked = collate_batch([dataset[4], dataset[0], dataset[49]])
    assert stacked[VIEW_KEYS].tolist() == keys.tolist()
    assert set(collate_batch([dataset[4]])) == {"pixel_values", "labels", VIEW_KEYS}


def test_the_fingerprint_tells_inputs_apart_and_not_seeds():
    expected = images().cache_fingerprint
    assert images(seed=8).cache_fingerprint == images(augment=False).cache_fingerprint == expected
    other = images()
    other.pixels[3, 2, 1, 0] ^= 1
    flipless = ImageDataset(images(), *STATISTICS, augment=True, flip=False, seed=3)
    for dataset in (images(49), images(mean=(0.5, 0.5, 0.4)), other, flipless):
        assert dataset.cache_fingerprint != expected
