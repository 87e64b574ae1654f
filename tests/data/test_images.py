"""Reading image datasets: columns, splits, labels, formats, limits, and what is said when something is amiss."""

import io
import json
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from born_again.data import decode
from born_again.data.images import channel_statistics, load_images, stratified_order

SIZE = 32
PINNED = [2, 3, 0, 5, 4, 1]
DIGITS_SHA256 = "952f36fa2e10d32df84bac83f7544cf1698b658fb2bd76f9fb3c33573a3eb88a"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def random_array(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG") -> dict:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(seeds, labels, image="image", label="label") -> dict:
    return {image: [encoded(random_array(seed)) for seed in seeds], label: list(labels)}


def write_parquet(folder, splits: dict[str, dict], features: dict):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        dataset.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return str(folder)


CLASSES = datasets.ClassLabel(names=["cat", "dog", "eel"])
PLAIN = {"image": datasets.Image(), "label": CLASSES}


def pairs_of(split):
    return zip(split.pixels, split.labels, strict=True)


@pytest.fixture
def plain(tmp_path):
    """A folder of 6 training and 3 test images in the Hub's layout."""
    splits = {"train": rows_of(range(6), [0, 1, 2, 0, 1, 2]), "test": rows_of(range(6, 9), [2, 1, 0])}
    return write_parquet(tmp_path / "plain", splits, PLAIN)


def test_folder_of_parquet(plain):
    data = load_images(plain)
    assert data.train.pixels.shape == (6, 32, 32, 3) and data.train.pixels.dtype == torch.uint8
    assert data.train.pixels.is_contiguous()
    assert np.array_equal(data.train.pixels.numpy(), np.stack([random_array(seed) for seed in range(6)]))
    assert np.array_equal(data.test.pixels.numpy(), np.stack([random_array(seed) for seed in range(6, 9)]))
    assert data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.labels.tolist() == [2, 1, 0]
    assert data.label_names == ("cat", "dog", "eel")
    assert data.flip is True
    assert len(data.train) == 6


def test_fingerprint_is_json_and_follows_the_content(plain, tmp_path):
    fingerprint = load_images(plain).fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint.keys() == {"source", "revision", "image_column", "label_column", "rows", "sha256"}
    assert fingerprint["source"] == plain and fingerprint["revision"] is None
    assert (fingerprint["image_column"], fingerprint["label_column"]) == ("image", "label")
    assert fingerprint["rows"] == {"train": 6, "test": 3}
    assert load_images(plain).fingerprint == fingerprint
    splits = {"train": rows_of(range(6), [0, 1, 2, 0, 1, 2]), "test": rows_of(range(6, 9), [2, 1, 1])}
    other = write_parquet(tmp_path / "other", splits, PLAIN)
    assert load_images(other).fingerprint["sha256"] != fingerprint["sha256"]


def test_statistics_equal_a_plain_computation(plain):
    data = load_images(plain)
    values = data.train.pixels.double().reshape(-1, 3) / 255
    assert data.mean == tuple(round(mean, 6) for mean in values.mean(0).tolist())
    assert data.std == tuple(round(std, 6) for std in values.std(0, correction=0).tolist())


def test_statistics_over_several_chunks_and_of_a_constant_channel():
    pixels = torch.randint(0, 256, (5000, 3, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[..., 1] = 51
    mean, std = channel_statistics(pixels)
    expected = pixels.double().reshape(-1, 3) / 255
    assert mean == tuple(round(value, 6) for value in expected.mean(0).tolist())
    assert std[0] == round(float(expected[:, 0].std(correction=0)), 6)
    assert (mean[1], std[1]) == (0.2, 1.0)


def test_imagefolder_with_validation_split(tmp_path, caplog):
    caplog.set_level("INFO")
    for split, classes in {"train": {"owl": 3, "bee": 2}, "validation": {"owl": 1, "bee": 1}}.items():
        for name, count in classes.items():
            folder = tmp_path / "birds" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random_array(number)).save(folder / f"{number}.png")
    data = load_images(str(tmp_path / "birds"))
    assert data.label_names == ("bee", "owl")
    assert "there is no split 'test', so 'validation' is what is tested on" in caplog.text
    assert sorted(data.train.labels.tolist()) == [0, 0, 1, 1, 1]
    assert data.fingerprint["rows"] == {"train": 5, "test": 2}
    assert data.fingerprint["test_split"] == "validation"
    owl = data.train.pixels[data.train.labels == 1][0]
    assert np.array_equal(owl.numpy(), random_array(0))


@pytest.mark.parametrize("classes", [("bus", "train"), ("test_positive", "test_negative"), ("crash-test", "road")])
def test_classes_named_as_splits_are_refused_where_a_file_would_be_in_two(tmp_path, classes):
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for copy in range(2):
                Image.fromarray(random_array(10 * number + copy)).save(folder / f"{copy}.png")
    with pytest.raises(ValueError, match="would be in the splits .* expected class folders without such words"):
        load_images(str(tmp_path / "set"))


def test_folder_of_save_to_disk(tmp_path):
    features = datasets.Features(PLAIN)
    splits = {"train": rows_of(range(2), [0, 1]), "test": rows_of([2], [1])}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows, features) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    data = load_images(str(tmp_path / "saved"))
    assert np.array_equal(data.train.pixels[1].numpy(), random_array(1))
    assert data.test.labels.tolist() == [1]


def test_other_modes_become_rgb_and_other_sizes_are_resized(tmp_path, caplog):
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8))
    palette = Image.fromarray(random_array(1)).quantize(16)
    clear = Image.fromarray(rng.integers(0, 256, (32, 32, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (32, 32), dtype=np.uint16))
    wide = Image.fromarray(rng.integers(0, 256, (20, 50, 3), dtype=np.uint8))
    images = [grey, palette, clear, deep, wide]
    splits = {
        "train": {"image": [encoded(image) for image in images], "label": [0, 1, 2, 0, 1]},
        "test": rows_of([0], [0]),
    }
    pixels = load_images(write_parquet(tmp_path / "modes", splits, PLAIN)).train.pixels.numpy()
    assert np.array_equal(pixels[0], np.asarray(grey)[..., None].repeat(3, axis=2))
    assert np.array_equal(pixels[1], np.asarray(palette.convert("RGB")))
    alpha = np.asarray(clear)[..., 3:] / 255
    np.testing.assert_allclose(pixels[2], np.asarray(clear)[..., :3] * alpha + 255 * (1 - alpha), atol=1)
    assert np.array_equal(pixels[3], (np.asarray(deep) // 256).astype(np.uint8)[..., None].repeat(3, axis=2))
    assert np.array_equal(pixels[4], np.asarray(wide.resize((32, 32), Image.Resampling.BILINEAR)))
    assert "1 of 5 images in split 'train' are transparent, and blended with white; the pipelines" in caplog.text
    said = "1 of 5 images in split 'train' are of more than 8 bits, scaled so that 65535 is white; their largest value"
    assert f"{said} is {np.asarray(deep).max()}, so 256 of 256 levels are used; the pipelines" in caplog.text


def test_12_bits_in_files_of_16_are_told_by_their_largest_value(tmp_path, caplog):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4_096, (4, 32, 32), dtype=np.uint16)
    values[2, 0, 0] = 4_095
    rows = {"image": [encoded(Image.fromarray(one)) for one in values], "label": [0, 1, 0, 1]}
    load_images(write_parquet(tmp_path / "scans", {"train": rows, "test": rows_of([0], [0])}, PLAIN))
    said = "their largest value is 4095, so 16 of 256 levels are used (if they use fewer bits, save them so that"
    assert f"{said} 65535 is white)" in caplog.text


def test_image_size(plain):
    data = load_images(plain, image_size=16)
    expected = Image.fromarray(random_array(0)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train.pixels[0].numpy(), np.asarray(expected))


def test_columns_of_cifar100_and_by_flag(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = {
        "img": [encoded(random_array(seed)) for seed in range(4)],
        "fine_label": [0, 1, 2, 0],
        "coarse_label": [0, 1, 1, 0],
    }
    features = {
        "img": datasets.Image(),
        "fine_label": CLASSES,
        "coarse_label": datasets.ClassLabel(names=["warm", "cold"]),
    }
    folder = write_parquet(tmp_path / "two", {"train": rows, "test": rows}, features)
    assert load_images(folder).fingerprint["label_column"] == "fine_label"
    coarse = load_images(folder, label_column="coarse_label", image_column="img")
    assert coarse.label_names == ("warm", "cold")
    assert coarse.train.labels.tolist() == [0, 1, 1, 0]
    (said,) = [message for message in caplog.messages if "label column" in message]  # not where it was asked for
    assert (
        "label column 'fine_label' is taken, of ['fine_label', 'coarse_label']; --label_column takes another" in said
    )


def test_labels_of_strings_and_integers(tmp_path):
    images = [encoded(random_array(seed)) for seed in range(4)]
    words = {"image": images, "labels": ["pear", "apple", "pear", "fig"]}
    features = {"image": datasets.Image(), "labels": datasets.Value("string")}
    data = load_images(write_parquet(tmp_path / "words", {"train": words, "test": words}, features))
    assert data.label_names == ("apple", "fig", "pear")
    assert data.train.labels.tolist() == [2, 0, 2, 1]
    numbers = {"image": images, "digit": [10, 3, 3, 7]}
    features = {"image": datasets.Image(), "digit": datasets.Value("int32")}
    folder = write_parquet(tmp_path / "numbers", {"train": numbers, "test": numbers}, features)
    data = load_images(folder, label_column="digit")
    assert data.label_names == ("3", "7", "10")
    assert data.train.labels.tolist() == [2, 0, 0, 1]
    with pytest.raises(ValueError, match=r"no label column, only image \(Image\), digit \(int32\).*--label_column"):
        load_images(folder)


def test_limits_keep_a_fixed_stratified_part(tmp_path):
    splits = {"train": rows_of(range(12), [0, 1, 2] * 4), "test": rows_of(range(12, 18), [0, 1, 2] * 2)}
    folder = write_parquet(tmp_path / "twelve", splits, PLAIN)
    whole = load_images(folder)
    part = load_images(folder, max_train_samples=6, max_eval_samples=3)
    assert part.fingerprint["rows"] == {"train": 6, "test": 3}
    assert sorted(part.train.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert sorted(part.test.labels.tolist()) == [0, 1, 2]
    label_of = {image.numpy().tobytes(): int(label) for image, label in pairs_of(whole.train)}
    for image, label in pairs_of(part.train):
        assert label_of[image.numpy().tobytes()] == label
    again = load_images(folder, max_train_samples=6, max_eval_samples=3)
    assert again.fingerprint == part.fingerprint
    few = load_images(folder, max_train_samples=2)
    assert few.label_names == ("cat", "dog", "eel")
    assert {image.numpy().tobytes() for image in few.train.pixels} <= {i.numpy().tobytes() for i in part.train.pixels}
    assert load_images(folder, max_train_samples=99).fingerprint == whole.fingerprint


def test_stratified_order_is_a_fixed_permutation():
    labels = np.random.default_rng(0).choice(4, size=1000, p=[0.4, 0.3, 0.2, 0.1])
    order = stratified_order(labels)
    assert sorted(order.tolist()) == list(range(1000))
    for length in (10, 100, 500):
        shares = np.bincount(labels[order[:length]], minlength=4) / length
        np.testing.assert_allclose(shares, np.bincount(labels) / 1000, atol=2 / length)
    assert order.tolist() != sorted(order.tolist())
    # The subsets of published runs depend on it.
    assert stratified_order(np.array([0, 1, 0, 1, 0, 1])).tolist() == PINNED


def test_digits_to_test_on():
    data = load_images("digits", image_size=16, test_samples=1197)
    assert (len(data.train), len(data.test)) == (600, 1197)
    shares = torch.bincount(data.train.labels) / 600
    torch.testing.assert_close(shares, torch.bincount(load_images("digits").train.labels) / 1438, rtol=0, atol=2 / 600)
    for count in (9, 1788):
        with pytest.raises(ValueError, match=f"--test_samples is {count}; expected 10 ... 1787 of the 1,797 digits"):
            load_images("digits", test_samples=count)
    with pytest.raises(ValueError, match="--test_samples is 20 with --dataset cifar10, .*: leave it out"):
        load_images("cifar10", test_samples=20)


def test_digits():
    data = load_images("digits")
    assert data.train.pixels.shape == (1438, 32, 32, 3)
    assert data.test.pixels.shape == (359, 32, 32, 3)
    assert data.label_names == tuple("0123456789")
    assert data.flip is False
    assert data.fingerprint["source"] == "digits"
    both = torch.bincount(data.train.labels) + torch.bincount(data.test.labels)
    assert both.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    shares = torch.bincount(data.test.labels) / both
    assert float(shares.min()) > 0.19 and float(shares.max()) < 0.21
    # Every 8x8 pixel is a block of 4x4, grey, from 0 to 255.
    small = data.train.pixels[:, ::4, ::4]
    assert torch.equal(small.repeat_interleave(4, 1).repeat_interleave(4, 2), data.train.pixels)
    assert torch.equal(data.train.pixels[..., 0], data.train.pixels[..., 2])
    assert int(data.train.pixels.max()) == 255 and int(data.train.pixels.min()) == 0
    # No image in both splits, and the very same split in every run.
    assert data.fingerprint["sha256"] == DIGITS_SHA256


def test_digits_limited_and_of_another_size():
    data = load_images("digits", image_size=20, max_train_samples=50, max_eval_samples=10)
    assert data.train.pixels.shape == (50, 20, 20, 3)
    assert torch.bincount(data.test.labels).tolist() == [1] * 10
    assert data.train.pixels.is_contiguous()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_images("digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifra10"}, r"--dataset 'cifra10' is unknown; did you mean 'cifar10'.*digits, cifar10, cifar100"),
        ({"name": "mnist-of-mine"}, "--dataset 'mnist-of-mine' is unknown; expected one of digits"),
        ({"name": "./nowhere/cifar"}, "'./nowhere/cifar' looks like a folder and does not exist; check the path"),
        ({"name": "/no/such/folder"}, "'/no/such/folder' looks like a folder and does not exist"),
        ({"name": "digits", "image_size": 4}, "image_size is 4; expected at least 8"),
        ({"name": "digits", "max_train_samples": 0}, "--max_train_samples is 0; expected at least 1"),
        ({"name": "digits", "max_eval_samples": -5}, "--max_eval_samples is -5; expected at least 1"),
        ({"name": "digits", "revision": "v1"}, "revision is 'v1' with --dataset digits.*drop it"),
        ({"name": "digits", "label_column": "y"}, "label_column is 'y' with --dataset digits"),
    ],
)
def test_arguments_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(**arguments)


def test_folders_refused(tmp_path, plain):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder in which `datasets` finds no data.*expected parquet files or images"):
        load_images(str(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="broken' is refused by `datasets` .*expected readable files"):
        load_images(str(tmp_path / "broken"))
    with pytest.raises(ValueError, match="revision is 'v2' for the folder .*only a dataset on the Hub has revisions"):
        load_images(plain, revision="v2")
    with pytest.raises(ValueError, match=r"--image_column is 'photo'.*image columns are \['image'\]"):
        load_images(plain, image_column="photo")
    with pytest.raises(ValueError, match=r"--label_column is 'image'.*\['label'\] can hold labels"):
        load_images(plain, label_column="image")


def test_columns_refused(tmp_path):
    texts = {"text": ["a", "b"], "label": [0, 1]}
    features = {"text": datasets.Value("string"), "label": CLASSES}
    folder = write_parquet(tmp_path / "texts", {"train": texts, "test": texts}, features)
    with pytest.raises(ValueError, match=r"no image column, only text \(string\), label \(ClassLabel\); expected"):
        load_images(folder)
    images = [encoded(random_array(seed)) for seed in range(2)]
    rows = {"left": images, "right": images, "kind": [0, 1], "place": [1, 0]}
    features = {"left": datasets.Image(), "right": datasets.Image(), "kind": CLASSES, "place": CLASSES}
    folder = write_parquet(tmp_path / "stereo", {"train": rows, "test": rows}, features)
    with pytest.raises(ValueError, match=r"several image columns, \['left', 'right'\].*--image_column"):
        load_images(folder)
    with pytest.raises(ValueError, match=r"several label columns, \['kind', 'place'\].*--label_column"):
        load_images(folder, image_column="left")
    assert load_images(folder, image_column="left", label_column="place").train.labels.tolist() == [1, 0]


def test_splits_without_rows_are_refused(tmp_path):
    rows, none = rows_of(range(2), [0, 1]), {"image": [], "label": []}
    features = datasets.Features(PLAIN)
    full, hollow = datasets.Dataset.from_dict(rows, features), datasets.Dataset.from_dict(none, features)
    with pytest.raises(ValueError, match="split 'test' is empty; expected at least one row"):
        decode.choose_splits("hollow", {"train": full, "test": hollow})
    try:
        folder = write_parquet(tmp_path / "hollow", {"train": rows, "test": none}, PLAIN)
        datasets.DatasetDict({"train": full, "test": hollow}).save_to_disk(str(tmp_path / "saved"))
    except ZeroDivisionError:
        pytest.skip("this datasets writes no file without rows")
    with pytest.raises(ValueError, match='hollow.* is refused by `datasets` .*"test".* no empty split'):
        load_images(folder)
    with pytest.raises(ValueError, match="saved' is refused by `datasets` .* no empty split"):
        load_images(str(tmp_path / "saved"))


def test_splits_refused(tmp_path):
    rows = rows_of(range(2), [0, 1])
    folder = write_parquet(tmp_path / "alone", {"train": rows}, PLAIN)
    with pytest.raises(ValueError, match="has the splits train; expected a test split, one of test, validation"):
        load_images(folder)
    folder = write_parquet(tmp_path / "tests", {"test": rows}, PLAIN)
    with pytest.raises(ValueError, match="has the splits test; expected one called 'train'"):
        load_images(folder)


def test_labels_refused(tmp_path):
    rows = rows_of(range(2), [0, 1])
    folder = write_parquet(tmp_path / "one", {"train": rows_of(range(2), [1, 1]), "test": rows}, PLAIN)
    with pytest.raises(ValueError, match="every training row is of one class in column 'label'; expected at least 2"):
        load_images(folder)
    for number, hidden in enumerate((-1, None)):
        splits = {"train": rows, "test": rows_of(range(2), [0, hidden])}
        folder = write_parquet(tmp_path / f"hidden{number}", splits, PLAIN)
        with pytest.raises(ValueError, match="1 of 2 rows of split 'test' have no label in column 'label'"):
            load_images(folder)
    splits = {"train": datasets.Dataset.from_dict(rows, datasets.Features(PLAIN))}
    other = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat", "eel"])}
    splits["test"] = datasets.Dataset.from_dict(rows, datasets.Features(other))
    with pytest.raises(ValueError, match="column 'label' is ClassLabel.* in split 'test' .*the same class names"):
        decode.read_labels("mixed", splits, "label")


@pytest.mark.parametrize("limit", [None, 3])
def test_corrupt_image_is_named(tmp_path, limit):
    rows = rows_of(range(4), [0, 1, 0, 1])
    broken = 2 if limit is None else int(np.sort(stratified_order(np.array([0, 1, 0, 1]))[:limit])[-1])
    rows["image"][broken] = {"bytes": rows["image"][broken]["bytes"][:200], "path": None}
    folder = write_parquet(tmp_path / "corrupt", {"train": rows, "test": rows_of([1], [1])}, PLAIN)
    with pytest.raises(ValueError, match=f"image in split 'train', row {broken}, cannot be decoded.*replace the file"):
        load_images(folder, max_train_samples=limit)


def write_folder(folder, splits: dict[str, dict[str, list]]):
    """Images in SPLIT/CLASS/NUMBER.png."""
    for split, classes in splits.items():
        for name, images in classes.items():
            (folder / split / name).mkdir(parents=True)
            for number, image in enumerate(images):
                image = image if isinstance(image, Image.Image) else Image.fromarray(image)
                image.save(folder / split / name / f"{number}.png")
    return str(folder)


def two_classes(first="cat", second="dog"):
    return {first: [random_array(0), random_array(1)], second: [random_array(2), random_array(3)]}


def test_corrupt_file_is_named_by_its_path(tmp_path):
    folder = write_folder(tmp_path / "pets", {"train": two_classes(), "test": two_classes()})
    path = tmp_path / "pets" / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"split 'train', row 3 \(.*/train/dog/1.png\), cannot be decoded"):
        load_images(folder)


def test_what_a_plugin_of_pillow_raises_names_the_image(plain, monkeypatch):
    def broken(item, feature, size):
        raise KeyError("an unknown tag")

    monkeypatch.setattr(decode, "read_image", broken)
    with pytest.raises(ValueError, match="split 'train', row 0, cannot be decoded .*an unknown tag"):
        load_images(plain)


def test_turned_photographs_of_a_folder_are_upright(tmp_path):
    upright = np.zeros((32, 32, 3), dtype=np.uint8)
    upright[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees counterclockwise
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    folder = write_folder(tmp_path / "photos", {"train": two_classes(), "test": two_classes()})
    stored.save(tmp_path / "photos" / "train" / "cat" / "0.png", exif=exif)
    shown = datasets.load_dataset(folder, split="train")[0]["image"]
    assert np.array_equal(load_images(folder).train.pixels[0].numpy(), upright)
    assert np.array_equal(np.asarray(shown), upright)


def test_a_class_that_is_tested_must_be_trained(tmp_path):
    splits = {"train": two_classes("Cat"), "test": two_classes("cat")}
    message = (
        "split 'test' has 2 rows of class 'cat', of which 'train' has none; it has classes 'Cat', 'dog'. .*capitals"
    )
    with pytest.raises(ValueError, match=message):
        load_images(write_folder(tmp_path / "pets", splits))
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    rows = {"train": rows_of(range(4), [1, 2, 1, 2]), "test": rows_of(range(4), [0, 1, 5, 5])}
    with pytest.raises(ValueError, match="split 'test' has 3 rows of classes '0', '5', .* it has classes '1', '2'"):
        load_images(write_parquet(tmp_path / "shifted", rows, features))


def test_a_class_that_is_not_tested_is_warned_of(tmp_path, caplog):
    splits = {"train": rows_of(range(3), [0, 1, 2]), "test": rows_of(range(2), [0, 2])}
    data = load_images(write_parquet(tmp_path / "untested", splits, PLAIN))
    assert data.label_names == ("cat", "dog", "eel")
    assert "split 'test' has no row of class 'dog', which 'train' has" in caplog.text


def test_classes_are_compared_before_limits(tmp_path, caplog):
    """Of a sample a rare class may be missing, which is no fault of the data."""
    splits = {"train": rows_of(range(7), [0, 0, 0, 0, 1, 1, 2]), "test": rows_of(range(3), [0, 1, 2])}
    folder = write_parquet(tmp_path / "rare", splits, PLAIN)
    data = load_images(folder, max_train_samples=2)
    assert 2 not in data.train.labels and 2 in data.test.labels
    assert "has no row of" not in caplog.text
    assert "--max_train_samples 2 leaves no training image of class 'eel', of which there may be" in caplog.text


def test_images_without_variation(tmp_path, caplog):
    white = np.full((32, 32, 4), 255, dtype=np.uint8)
    white[..., 3] = np.arange(32)
    splits = {"train": {"cat": [white] * 2, "dog": [white] * 2}, "test": two_classes()}
    with pytest.raises(ValueError, match="all 4 training images are the same.*blend them with another ground"):
        load_images(write_folder(tmp_path / "blank", splits))
    images = [random_array(seed) * np.uint8([1, 1, 0]) + np.uint8([0, 0, 7]) for seed in (0, 1, 2)]
    splits = {"train": {"cat": images[:1] * 2, "dog": images[1:]}}
    data = load_images(write_folder(tmp_path / "partly", {**splits, "test": two_classes()}))
    assert "all training images of class 'cat' are the same" in caplog.text and "'dog'" not in caplog.text
    assert "the blue channel is the same in every pixel of every training image" in caplog.text
    assert data.std[2] == 1.0


def test_warnings_are_of_the_first_process_only(plain, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    decode.warn("not said")
    monkeypatch.setenv("RANK", "0")
    decode.warn("said")
    assert caplog.messages == ["said"]


def test_missing_image_is_named(tmp_path):
    rows = rows_of(range(2), [0, 1])
    rows["image"][1] = None
    folder = write_parquet(tmp_path / "missing", {"train": rows, "test": rows_of([1], [1])}, PLAIN)
    with pytest.raises(ValueError, match=r"split 'train', row 1, cannot be decoded \(there is no image\)"):
        load_images(folder)


def test_no_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'cifar10' is not in the local cache.*`--dataset digits`.*local folder"):
        load_images("cifar10")


def test_shortcuts_and_hub_errors(monkeypatch):
    asked = []

    def not_found(source, revision):
        asked.append((source, revision))
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    with pytest.raises(ValueError, match="'cifar100' is neither a folder here nor a dataset on the Hub.*spelling"):
        load_images("cifar100", revision="v3")
    with pytest.raises(ValueError, match="'owner/name' is neither"):
        load_images("owner/name")
    assert asked == [("uoft-cs/cifar100", "v3"), ("owner/name", None)]


def test_revision_is_read_from_the_urls_of_the_files():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert decode.resolved_revision({f"hf://datasets/uoft-cs/cifar10@{commit}/a.parquet": {}}, "main") == commit
    assert decode.resolved_revision({"/some/folder/a.parquet": {}}, None) is None
    assert decode.resolved_revision(None, "main") == "main"


def test_a_validation_split_is_held_out_of_the_training_images(plain):
    whole = load_images("digits", max_train_samples=100, test_samples=1197)
    data = load_images("digits", max_train_samples=100, test_samples=1197, validation_fraction=0.2)
    assert data.fingerprint["rows"] == {"train": 80, "test": 1197, "validation": 20}
    assert data.fingerprint["sha256"] != whole.fingerprint["sha256"]
    assert torch.bincount(data.validation.labels).tolist() == [2] * 10
    both = sorted(pixels.numpy().tobytes() for split in (data.train, data.validation) for pixels in split.pixels)
    assert both == sorted(pixels.numpy().tobytes() for pixels in whole.train.pixels)
    assert torch.equal(data.test.pixels, whole.test.pixels)
    assert data.mean == channel_statistics(data.train.pixels)[0]
    assert data.nbytes == whole.nbytes and len(data.to("cpu").validation) == 20
    for fraction, message in ((0.0, "a share .* above 0 and below 1"), (0.99, "one training image of every class")):
        with pytest.raises(ValueError, match=f"validation_fraction.* {fraction}.*{message}"):
            load_images(plain, validation_fraction=fraction)
