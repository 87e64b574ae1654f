"""--seeds: one lineage a seed, each as --seed would train it alone."""

import json
import re

import pytest
from compared_lineages import images, lineage
from example_scripts import load_example

from born_again import LineageEnsemble, load_generation
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
        (
            ["--control", "seeds", "--seeds", 4, 20, 2, "--generations", 3],
            "seeds: got 4 20 2 beside --control seeds with --generations 3, expected seeds at least 4 apart.*give "
            "--seeds 0 10 20",
        ),
    ],
)
def test_seeds_that_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        start("run_cifar", *IMAGES, *words, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_teacher_is_looked_at_before_the_first_training(tmp_path):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0/config.json").write_text('{"architecture": "test_wide_resnet"}')
    words = [*IMAGES, "--seeds", 0, 10, "--output_dir", tmp_path / "out", "--teacher", tmp_path / "seed{seed}"]
    for missing in ("seed0' cannot be loaded .there is no model.safetensors", "seed10' cannot be loaded .there is no"):
        with pytest.raises(ValueError, match=f"--teacher '.*{missing}"):
            start("run_cifar", *words)
        (tmp_path / "seed0/model.safetensors").touch()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot be loaded"):  # only seen when it is taken
        start("run_cifar", *IMAGES, "--seeds", 0, "--output_dir", tmp_path / "out", "--teacher", tmp_path / "seed0")
    assert not (tmp_path / "out/seed0").exists()


def test_a_folder_of_seeds_is_told_from_a_lineage(tmp_path, capsys):
    out = tmp_path / "out"
    for seed in (0, 10):
        lineage(out / f"seed{seed}", [images(0.5)], seed=seed)
    holds = f"got '{out}', which holds a lineage for each seed (seed0, seed10), expected "
    one, network = f"one of them; give '{out}/seed0'", f"a network of one of them; give '{out}/seed0/gen0'"
    for words, expected in ((["evaluate"], network), (["card"], one), (["publish", "--namespace", "me"], one)):
        assert main([*words[:1], str(out), *words[1:]]) == 2
        assert holds + expected in capsys.readouterr().err
    for load, expected in ((LineageEnsemble.from_lineage, one), (load_generation, network)):
        with pytest.raises(FileNotFoundError, match=re.escape(holds + expected)):
            load(out)
    with pytest.raises(LineageError, match=re.escape(holds + one) + ".*give --seeds 3, or --output_dir .*out/seed3"):
        start("run_cifar", *IMAGES, "--seed", 3, "--output_dir", out)
    with pytest.raises(ValueError, match=re.escape(f"--teacher: {holds}{network}")):
        start("run_cifar", *IMAGES, "--seeds", 3, "--output_dir", tmp_path / "other", "--teacher", out)


def test_seeds_do_not_go_into_a_lineage(tmp_path):
    (tmp_path / "lineage.json").write_text("{}")
    with pytest.raises(LineageError, match="output_dir: .* holds a lineage itself, expected a folder for those of"):
        start("run_cifar", *IMAGES, "--seeds", 1, "--output_dir", tmp_path)
