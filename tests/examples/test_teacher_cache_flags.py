"""--teacher_cache of both scripts: the same weights, nothing left behind, and a folder that the user gave stays."""

import json

import pytest
from example_scripts import load_example

FLAGS = {
    "run_cifar": "--max_train_samples 128 --max_eval_samples 64 --num_train_epochs 3 --generations 2",
    "run_ptb": "--max_train_samples 2000 --max_eval_samples 600 --num_train_epochs 2 --window 10 --generations 1",
}


def hashes(name, folder, *words):
    flags = ["--smoke", "--threads", "1", "--disable_tqdm", "True", *FLAGS[name].split()]
    assert load_example(name).start([*flags, "--output_dir", str(folder), *words]) == 0
    assert not (folder / "teacher_cache").exists()
    records = json.loads((folder / "lineage.json").read_text())["generations"]
    return [record["weights_sha256"] for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_the_flag_changes_no_weight_and_leaves_nothing_behind(tmp_path, name):
    expected = hashes(name, tmp_path / "off")
    assert hashes(name, tmp_path / "memory", "--teacher_cache", "memory") == expected
    assert hashes(name, tmp_path / "disk", "--teacher_cache", "disk") == expected
    mine = ["--teacher_cache", "disk", "--teacher_cache_dir", str(tmp_path / "mine")]
    assert hashes(name, tmp_path / "own", *mine) == expected
    assert len(list((tmp_path / "mine").glob("*/header.json"))) == len(expected) - 1  # one for each teacher
    # The flag decides nothing: the same lineage goes on with another.
    assert hashes(name, tmp_path / "off", *mine, "--generations", str(len(expected)))[:-1] == expected
