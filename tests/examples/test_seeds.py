"""--seeds: one lineage a seed, each as --seed would train it alone."""

import json

import pytest
from example_scripts import load_example

from born_again.cli import main
from born_again.lineage.manifest import LineageError, Manifest

SHORT = ["--smoke", "--num_train_epochs", "1", "--threads", "1", "--disable_tqdm", "True", "--logging_steps", "999"]
IMAGES = ["--max_train_samples", "64", "--max_eval_samples", "48", "--generations", "1", "--learning_rate", "0.01"]


def start(name, *words):
    return load_example(name).start([*SHORT, *map(str, words)])


def hashes(folder):
    return [record["weights_sha256"] for record in Manifest.read(folder).generations]


def test_each_seed_is_a_lineage_as_if_it_were_trained_alone(tmp_path, capsys):
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert start("run_cifar", *IMAGES, "--seeds", 3, 11, "--output_dir", both) == 0
    assert f"born-again compare {both} compares them." in capsys.readouterr().out
    assert start("run_cifar", *IMAGES, "--seed", 11, "--output_dir", alone) == 0
    assert [Manifest.read(both / name).spec.seed for name in ("seed3", "seed11")] == [3, 11]
    assert hashes(both / "seed11") == hashes(alone) != hashes(both / "seed3")
    assert Manifest.read(both / "seed3").spec.name == "test-wide-resnet-digits-seed3"
    # Finished lineages are skipped, and one goes on alone under the name it has.
    more = [*IMAGES, "--generations", "2"]
    assert start("run_cifar", *more, "--seed", 3, "--output_dir", both / "seed3") == 0
    before = hashes(both / "seed3")
    capsys.readouterr()
    assert start("run_cifar", *IMAGES, "--seeds", 3, 11, "--output_dir", both) == 0
    assert capsys.readouterr().out.count("Every generation is trained already") == 2
    assert hashes(both / "seed3") == before and len(before) == 3

    assert main(["status", str(both)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{both}: 2 lineages, one a seed"
    rows = [line.split() for line in lines[2:]]
    assert [row[:5] for row in rows] == [["seed3", "3", "3", "of", "3"], ["seed11", "11", "2", "of", "2"]]
    assert lines[2].endswith("nothing: all 3 generations are trained")
    assert main(["status", str(both), "--json"]) == 0
    assert [facts["seed"] for facts in json.loads(capsys.readouterr().out)["lineages"]] == [3, 11]

    # Another objective with the same teachers: compared, each teacher is one network.
    other = ["--objective", "ban+l", "--teacher", both / "seed{seed}/gen0", "--output_dir", tmp_path / "other"]
    assert start("run_cifar", *IMAGES, "--seeds", 3, 11, *other) == 0
    assert [hashes(tmp_path / f"other/seed{seed}")[0] for seed in (3, 11)] == [
        hashes(both / f"seed{seed}")[0] for seed in (3, 11)
    ]
    capsys.readouterr()
    assert main(["compare", str(both), str(tmp_path / "other"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["experiment"], row["network"], row["seeds"]) for row in rows] == [
        ("label", "generation 0", [3, 11]),
        ("ban", "generation 1", [3, 11]),
        ("ban", "generation 2", [3]),
        ("ban", "mean of 1, 2", [3]),
        ("ban+l", "generation 1", [3, 11]),
    ]
    assert all(row["metrics"]["accuracy"]["difference"]["items"] for row in rows[1:])


def test_a_text_takes_seeds_too(tmp_path):
    words = ["--max_train_samples", 900, "--max_eval_samples", 301, "--window", 20, "--generations", 0]
    assert start("run_ptb", *words, "--seeds", 1, "--output_dir", tmp_path / "out") == 0
    assert Manifest.read(tmp_path / "out/seed1").spec.name == "test-lstm-grammar-seed1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", 1, 2, 1], r"seeds: got \[1, 2, 1\], expected one or more whole numbers from 0 on, each once"),
        (["--seeds", -1], r"seeds: got \[-1\], expected one or more whole numbers from 0 on"),
        (["--seeds", 1, 2, "--seed", 42], "seed: got 42 beside --seeds 1 2, expected one of the two; put every seed"),
        (["--seeds", 1, 2, "--from_generation", 1], "from_generation: got 1 beside --seeds.*give --seed 1 --output_d"),
    ],
)
def test_seeds_that_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        start("run_cifar", *IMAGES, *words, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_do_not_go_into_a_lineage(tmp_path):
    (tmp_path / "lineage.json").write_text("{}")
    with pytest.raises(LineageError, match="output_dir: .* holds a lineage itself, expected a folder for those of"):
        start("run_cifar", *IMAGES, "--seeds", 1, "--output_dir", tmp_path)
