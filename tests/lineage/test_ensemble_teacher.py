"""An ensemble teaches as the list of its members does, and its state goes on where a training goes on."""

import pytest
import torch
from helpers import arguments
from lineage_folders import LABELS, WORDS, inputs, lineage, network
from safetensors import safe_open

from born_again import BornAgainLMTrainer, BornAgainTrainer, LineageEnsemble, load_generation
from born_again.data.streams import TokenStreams, collate_windows
from born_again.teacher import FrozenTeacher

STREAMS = 2


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lineage(tmp_path_factory.mktemp("lstm"), [network("lstm", seed) for seed in range(3)])


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def reader(folder, teacher, **changes):
    """A trainer of a recurrent student on two streams of five windows."""
    tokens = torch.randint(len(WORDS), (38,), generator=torch.Generator().manual_seed(3))
    settings = {"objective": "ban+l", "per_device_train_batch_size": STREAMS, "max_steps": 5, "learning_rate": 0.1}
    return BornAgainLMTrainer(
        network("lstm", 8).double(),
        arguments(folder, remove_unused_columns=False, **settings, **changes),
        teacher=teacher,
        data_collator=collate_windows,
        train_dataset=TokenStreams(tokens, STREAMS, 4, before=2),
    )


def test_a_language_model_is_taught_as_by_the_list_of_members(folder, tmp_path):
    teachers = {
        "list": [load_generation(folder / f"gen{index}").double() for index in (1, 2)],
        "ensemble": LineageEnsemble.from_lineage(folder, "1,2").double(),
        "one by one": LineageEnsemble.from_lineage(folder, "1,2", sequential=True).double(),
        "logits": LineageEnsemble.from_lineage(folder, "1,2", "logits").double(),
    }
    found = {}
    for name, teacher in teachers.items():
        trainer = reader(tmp_path / name, teacher)
        trainer.train()
        found[name] = weights(trainer.model)
    assert not torch.allclose(found["list"], weights(network("lstm", 8).double()), atol=1e-3)
    for name in ("ensemble", "one by one"):
        torch.testing.assert_close(found[name], found["list"], rtol=0, atol=1e-10)
    assert (found["logits"] - found["list"]).abs().max() > 1e-6


def test_a_training_that_goes_on_has_the_states_of_all_members(folder, tmp_path):
    ensemble = LineageEnsemble.from_lineage(folder, "0,1,2").double()
    whole = reader(tmp_path, ensemble, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    with safe_open(checkpoint / "carried_state_0_of_1.safetensors", "pt") as file:
        names = {name for name in file.keys() if name.startswith("teacher")}  # noqa: SIM118
    assert names == {f"teacher0.{part}" for part in range(3 * 4)}
    resumed = reader(tmp_path / "resumed", ensemble)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=1e-12)
    for path in checkpoint.glob("carried_state*"):
        path.unlink()
    with pytest.raises(ValueError, match="resume_from_checkpoint: .* has no carried_state_0_of_1.safetensors"):
        reader(tmp_path / "lost", ensemble).train(resume_from_checkpoint=str(checkpoint))


def test_an_image_classifier_is_taught_as_by_the_list_of_members(tmp_path):
    folder = lineage(tmp_path / "image", [network("image", seed) for seed in range(3)])
    x = inputs("image", rows=8).double()
    data = [{"pixel_values": x[row], "labels": torch.tensor(row % len(LABELS))} for row in range(8)]
    found = []
    for teacher in (
        [load_generation(folder / f"gen{index}").double() for index in (1, 2)],
        LineageEnsemble.from_lineage(folder, "last 2").double(),
    ):
        settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1}
        trainer = BornAgainTrainer(
            network("image", 8).double(), arguments(tmp_path / "out", **settings), train_dataset=data, teacher=teacher
        )
        trainer.train()
        assert trainer.teacher.modules[-1].training is False
        found.append(weights(trainer.model))
    assert not torch.allclose(found[0], weights(network("image", 8).double()), atol=1e-3)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_student_of_other_words_or_labels_is_refused(folder, tmp_path, sequential):
    ensemble = LineageEnsemble.from_lineage(folder, "last 1", sequential=sequential)
    with pytest.raises(ValueError, match="teacher: has 6 tokens, the student 7 .*expected the same number"):
        FrozenTeacher(ensemble).check_against(network("lstm", 0, words=7))
    FrozenTeacher(ensemble).check_against(network("lstm", 0))
    images = lineage(tmp_path, [network("image", seed) for seed in range(2)])
    ensemble = LineageEnsemble.from_lineage(images, "last 1", sequential=sequential)
    with pytest.raises(ValueError, match="teacher: class 1 is called 'b', by the student 'x'"):
        FrozenTeacher(ensemble).check_against(network("image", 0, labels=["a", "x", "c"]))
    FrozenTeacher(ensemble).check_against(network("image", 0))
