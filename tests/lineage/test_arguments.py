"""Command line over config file over recipe over defaults."""

import json
from dataclasses import dataclass, field

import pytest

from born_again import BornAgainTrainingArguments
from born_again.lineage.arguments import parse_arguments


@dataclass
class Options:
    dataset: str = "cifar100"
    epochs: float = 3.0
    milestones: list[float] | None = field(default=None)
    bf16: bool = False


def recipe(asked):
    return {"epochs": 20.0, "milestones": [0.5]} if asked.dataset == "digits" else {"epochs": 200.0}


def parse(*words):
    return parse_arguments((Options,), recipe, words)[0]


def test_defaults_then_recipe_then_config_then_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("dataset: digits\nepochs: 7\nbf16: true\n")
    assert parse() == Options(epochs=200.0)
    assert parse("--dataset", "digits") == Options("digits", 20.0, [0.5])
    assert parse("--config", str(config)) == Options("digits", 7, [0.5], True)
    assert parse("--config", str(config), "--epochs", "9", "--milestones", "0.1", "0.2") == Options(
        "digits", 9.0, [0.1, 0.2], True
    )
    # A flag may bring in a recipe that the config did not ask for; what the config says still stands.
    assert parse("--config", str(config), "--dataset", "cifar10") == Options("cifar10", 7, None, True)


def test_json_config(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"epochs": 5.0}))
    assert parse("--config", str(config)).epochs == 5.0


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("epochs: 1e1\n")
    assert parse("--config", str(config)).epochs == 10.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epocs: 3", "has 'epocs', which is no flag; did you mean 'epochs'"),
        ("- epochs", "holds a list, expected a mapping"),
        ("a: [", "expected a YAML or JSON file that can be read"),
    ],
)
def test_config_that_cannot_be_used(tmp_path, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(config))


def test_config_that_is_not_there():
    with pytest.raises(ValueError, match="config: got 'nowhere.yaml', expected a YAML or JSON file"):
        parse("--config", "nowhere.yaml")


def test_unknown_flag_and_value_of_another_type(capsys):
    with pytest.raises(ValueError, match="command line: '--epocs' is no flag; did you mean '--epochs'"):
        parse("--epocs", "3")
    with pytest.raises(SystemExit):
        parse("--epochs", "three")
    assert "invalid float value: 'three'" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["command line", "config"])
def test_a_flag_by_its_old_name(tmp_path, source, capsys):
    def parsed(*words):
        words = (*words, "--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", "none")
        return parse_arguments((BornAgainTrainingArguments,), lambda asked: {}, words)[0]

    (tmp_path / "config.yaml").write_text("loss_form: plain\n")
    words = ["--loss_form", "plain"] if source == "command line" else ["--config", str(tmp_path / "config.yaml")]
    with pytest.warns(FutureWarning, match="loss_form is deprecated"):
        assert parsed(*words).loss_implementation == "full"
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    assert "--loss_implementation" in shown and "loss_form" not in shown
