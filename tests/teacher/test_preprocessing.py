"""A teacher is given the pixel values it was trained on, whatever its student's are, or nothing that is not known."""

import logging

import numpy as np
import pytest
import timm
import torch
import transformers
from helpers import arguments
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from born_again import BornAgainTrainer, LineageRunner, LineageSpec, create_image_classifier, load_generation
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.lineage.evaluation import evaluate_classifier
from born_again.metrics import classification_metrics
from born_again.models.image_classifier import save_image_classifier
from born_again.teacher.cache.outputs import network_sha256
from born_again.teacher.preprocessing import (
    Preprocessing,
    Renormalization,
    preprocessing_of_dataset,
    preprocessing_of_network,
    preprocessing_of_processor,
)

LABELS = ["a", "b", "c"]
OURS = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
THEIRS = (0.2, 0.5, 0.7), (0.11, 0.6, 0.33)
ROWS = 24
RENORMALIZED = "the batch is renormalised for the teacher"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def classifier(statistics=OURS, seed=1, name="test_wide_resnet_cifar", **model_args):
    """With BatchNorm as a training leaves it."""
    torch.manual_seed(seed)
    network = create_image_classifier(name, LABELS, *statistics, **model_args)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


def split(size=32):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (ROWS, size, size, 3), dtype=torch.uint8, generator=generator)
    return ImageSplit(pixels, torch.randint(3, (ROWS,), generator=generator))


def images(statistics=OURS, size=32, augment=False):
    return ImageDataset(split(size), *statistics, augment=augment, flip=True, seed=3)


def batch(statistics, size=32, augment=False):
    return images(statistics, size, augment).__getitems__(range(ROWS))


def trainer(folder, student, teacher, dataset=None, **options):
    changes = options.pop("changes", {})
    return BornAgainTrainer(
        student,
        arguments(folder, remove_unused_columns=False, learning_rate=0.01, max_steps=2, **changes),
        teacher=teacher,
        data_collator=collate_batch,
        train_dataset=images() if dataset is None else dataset,
        **options,
    )


def own_logits(network, statistics=THEIRS, **options):
    return network.eval()(batch(statistics, **options)["pixel_values"]).logits.detach()


def given(pixels):
    """Without labels."""
    return {"pixel_values": pixels["pixel_values"]}


@pytest.mark.parametrize("precision", ["autocast", "inference", "float32"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_its_logits_are_those_of_its_own_preprocessing(tmp_path, caplog, precision, channels_last):
    teacher = classifier(THEIRS)
    wanted, misfed = own_logits(teacher, augment=True), own_logits(teacher, OURS, augment=True)
    changes = {"teacher_precision": precision, "channels_last": channels_last}
    student = classifier(seed=2)
    trained = trainer(tmp_path, student, teacher, images(augment=True), changes=changes)
    found = trained.teacher(given(batch(OURS, augment=True)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (misfed - wanted).abs().max() > 0.05
    said = [record.getMessage() for record in caplog.records if RENORMALIZED in record.getMessage()]
    assert len(said) == 1
    assert "mean (0.2, 0.5, 0.7), std (0.11, 0.6, 0.33)" in said[0]
    assert "mean (0.49, 0.48, 0.45), std (0.25, 0.24, 0.26)" in said[0]
    trained.train()
    labels = batch(OURS)["labels"]
    own = (own_logits(teacher, augment=True).argmax(-1) == labels).double().mean().item()
    assert trained.teacher_train_metrics == {"accuracy": own, "samples": ROWS}


def test_a_little_is_a_difference_and_rounding_is_none(tmp_path, caplog):
    near = (OURS[0], (0.25, 0.24, 0.261))
    trained = trainer(tmp_path, classifier(seed=2), classifier(near))
    torch.testing.assert_close(trained.teacher(given(batch(OURS))), own_logits(classifier(near), near))
    assert not torch.equal(trained.teacher(given(batch(OURS))), own_logits(classifier(near), OURS))
    caplog.clear()
    rounded = (tuple(value + 2e-7 for value in OURS[0]), OURS[1])
    trained = trainer(tmp_path, classifier(seed=2), classifier(rounded))
    assert torch.equal(trained.teacher(given(batch(OURS))), own_logits(classifier(rounded), OURS))
    assert trained.teacher.facts.keys() == {"precision", "dtype", "compile"} and not caplog.records


def test_each_of_several_teachers_has_its_own(tmp_path):
    teachers = [classifier(THEIRS), classifier(OURS, 3), classifier((OURS[0], THEIRS[1]), 4)]
    each = [
        own_logits(teacher, statistics)
        for teacher, statistics in zip(teachers, (THEIRS, OURS, (OURS[0], THEIRS[1])), strict=True)
    ]
    trained = trainer(tmp_path, classifier(seed=2), teachers)
    mean = torch.stack(each).softmax(-1).mean(0)
    torch.testing.assert_close(trained.teacher(given(batch(OURS))).softmax(-1), mean, rtol=1e-4, atol=1e-5)


def test_a_student_is_trained_as_by_logits_of_the_own_preprocessing(tmp_path):
    """The whole way, to the weights; and through a cache, where other statistics are another teacher."""
    networks = {}
    for name in ("live", "memory"):
        student = classifier(seed=2).double()
        changes = {"teacher_cache": "off" if name == "live" else name}
        trained = trainer(tmp_path / name, student, classifier(THEIRS).double(), DoubleImages(), changes=changes)
        trained.train()
        networks[name] = torch.cat([part.flatten() for part in student.state_dict().values()])

    class Own(nn.Module):
        """Prepares its images itself, from pixels: the slow way."""

        def __init__(self):
            super().__init__()
            self.network = classifier(THEIRS).double()

        def forward(self, pixel_values):
            mean, std, own_mean, own_std = (
                torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (*OURS, *THEIRS)
            )
            return self.network((pixel_values * std + mean - own_mean) / own_std)

    student = classifier(seed=2).double()
    trainer(tmp_path / "own", student, Own(), DoubleImages()).train()
    wanted = torch.cat([part.flatten() for part in student.state_dict().values()])
    torch.testing.assert_close(networks["live"], wanted, rtol=0, atol=1e-9)
    assert torch.equal(networks["live"], networks["memory"])


class DoubleImages(ImageDataset):
    def __init__(self):
        super().__init__(split(), *OURS, augment=True, flip=True, seed=3)

    def __getitems__(self, indices):
        found = super().__getitems__(indices)
        return {**found, "pixel_values": found["pixel_values"].double()}


def test_a_cached_output_depends_on_what_was_done_to_the_pixels(tmp_path):
    same, other = (trainer(tmp_path, classifier(seed=2), classifier(each)).teacher.facts for each in (OURS, THEIRS))
    assert "pixels" not in same
    assert other["pixels"][0]["scale"] == pytest.approx([0.25 / 0.11, 0.24 / 0.6, 0.26 / 0.33])


PROCESSORS = {
    "vit": ("ViTImageProcessor", {}),
    "clip": ("CLIPImageProcessor", {}),
    "not normalised": ("ViTImageProcessor", {"do_normalize": False}),
    "not rescaled": ("ViTImageProcessor", {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3}),
    "another factor": ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}),
    "std twice": ("EfficientNetImageProcessor", {}),
    "offset": ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "blue first": ("MobileViTImageProcessor", {}),
    "blue first, normalised": ("PPLCNetImageProcessor", {}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_what_a_processor_does_is_known(case):
    """From the student's pixel values to those that the processor makes of the same image."""
    name, options = PROCESSORS[case]
    processor = getattr(transformers, name)(**options)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    plain = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    wanted = processor(images=[Image.fromarray(pixels)], **plain)["pixel_values"]
    known = preprocessing_of_processor(processor)
    ours = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    ours = (ours - torch.tensor(OURS[0])[:, None, None]) / torch.tensor(OURS[1])[:, None, None]
    change = Renormalization.between(Preprocessing(*OURS, "ours"), known)
    torch.testing.assert_close(change(ours), wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())
    back = Renormalization.between(known, Preprocessing(*OURS, "ours"))
    torch.testing.assert_close(back(wanted), ours, rtol=1e-4, atol=2e-5)
    assert Renormalization.between(known, preprocessing_of_processor(processor)) is None
    assert known.size == tuple(
        processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"].shape[2:]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_bgr", [False, True])
def test_renormalising_keeps_dtype_and_memory_format(dtype, is_bgr):
    change = Renormalization.between(Preprocessing(*OURS, "a"), Preprocessing(*THEIRS, "b", is_bgr=is_bgr))
    pixels = torch.randn(2, 3, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    found = change(pixels)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert change(pixels.contiguous()).is_contiguous()
    mean, std, own_mean, own_std = (torch.tensor(each)[:, None, None].double() for each in (*OURS, *THEIRS))
    plain = pixels.double() * std + mean
    wanted = ((plain.flip(1) if is_bgr else plain) - own_mean) / own_std
    torch.testing.assert_close(found, wanted.to(dtype))
    with pytest.raises(ValueError, match=r"pixel_values: got shape \(2, 1, 8, 8\), expected 3 channels"):
        change(torch.randn(2, 1, 8, 8))


def vit(folder=None, processor=None):
    torch.manual_seed(4)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    config.num_labels = 3
    network = ViTForImageClassification(config).eval()
    network.config.id2label = dict(enumerate(LABELS))
    if folder is not None:
        network.save_pretrained(folder)
        processor.save_pretrained(folder)
        network = ViTForImageClassification.from_pretrained(folder).eval()
    return network


def vit_processor(statistics=THEIRS):
    size = {"height": 32, "width": 32}
    return transformers.ViTImageProcessor(image_mean=statistics[0], image_std=statistics[1], size=size)


@pytest.mark.parametrize("how", ["argument", "list", "folder"])
def test_a_teacher_of_transformers_is_known_by_its_processor(tmp_path, how):
    teacher = vit(tmp_path / "vit", vit_processor()) if how == "folder" else vit()
    options = {"argument": vit_processor(), "list": [vit_processor()], "folder": None}[how]
    trained = trainer(tmp_path / "out", classifier(seed=2), teacher, teacher_processing_class=options)
    torch.testing.assert_close(trained.teacher(given(batch(OURS))), own_logits(teacher), rtol=1e-4, atol=1e-5)


def test_where_only_one_side_is_known_what_is_assumed_is_said(tmp_path, caplog):
    trained = trainer(tmp_path, classifier(seed=2), vit())
    assert torch.equal(trained.teacher(given(batch(OURS))), own_logits(vit(), OURS))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "The student's pixel values have mean (0.49, 0.48, 0.45)" in said and "teacher_processing_class" in said
    assert "which the teacher was trained on is not known, so it is given the student's as they are" in said
    caplog.clear()
    trained = trainer(tmp_path, vit(), classifier(THEIRS), Plain())
    assert torch.equal(trained.teacher(given(batch(OURS))), own_logits(classifier(THEIRS), OURS))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "The teacher's pixel values have mean (0.2, 0.5, 0.7)" in said and "as processing_class" in said
    assert "which the training set has is not known, so the teacher is given them as they are" in said


def test_nothing_is_said_where_nothing_is_known(tmp_path, caplog):
    network = timm.create_model("test_wide_resnet_cifar", num_classes=3)  # has timm's default
    for teacher in (vit(), network):
        trainer(tmp_path, vit(), teacher, Plain())
    assert not caplog.records


def test_a_list_of_processors_has_one_for_each_teacher(tmp_path):
    with pytest.raises(ValueError, match="teacher_processing_class: got a list of 2 for 1 teachers, expected one for"):
        trainer(tmp_path, classifier(seed=2), vit(), teacher_processing_class=[None, None])


def test_the_default_of_a_timm_network_is_not_taken_for_its_statistics(tmp_path, caplog):
    torch.manual_seed(3)
    network = timm.create_model("test_wide_resnet_cifar", num_classes=3).eval()
    inputs = given(batch(OURS))
    trained = trainer(tmp_path, classifier(seed=2), network)
    assert torch.equal(trained.teacher(inputs), network(inputs["pixel_values"]))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "timm's default for test_wide_resnet_cifar" in said and "not known" in said
    assert "set 'mean' and 'std' in its pretrained_cfg" in said
    caplog.clear()
    network.pretrained_cfg.update(mean=OURS[0], std=OURS[1])
    assert torch.equal(trainer(tmp_path, classifier(seed=2), network).teacher(inputs), trained.teacher(inputs))
    assert not caplog.records
    network.pretrained_cfg.update(mean=THEIRS[0], std=THEIRS[1])
    trained = trainer(tmp_path, classifier(seed=2), network)
    torch.testing.assert_close(trained.teacher(inputs), network(batch(THEIRS)["pixel_values"]), rtol=1e-4, atol=1e-5)


def test_a_timm_network_read_from_a_folder_has_the_statistics_of_the_folder(tmp_path):
    save_image_classifier(classifier(THEIRS), tmp_path / "gen0")
    network = timm.create_model(f"local-dir:{tmp_path / 'gen0'}", pretrained=True).eval()
    trained = trainer(tmp_path, classifier(seed=2), network)
    torch.testing.assert_close(
        trained.teacher(given(batch(OURS))), own_logits(classifier(THEIRS)), rtol=1e-4, atol=1e-5
    )


class Plain(Dataset):
    """Samples prepared by someone, who does not say how."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return images()[index]


def test_a_student_made_for_statistics_says_what_its_pixels_are(tmp_path):
    trained = trainer(tmp_path, classifier(seed=2), classifier(THEIRS), Plain())
    torch.testing.assert_close(
        trained.teacher(given(batch(OURS))), own_logits(classifier(THEIRS)), rtol=1e-4, atol=1e-4
    )


def test_a_loaded_student_does_not_unless_its_processor_is_given(tmp_path, caplog):
    """Its training set may be prepared for it or for its teacher."""
    save_image_classifier(classifier(seed=2), tmp_path / "student")
    teacher = classifier(THEIRS)
    trained = trainer(tmp_path, load_generation(tmp_path / "student"), teacher, Plain())
    assert torch.equal(trained.teacher(given(batch(OURS))), own_logits(teacher, OURS))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "Which of the two the training set was prepared with is not known" in said and "processing_class" in said
    caplog.clear()
    for processor, statistics in ((tmp_path / "student", OURS), (vit_processor(), THEIRS)):
        if not isinstance(processor, transformers.ViTImageProcessor):
            processor = AutoImageProcessor.from_pretrained(processor)
        student = load_generation(tmp_path / "student")
        trained = trainer(tmp_path, student, teacher, Plain(), processing_class=processor)
        found = trained.teacher(given(batch(statistics)))
        torch.testing.assert_close(found, own_logits(teacher), rtol=1e-4, atol=1e-4)
    assert sum(RENORMALIZED in record.getMessage() for record in caplog.records) == 1


def test_a_dataset_says_what_its_pixels_are():
    class Folder(Plain):
        transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*THEIRS)])

    assert preprocessing_of_dataset(Folder()).mean == THEIRS[0]
    assert preprocessing_of_dataset(Subset(Folder(), [0, 1])).std == THEIRS[1]
    assert preprocessing_of_dataset(Subset(images(), [0])).mean == OURS[0]
    assert preprocessing_of_dataset(Plain()) is None and preprocessing_of_dataset(None) is None
    Folder.transform = v2.Normalize([125.3] * 3, [63.0] * 3)  # of pixels up to 255
    assert preprocessing_of_dataset(Folder()) is None


def test_another_number_of_channels_is_refused_before_anything_changes(tmp_path):
    student, teacher = classifier(seed=2), classifier(((0.1,) * 4, (0.3,) * 4), in_chans=4)
    with pytest.raises(ValueError, match=r"teacher: takes images of 4 channels with mean \(0.1, 0.1, 0.1, 0.1\).* 3,"):
        trainer(tmp_path, student, teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("precision", ["autocast", "inference"])
def test_a_size_that_a_teacher_does_not_take_is_refused_with_both(tmp_path, precision):
    torch.manual_seed(1)
    teacher = create_image_classifier("test_vit", LABELS, *OURS, dynamic_img_size=False)
    height = teacher.config.pretrained_cfg["input_size"][1]
    trained = trainer(tmp_path, classifier(seed=2), teacher, changes={"teacher_precision": precision})
    message = (
        f"teacher: was trained on images of {height}x{height} pixels and is given pixel_values of 32x32, and does"
    )
    with pytest.raises(ValueError, match=message):
        trained.train()
    assert trained.state.global_step == 0


def test_a_size_that_a_teacher_takes_but_was_not_trained_on_is_warned_of_once(tmp_path, caplog):
    teacher = classifier()
    teacher.config.pretrained_cfg.update(input_size=[3, 48, 48], test_input_size=[3, 64, 64])
    trainer(tmp_path, classifier(seed=2), teacher).train()
    said = [record.getMessage() for record in caplog.records if "which it was not trained on" in record.getMessage()]
    assert len(said) == 1 and "48x48" in said[0] and "32x32" in said[0]
    caplog.clear()
    teacher.config.pretrained_cfg["test_input_size"] = [3, 32, 32]
    trainer(tmp_path, classifier(seed=2), teacher).train()
    assert not [record for record in caplog.records if "not trained on" in record.getMessage()]


def test_a_teacher_and_a_student_of_one_size_are_not_warned_of(tmp_path, caplog):
    """A generation and the next: what their configs have may be timm's default."""
    teacher, student = classifier(), classifier(seed=2)
    for network in (teacher, student):
        network.config.pretrained_cfg.update(input_size=[3, 224, 224])
    trainer(tmp_path, student, teacher).train()
    assert not [record for record in caplog.records if "not trained on" in record.getMessage()]


def test_a_config_that_does_not_say_what_a_model_is_trained_on_is_warned_of(tmp_path, caplog):
    trained = trainer(tmp_path, classifier(THEIRS), None)
    trained.train()
    (said,) = [record.getMessage() for record in caplog.records if "who loads it" in record.getMessage()]
    assert "mean (0.49, 0.48, 0.45)" in said and "mean (0.2, 0.5, 0.7)" in said
    caplog.clear()
    trainer(tmp_path, classifier(OURS), None).train()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_classifier_is_measured_on_its_own_pixel_values():
    network = classifier(THEIRS)
    own = evaluate_classifier(network, images(THEIRS), collate_batch)
    assert evaluate_classifier(network, images(OURS), collate_batch) == pytest.approx(own, rel=1e-4)
    network.config.pretrained_cfg.update(mean=OURS[0], std=OURS[1])
    assert evaluate_classifier(network, images(OURS), collate_batch)["nll"] != pytest.approx(own["nll"], rel=1e-2)


@pytest.mark.parametrize("splits", [False, True])
def test_a_runner_does_not_measure_a_teacher_on_pixel_values_of_others(tmp_path, splits):
    """Without an `evaluate` it is the trainer that measures, on its own evaluation set."""

    def run(folder, statistics):
        def build_trainer(student, teacher, generation):
            return trainer(
                generation.checkpoint_dir,
                student,
                teacher,
                eval_dataset={"validation": images(), "test": images()} if splits else images(),
                changes={"seed": generation.seed, "objective": "ban", "batch_eval_metrics": True},
                compute_metrics=classification_metrics(),
            )

        asked = LineageSpec(
            name="tiny", model="m", dataset="d", generations=1, objective="ban", seed=1, teacher="elsewhere"
        )
        LineageRunner(
            asked,
            folder,
            build_student=lambda generation: classifier(seed=2),
            build_trainer=build_trainer,
            load_teacher=load_generation,
            save_student=save_image_classifier,
            take_teacher=lambda: classifier(statistics),
        ).run()

    run(tmp_path / "same", OURS)
    with pytest.raises(ValueError, match=r"teacher: its pixel values have mean \(0.2, .*measure it on mean \(0.49, "):
        run(tmp_path / "other", THEIRS)
    assert (tmp_path / "same" / "gen1").is_dir() and not (tmp_path / "other" / "gen0").exists()


def test_a_network_says_its_statistics_and_its_hash_has_them():
    known = preprocessing_of_network(classifier(THEIRS))
    assert (known.mean, known.std, known.size, known.is_certain) == (*THEIRS, (32, 32), True)
    assert preprocessing_of_network(nn.DataParallel(classifier(THEIRS))) == known
    assert preprocessing_of_network(nn.Linear(2, 2)) is None
    assert network_sha256(classifier(THEIRS)) != network_sha256(classifier(OURS))
