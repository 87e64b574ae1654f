"""Command lines of lineages: flags over a config file over a recipe over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(
    dataclass_types: Sequence[type],
    recipe: Callable[[argparse.Namespace], Mapping[str, Any]],
    command_line: Sequence[str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Fills dataclasses from the command line, `--config FILE` (YAML or JSON), a recipe, and their defaults.

    Of a value given twice the first of these wins.

    Args:
        dataclass_types: what is filled; their fields are the flags. One with a field `given` that is no flag (init is
            False) is told there which flags the command line and the config file have.
        recipe: from what was asked so far (every field, as a namespace, and `given`, the names of those that were) to
            the values that suit it.
        command_line: the words after the program's name; None reads sys.argv.
        description: shown by --help.

    Returns:
        One instance for each dataclass.

    Raises:
        ValueError: a word on the command line or a name in the config file that is no flag, or a config file that
            cannot be read.
        SystemExit: a value that is not of its flag's type, with argparse's message.
    """
    parser = HfArgumentParser(list(dataclass_types), description=description)
    parser.add_argument("--config", type=Path, default=None, help="YAML or JSON file of flags; the command line wins.")
    command_line = None if command_line is None else list(command_line)
    known = {action.dest for action in parser._actions} - {"help", "config"}
    asked, _ = parser.parse_known_args(command_line)
    config = {} if asked.config is None else read_config(asked.config, known)
    parser.set_defaults(**config)
    asked, unknown = parser.parse_known_args(command_line)
    if unknown:
        raise ValueError(
            f"command line: {unknown[0]!r} is no flag{_near(unknown[0].lstrip('-').split('=')[0], known, '--')}"
        )
    asked.given = frozenset(config) | _on(parser, command_line)
    parser.set_defaults(**{**recipe(asked), **config})
    filled = parser.parse_args_into_dataclasses(command_line, look_for_args_file=False)[: len(dataclass_types)]
    for instance in filled:
        if any(entry.name == "given" and not entry.init for entry in dataclasses.fields(instance)):
            instance.given = asked.given
    return filled


def _on(parser: argparse.ArgumentParser, command_line: list[str] | None) -> frozenset[str]:
    """The flags that are on the command line, whatever their values."""
    defaults = {action: action.default for action in parser._actions}
    set_defaults, parser._defaults = parser._defaults, {}
    try:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        return frozenset(vars(parser.parse_known_args(command_line)[0]))
    finally:
        parser._defaults = set_defaults
        for action, default in defaults.items():
            action.default = default


def read_config(path: Path, known: set[str]) -> dict[str, Any]:
    """Reads a flat mapping of flags from a YAML or JSON file.

    Raises:
        ValueError: no such file, no YAML or JSON, no mapping, or an unknown name.
    """
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"config: got {str(path)!r}, expected a YAML or JSON file that can be read: {error}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"config: {str(path)!r} holds a {type(config).__name__}, expected a mapping such as 'seed: 1'."
        )
    for name in config:
        if name not in known:
            raise ValueError(f"config: {str(path)!r} has {name!r}, which is no flag{_near(str(name), known)}")
    return config


def _near(name: str, known: set[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {prefix + near[0]!r}?" if near else "; --help lists them."
