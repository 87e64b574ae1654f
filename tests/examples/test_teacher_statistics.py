"""A lineage of a teacher that was trained elsewhere, with another mean and std than the data's."""

import json

import pytest
import timm
import torch
from example_scripts import load_example
from helpers import arguments
from transformers import set_seed

from born_again import BornAgainTrainer, LineageEnsemble, create_image_classifier
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import load_images
from born_again.lineage.evaluation import evaluate_classifier
from born_again.lineage.reevaluation import evaluation_images, reevaluate
from born_again.models.image_classifier import load_image_classifier, save_image_classifier

THEIRS = (0.5, 0.5, 0.5), (0.12, 0.6, 0.1)  # of the digits: 0.31 and 0.34
TINY = ["--smoke", "--dataset", "digits", "--disable_tqdm", "True"]


def start(*words):
    return load_example("run_cifar").start([*TINY, *map(str, words)])


def teacher(folder, epochs, rows=None):
    """A network trained with other statistics, saved in a folder."""
    data = load_images("digits", max_train_samples=rows)
    set_seed(5)
    network = create_image_classifier("test_wide_resnet_cifar", data.label_names, *THEIRS)
    BornAgainTrainer(
        network,
        arguments(
            folder / "training",
            max_steps=-1,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            optim_args="momentum=0.9",
            learning_rate=0.1,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
        ),
        data_collator=collate_batch,
        train_dataset=ImageDataset(data.train, *THEIRS, augment=True, flip=False, seed=1),
        callbacks=[EpochCallback()],
    ).train()
    save_image_classifier(network, folder / "teacher")
    return folder / "teacher"


def own_metrics(folder, rows):
    """As its user would measure it."""
    data = load_images("digits", max_eval_samples=rows)
    return evaluate_classifier(load_image_classifier(folder), evaluation_images(data.test, *THEIRS), collate_batch)


@pytest.mark.slow
def test_it_is_recorded_and_teaches_as_it_is(tmp_path, caplog):
    folder, out = teacher(tmp_path, 1, 512), tmp_path / "out"
    limits = ["--max_train_samples", 128, "--max_eval_samples", 64]
    start(*limits, "--num_train_epochs", 1, "--generations", 1, "--output_dir", out, "--teacher", folder)
    first, student = json.loads((out / "lineage.json").read_text())["generations"]
    own = own_metrics(folder, 64)
    assert first["metrics"]["test"] == own
    data = load_images("digits", max_train_samples=128)
    saved = json.loads((out / "gen0" / "config.json").read_text())["pretrained_cfg"]
    assert (tuple(saved["mean"]), tuple(saved["std"])) == THEIRS
    taught = json.loads((out / "gen1" / "config.json").read_text())["pretrained_cfg"]
    assert taught["mean"] == list(data.mean) and taught["std"] == list(data.std)
    said = [record.getMessage() for record in caplog.records if "renormalised" in record.getMessage()]
    assert len(said) == 1 and "mean (0.5, 0.5, 0.5), std (0.12, 0.6, 0.1)" in said[0]
    for generation, record in (("gen0", first), ("gen1", student)):
        assert reevaluate(out / generation)["agrees"] is True
        assert reevaluate(out / generation)["splits"]["test"]["nll"]["recorded"] == record["metrics"]["test"]["nll"]


@pytest.mark.parametrize("what", ["size", "channels"])
def test_a_teacher_of_other_images_is_refused_before_anything_is_kept(tmp_path, what):
    labels = load_images("digits", max_train_samples=128).label_names
    if what == "size":
        network = create_image_classifier("test_wide_resnet_cifar", labels, *THEIRS)
        network.config.pretrained_cfg["input_size"] = [3, 64, 64]
        message = "teacher: was trained on images of 64x64 pixels .* data are 32x32"
    else:
        network = create_image_classifier("test_wide_resnet_cifar", labels, [0.5], [0.2], in_chans=1)
        message = r"teacher: takes images of 1 channels, its config has mean \(0.5\).* those of the data have 3"
    save_image_classifier(network, tmp_path / "teacher")
    words = ["--generations", 1, "--output_dir", tmp_path / "out", "--teacher", tmp_path / "teacher"]
    with pytest.raises(ValueError, match=message):
        start(*words)
    assert not (tmp_path / "out" / "gen0").exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ensemble/ensemble.json", "is the folder of an ensemble, expected a single network; give the folder of one"),
        ("lineage/lineage.json", "is the folder of a lineage, expected a single network; give the folder of one"),
        ("nowhere", "cannot be loaded .* expected the folder of a generation or .* relative paths start at '/"),
    ],
)
def test_a_teacher_that_is_no_single_network_is_refused_by_its_flag(tmp_path, what, message):
    path = tmp_path / what
    if path.suffix:
        path.parent.mkdir()
        path.write_text("{}")
        path = path.parent
    with pytest.raises(ValueError, match=f"--teacher '{path}' {message}"):
        start("--output_dir", tmp_path / "out", "--teacher", path)


def test_a_teacher_saved_by_timm_is_taken(tmp_path):
    network = timm.create_model("test_wide_resnet_cifar", num_classes=10, proj_drop_rate=0.1)
    labels = {"label_names": [str(digit) for digit in range(10)]}
    options = {"model_config": labels, "model_args": {"num_classes": 10, "proj_drop_rate": 0.1}}
    timm.models.save_for_hf(network, tmp_path / "teacher", safe_serialization=True, **options)
    words = ["--max_train_samples", 64, "--max_eval_samples", 32, "--generations", 0]
    start(*words, "--output_dir", tmp_path / "out", "--teacher", tmp_path / "teacher")
    taken = load_image_classifier(tmp_path / "out" / "gen0").timm_model
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, taken.state_dict()[name])


@pytest.mark.slow
def test_its_students_learn_and_answer_beside_it(tmp_path):
    torch.set_num_threads(2)
    folder, out = teacher(tmp_path, 12), tmp_path / "out"
    words = ["--max_train_samples", 1438, "--max_eval_samples", 297, "--per_device_train_batch_size", 64]
    words += ["--num_train_epochs", 12, "--lr_milestones", 0.8, "--generations", 1]
    start(*words, "--output_dir", out, "--teacher", folder)
    first, student = json.loads((out / "lineage.json").read_text())["generations"]
    assert first["metrics"]["test"]["accuracy"] == own_metrics(folder, 297)["accuracy"] > 0.95
    assert student["teacher_fit"]["accuracy"] > 0.95 and student["metrics"]["test"]["accuracy"] > 0.9
    together = LineageEnsemble.from_lineage(out, "all")
    test, mean, std = (getattr(load_images("digits"), name) for name in ("test", "mean", "std"))
    accuracy = evaluate_classifier(together, evaluation_images(test, mean, std), collate_batch)["accuracy"]
    together.save_pretrained(out / "everyone")
    measured = reevaluate(out / "everyone")["splits"]["test"]["accuracy"]["measured"]
    assert measured == pytest.approx(accuracy, abs=0.004) and accuracy > 0.95
