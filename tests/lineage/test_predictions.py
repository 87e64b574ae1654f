"""Kept predictions: the metrics of the record can be computed from them, and nothing else depends on them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from example_scripts import load_example

from born_again.hub.files import generation_files
from born_again.lineage.history import read_history, write_history
from born_again.lineage.manifest import LineageError, Manifest
from born_again.lineage.predictions import SplitMetrics, read_predictions, write_predictions

SHORT = ["--smoke", "--num_train_epochs", "1", "--threads", "1", "--disable_tqdm", "True", "--logging_steps", "999"]
IMAGES = ["--max_train_samples", "64", "--max_eval_samples", "48", "--generations", "2", "--learning_rate", "0.01"]
TEXT = ["--max_train_samples", "900", "--max_eval_samples", "301", "--window", "20", "--generations", "0"]


def train(name: str, folder: Path, *words: str) -> Manifest:
    load_example(name).start([*SHORT, *words, "--output_dir", str(folder)])
    return Manifest.read(folder)


def kept(manifest: Manifest) -> list[tuple[dict, dict]]:
    """Records of generations and ensembles, and the predictions beside them."""
    folder = manifest.path.parent
    paths = [folder / f"gen{record['index']}/predictions.safetensors" for record in manifest.generations]
    paths += [folder / "ensemble/predictions-1-2.safetensors" for _ in manifest.content.get("ensembles", [])]
    records = [*manifest.generations, *manifest.content.get("ensembles", [])]
    return [(own, read_predictions(path, own["weights_sha256"])) for own, path in zip(records, paths, strict=True)]


def test_the_metrics_of_images_follow_from_their_predictions(tmp_path):
    manifest = train("run_cifar", tmp_path / "out", *IMAGES)
    found = kept(manifest)
    assert len(found) == 4
    for record, predictions in found:
        own, metrics = predictions["test"], record["metrics"]["test"]
        assert len(own["label"]) == 48
        assert np.mean(own["label"] == own["predicted"]) == pytest.approx(metrics["accuracy"])
        assert own["nll"].mean() == pytest.approx(metrics["nll"], rel=1e-5)
        right = own["label"] == own["predicted"]
        np.testing.assert_allclose(own["nll"][right], -np.log(own["confidence"][right]), atol=1e-6)
    assert not any("predictions" in name for name in generation_files(manifest, 1))


def test_the_perplexity_of_a_text_follows_from_the_sums_of_its_blocks(tmp_path):
    ((record, predictions),) = kept(train("run_ptb", tmp_path / "out", *TEXT))
    for split, own in predictions.items():
        metrics = record["metrics"][split]
        assert own["tokens"].sum() == metrics["tokens"] == 301 and len(own["tokens"]) == 2
        assert math.exp(own["nll_sum"].sum() / 301) == pytest.approx(metrics["perplexity"], rel=1e-9)
        # One stream, all of whose tokens are kept.
        assert own["nll"].sum() == pytest.approx(own["nll_sum"].sum(), rel=1e-5) and len(own["label"]) == 301
        right = own["label"] == own["predicted"]
        np.testing.assert_allclose(own["nll"][right], -np.log(own["confidence"][right]), atol=1e-6)
    assert predictions.keys() == {"validation", "test"}


def sums(**changes) -> dict:
    return {"nll_sum": np.array([1.0, 2.0]), "tokens": np.array([3, 4]), **changes}


def test_predictions_of_other_weights_are_not_read(tmp_path):
    path = tmp_path / "predictions.safetensors"
    assert read_predictions(path, "a") == {}
    write_predictions(path, {"test": SplitMetrics({}, sums()).predictions}, ["a", "b"])
    assert read_predictions(path, ["a", "b"])["test"]["tokens"].tolist() == [3, 4]
    assert read_predictions(path, ["b", "a"]) == read_predictions(path, "a") == {}


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "predictions.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(LineageError, match="predictions.safetensors: holds no predictions that can be read .*delete"):
        read_predictions(path, "a")
    write_predictions(path, {"test": sums(tokens=np.array([3]))}, "a")
    with pytest.raises(LineageError, match="the split 'test' has other columns, types or shapes"):
        read_predictions(path, "a")


def test_tokens_of_an_earlier_version_are_missing_and_a_part_of_them_is_no_prediction(tmp_path):
    path = tmp_path / "predictions.safetensors"
    tokens = {"label": [1], "predicted": [1], "nll": [0.5], "confidence": [0.6]}
    whole = SplitMetrics({}, sums(**{name: np.array(values) for name, values in tokens.items()})).predictions
    write_predictions(path, {"test": whole}, "a")
    assert read_predictions(path, "a")["test"]["predicted"].tolist() == [1]
    write_predictions(path, {"test": {name: whole[name] for name in whole if name != "nll"}}, "a")
    with pytest.raises(LineageError, match="the split 'test' has other columns"):
        read_predictions(path, "a")


def test_a_history_is_short_has_no_times_and_belongs_to_its_weights(tmp_path):
    path = tmp_path / "history.json"
    logged = [{"step": step, "epoch": 1.0, "loss": float(step), "learning_rate": math.inf} for step in range(2500)]
    logged += [
        {"step": 2500, "eval_loss": 1.0, "eval_runtime": 2.0},
        {"step": 2500, "train_loss": 1.0, "total_flos": 1},
    ]
    write_history(path, logged, "a")
    kept = read_history(path, "a")
    assert len(kept) == 834 + 1 and [entry["step"] for entry in kept[:2]] == [0, 3]
    assert kept[0] == {"step": 0, "epoch": 1.0, "loss": 0.0, "learning_rate": None}
    assert kept[-1] == {"step": 2500, "eval_loss": 1.0} and read_history(path, "b") == []
    path.write_text('{"weights_sha256": "a", "log_history": [3]}')
    assert read_history(path, "a") == []


def test_of_a_split_too_large_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("born_again.lineage.predictions.MAX_ITEMS", 1)
    assert SplitMetrics({"nll": 1.0}, sums()).predictions is None
    write_predictions(tmp_path / "none", {}, "a")
    assert not (tmp_path / "none").exists() and json.dumps(SplitMetrics({"nll": 1.0}, sums())) == '{"nll": 1.0}'
