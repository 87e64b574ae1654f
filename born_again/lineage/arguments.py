"""Command lines of lineages: flags over a config file over a recipe over defaults."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from born_again.lineage.help import arrange_help

TRACEBACK = "--traceback"  # --debug is transformers'
# Between NAME=VALUE pairs, not within the brackets of a list.
_COMMA = re.compile(r",(?![^\[]*\])")


def parse_arguments(
    dataclass_types: Sequence[type],
    recipe: Callable[[argparse.Namespace], Mapping[str, Any]],
    command_line: Sequence[str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Fills dataclasses from the command line, `--config FILE` (YAML or JSON), a recipe, and their defaults.

    The first of these that gives a value wins.

    Args:
        dataclass_types: to fill; their fields are the flags. A dataclass with a field `given` (init=False, so no flag)
            gets the names of the flags that the command line and the config file set.
        recipe: from the arguments parsed so far (a namespace of every field, and `given`, the names that the user
            set) to the defaults that suit them.
        command_line: the arguments after the program's name; None reads sys.argv.
        description: shown by --help.

    Returns:
        One instance for each dataclass.

    Raises:
        ValueError: an unknown flag on the command line or in the config file, or a config file that cannot be read.
        SystemExit: a value of the wrong type, with argparse's message; after --help, which shows the values that a run
            with the other flags would take.
    """
    parser = HfArgumentParser(list(dataclass_types), add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="Show this help, for the other flags given.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON of flags; the command line wins.")
    parser.add_argument(TRACEBACK, action="store_true", help="Show where an error was raised.")
    command_line = list(sys.argv[1:] if command_line is None else command_line)
    known = {action.dest for action in parser._actions} - {"help", "config", "traceback"}
    if asks_for_help := bool({"-h", "--help"} & set(command_line)):
        command_line = [word for word in command_line if word not in ("-h", "--help")]
    parsed, _ = parser.parse_known_args(command_line)
    config = {} if parsed.config is None else read_config(parsed.config, known)
    parser.set_defaults(**config)
    parsed, unknown = parser.parse_known_args(command_line)
    if unknown:
        raise ValueError(
            f"command line: {unknown[0]!r} is no flag{_suggestion(unknown[0].lstrip('-').split('=')[0], known, '--')}"
        )
    parsed.given = frozenset(config) | _given_flags(parser, command_line)
    if asks_for_help:
        with contextlib.suppress(ValueError):  # of flags that it needs
            parser.set_defaults(**{**recipe(parsed), **config})
        arrange_help(parser, dataclass_types, description)
        parser.print_help()
        parser.exit()
    parser.set_defaults(**{**recipe(parsed), **config})
    filled = parser.parse_args_into_dataclasses(command_line, look_for_args_file=False)[: len(dataclass_types)]
    for instance in filled:
        if any(entry.name == "given" and not entry.init for entry in dataclasses.fields(instance)):
            instance.given = parsed.given
    return filled


def _given_flags(parser: argparse.ArgumentParser, command_line: list[str] | None) -> frozenset[str]:
    """The names of the flags on the command line, also of those set to their default."""
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
            raise ValueError(f"config: {str(path)!r} has {name!r}, which is no flag{_suggestion(str(name), known)}")
    return config


def parse_mapping(argument: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Reads a flag that is a mapping: a mapping in a config file, "depth=172,layers=[2,2]" on the command line.

    Args:
        argument: name of the flag, for messages.
        value: mapping, text, or None, which is an empty mapping. The values of a text are read as YAML.

    Raises:
        ValueError: neither a mapping with names as keys nor such a text, or a name given twice.
    """
    if value is None:
        return {}
    pairs = list(value.items()) if isinstance(value, Mapping) else []
    try:
        if isinstance(value, str):
            texts = (part.split("=") for part in _COMMA.split(value))
            pairs = [(name.strip(), yaml.safe_load(text)) for name, text in texts]
    except (ValueError, yaml.YAMLError):
        pairs = []
    names = [name for name, _ in pairs]
    if not isinstance(value, Mapping | str) or (value and not names) or not all(map(_is_name, names)):
        raise ValueError(
            f"{argument}: got {value!r}, expected NAME=VALUE pairs such as 'depth=172,growth_rate=30', or a mapping "
            "in a config file."
        )
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{argument}: got {value!r}, which gives {min(repeated)!r} twice; give it once.")
    return dict(pairs)


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier()


def _suggestion(name: str, known: set[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {prefix + near[0]!r}?" if near else "; --help lists them."
