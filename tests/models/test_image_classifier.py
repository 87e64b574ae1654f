"""One folder for timm and transformers: made, saved, and loaded by either in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import load_state_dict_from_path
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

from born_again.models import densenet_cifar, image_classifier
from born_again.models.image_classifier import create_image_classifier, load_image_classifier, save_image_classifier

ROOT = Path(densenet_cifar.__file__).parents[2]
LABELS = ["cat", "dog", "ox"]
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
TINY = ["test_densenet_cifar", "test_wide_resnet_cifar"]


def _create(name: str = "test_wide_resnet_cifar", **model_args) -> TimmWrapperForImageClassification:
    return create_image_classifier(name, LABELS, MEAN, STD, **model_args)


def _images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _with_statistics(model: TimmWrapperForImageClassification) -> TimmWrapperForImageClassification:
    with torch.no_grad():
        model.train()(_images() * 2 + 1)  # running statistics other than the initial ones
    return model.eval()


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=TINY)
def saved(request, tmp_path_factory) -> tuple[TimmWrapperForImageClassification, Path]:
    torch.manual_seed(0)
    model = _with_statistics(_create(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    save_image_classifier(model, folder)
    return model, folder


@pytest.mark.parametrize("name", [*TINY, "resnet18"])
def test_weights_are_the_networks_own(name):
    torch.manual_seed(3)
    network = timm.create_model(name, num_classes=3)
    state_after = torch.get_rng_state()
    torch.manual_seed(3)
    model = _create(name)
    assert torch.equal(torch.get_rng_state(), state_after)
    assert model.training and model.num_labels == 3
    expected, found = network.state_dict(), model.timm_model.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    stds = [(expected[key].std(), found[key].std()) for key in expected if expected[key].ndim == 4]
    assert len({round(std.item(), 3) for std, _ in stds}) > 2  # one rule per layer, not the wrapper's 0.02
    assert all(std == other for std, other in stds)


def test_configuration():
    config = _create("test_densenet_cifar").config
    assert config.id2label == dict(enumerate(LABELS)) and config.label2id["ox"] == 2
    written = json.loads(config.to_json_string())
    assert written["label_names"] == LABELS and written["num_classes"] == 3 and written["model_args"] == {}
    cfg = written["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_pct"], cfg["mean"], cfg["std"]) == ([3, 32, 32], 1.0, [*MEAN], [*STD])
    other = _create("resnet18").config.pretrained_cfg
    assert (other["input_size"], other["crop_pct"], other["mean"]) == ([3, 224, 224], 1.0, [*MEAN])
    # what the library says about its own weights is not true of these
    assert not {"url", "hf_hub_id", "tag", "license", "origin_url"} & set(other)


def test_model_args_reach_the_network_and_the_folder(tmp_path):
    model = create_image_classifier("test_wide_resnet_cifar", LABELS, [0.5], [0.25], proj_drop_rate=0.3, in_chans=1)
    assert model.config.pretrained_cfg["input_size"] == [1, 32, 32]
    save_image_classifier(model, tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert network.group1[0].drop.p == 0.3 and network.stem.in_channels == 1
    assert load_image_classifier(tmp_path).timm_model.group1[0].drop.p == 0.3


def test_loss_leaves_the_configuration_as_it_is():
    model = _create()
    before = model.config.to_json_string()
    loss = model(_images(), labels=torch.tensor([0, 1, 2, 0])).loss
    expected = torch.nn.functional.cross_entropy(model(_images()).logits, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(loss, expected)
    assert model.config.to_json_string() == before


FRESH = """
import json, sys
import numpy as np, timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
import born_again.models

folder, work = sys.argv[1:]
pixels = np.load(work + "/pixels.npy")
image = Image.fromarray(pixels)
network = timm.create_model("local-dir:" + folder, pretrained=True).eval()
model = AutoModelForImageClassification.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
values = processor(image)["pixel_values"]
with torch.no_grad():
    ours, theirs = network(values), model(values).logits
np.save(work + "/values.npy", values.numpy())
np.save(work + "/logits.npy", ours.numpy())
print(json.dumps({
    "equal": torch.equal(ours, theirs),
    "labels": [model.config.id2label, list(network.pretrained_cfg["label_names"])],
    "pipeline": pipeline("image-classification", model=folder)(image),
}))
"""


@pytest.mark.slow
def test_one_folder_for_timm_and_transformers_in_a_fresh_interpreter(saved, tmp_path):
    model, folder = saved
    assert set(_files(folder)) == {"config.json", "model.safetensors"}
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, str(folder), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["equal"]
    assert found["labels"] == [dict(zip("012", LABELS, strict=True)), LABELS]

    values = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255  # (1, 3, 32, 32)
    values = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    np.testing.assert_allclose(np.load(tmp_path / "values.npy"), values, atol=1e-5)
    with torch.no_grad():
        logits = model(values).logits
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, rtol=1e-4, atol=1e-4)
    scores = {entry["label"]: entry["score"] for entry in found["pipeline"]}
    torch.testing.assert_close(torch.tensor([scores[x] for x in LABELS]), logits[0].softmax(0), rtol=1e-3, atol=1e-4)


def test_loaded_model_is_the_saved_one(saved, tmp_path):
    model, folder = saved
    loaded = load_image_classifier(folder)
    assert not loaded.training
    assert torch.equal(loaded(_images()).logits, model(_images()).logits)
    assert loaded.config.id2label == model.config.id2label
    save_image_classifier(loaded, tmp_path)
    assert _files(tmp_path) == _files(folder)


def test_files_are_those_of_save_pretrained(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path)
    assert _files(tmp_path) == _files(folder)


@pytest.mark.parametrize("form", ["channels_last", "compiled", "compiled inside", "parallel"])
def test_form_of_the_model_leaves_no_trace_in_the_files(form, tmp_path):
    model = _with_statistics(_create())
    save_image_classifier(model, tmp_path / "plain")
    wrapped = model
    if form == "channels_last":
        wrapped = model.to(memory_format=torch.channels_last)
        assert not model.timm_model.group1[0].conv1.weight.is_contiguous()
    elif form == "compiled":
        wrapped = torch.compile(model, backend="eager")
    elif form == "compiled inside":
        model.timm_model = torch.compile(model.timm_model, backend="eager")
    else:
        wrapped = torch.nn.DataParallel(torch.compile(model, backend="eager"))
    save_image_classifier(wrapped, tmp_path / "other")
    assert _files(tmp_path / "other") == _files(tmp_path / "plain")


def test_model_built_by_transformers_alone_is_saved_in_the_same_form(tmp_path):
    config = TimmWrapperConfig(architecture="test_densenet_cifar", num_labels=2, pretrained_cfg={})
    model = TimmWrapperForImageClassification(config).eval()
    save_image_classifier(model, tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(network(_images()), model(_images()).logits)


def takes_any_file_for_weights(tmp_path: Path) -> bool:
    folder = tmp_path / "two_files"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "training_args.bin").write_bytes(b"no weights")
    try:
        return set(load_state_dict_from_path(folder)) != {"a"}
    except Exception:
        return True


def test_trainer_checkpoint_is_such_a_folder(tmp_path):
    torch.manual_seed(0)
    model = _create()
    before = {key: value.clone() for key, value in model.timm_model.state_dict().items()}
    data = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(_images())]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(weights) == set(before)
    assert not torch.equal(weights["stem.weight"], before["stem.weight"])
    expected = model.eval()(_images()).logits
    assert torch.equal(load_image_classifier(tmp_path / "saved")(_images()).logits, expected)
    if takes_any_file_for_weights(tmp_path):
        pytest.skip("this timm takes the training_args.bin beside model.safetensors for the weights")
    network = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(network(_images()), expected)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(reloaded(_images()).logits, expected)


def test_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    save_image_classifier(_create(), tmp_path)
    before = _files(tmp_path)

    def torn(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(image_classifier, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        save_image_classifier(_create(), tmp_path)
    assert {name: _files(tmp_path)[name] for name in before} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "densenet90_60_cifer"},
            r"name='densenet90_60_cifer'.*Near it: densenet90_60_cifar.*timm.list_models",
        ),
        ({"name": "qqqq"}, r"name='qqqq' is not an architecture that timm [\d.]+ knows .*timm.list_models\(\) all"),
        ({"name": "resnet18.a1_in1k"}, "a tag, after a dot, would name trained weights.*Near it: resnet18"),
        ({"labels": ["one"]}, r"labels=\['one'\] has 1 classes; a classifier needs 2 or more"),
        ({"labels": ["a", "b", "a"]}, r"repeats \['a'\]; give every class a name of its own"),
        ({"labels": "cats"}, "labels='cats' should be a list of strings, one per class"),
        ({"labels": [0, 1]}, r"labels=\[0, 1\] should be a list of strings.*convert them with str"),
        ({"mean": (0.5, 0.5)}, r"mean=\[0.5, 0.5\] has 2 numbers and the network takes 3 channels; give one for each"),
        ({"std": (0.5,)}, r"std=\[0.5\] has 1 numbers and the network takes 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, r"std=\[0.5, 0.0, 0.5\] divides the pixels; give numbers above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, r"mean=\[0.5, nan, 0.5\] is not finite; compute it"),
        ({"num_classes": 3}, r"model_args=\['num_classes'\] are set by create_image_classifier.*leave them out"),
        ({"pretrained": True}, r"model_args=\['pretrained'\] are set by create_image_classifier"),
        ({"drop_rate": np.float32(0.1)}, "go into config.json; give what JSON can hold"),
    ],
)
def test_create_refuses(arguments, message):
    arguments = {"name": "test_wide_resnet_cifar", "labels": LABELS, "mean": MEAN, "std": STD, **arguments}
    with pytest.raises(ValueError, match=message):
        create_image_classifier(arguments.pop("name"), **arguments)


def test_load_refuses_what_is_not_a_whole_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="path_or_repo='.*nowhere' is not a folder; give a folder with"):
        load_image_classifier(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json; give a folder that save_image_classifier"):
        load_image_classifier(tmp_path)
    model = _create()
    save_image_classifier(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.timm_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors; .*pytorch_model.bin\) are never loaded"):
        load_image_classifier(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "holds a model of type 'bert' .* not an image classifier around a timm network"),
        ({"num_classes": 0}, "holds a model of type 'timm_wrapper' with 0 classes"),
        ({"model_args": {"checkpoint_path": "/tmp/x.pth"}}, r"model_args \['checkpoint_path'\], which would bring in"),
        ({"model_args": {"pretrained": True}}, r"model_args \['pretrained'\], which would bring in other weights"),
        ({"label_names": ["a"]}, r"has label_names \['a'\] and num_classes 3, expected one name for each class"),
        ({"architecture": "test_densenet_cifer"}, "name='test_densenet_cifer' is not .*Near it: test_densenet_cifar"),
    ],
)
def test_load_refuses_another_model(changes, message, tmp_path):
    save_image_classifier(_create(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load_image_classifier(tmp_path)


def test_load_refuses_weights_with_a_part_missing_or_too_many(tmp_path):
    save_image_classifier(_create(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    part = {key: value for key, value in weights.items() if key != "norm.weight"}
    save_file(part, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights do not fit 'test_wide_resnet_cifar'; missing: \[.*norm.weight"):
        load_image_classifier(tmp_path)
    save_file({**weights, "extra": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected: \[.*extra"):
        load_image_classifier(tmp_path)


def test_save_refuses_what_is_no_such_model(tmp_path):
    with pytest.raises(ValueError, match="model=Linear is not a TimmWrapperForImageClassification; build it with"):
        save_image_classifier(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())
