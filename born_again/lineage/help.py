"""--help of the training scripts: the lineage's flags first, in 80 columns, with the values that a run would take."""

from __future__ import annotations

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Sequence
from enum import Enum
from typing import Any

from transformers import TrainingArguments

WIDTH = 80
_COLUMN = 30  # of the help texts
_LETTERS = {int: "N", float: "X"}

EXIT_STATUS = """
Exit status: 0 when the lineage is finished, also where --stop_when_worse ended it; 1 after an error, which is one line
on stderr, or when something could not be published; 2 for a value of the wrong type; 130 and 143 after SIGINT and
SIGTERM. The same command resumes. accelerate launch itself exits with 1, after a traceback of its own that its --quiet
leaves out.
"""
_COMMON = frozenset(
    """
    output_dir seed num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate
    bf16 report_to push_to_hub
    """.split()
)


def arrange_help(
    parser: argparse.ArgumentParser, dataclass_types: Sequence[type], description: str | None = None
) -> None:
    """Groups the flags by the class that declares them, transformers' last, and makes the help readable.

    Args:
        parser: made of the dataclasses.
        dataclass_types: whose flags these are. The title of a group is the first clause of its class's docstring.
        description: of the script; indented lines are commands.
    """
    opposites = {action.dest for action in parser._actions if _is_opposite(action)}
    parser.formatter_class = type("Formatter", (_Formatter,), {"with_opposite": opposites})
    parser.usage = "%(prog)s [--FLAG VALUE ...]"
    parser.description, parser.epilog = _reflowed(description or ""), _reflowed(EXIT_STATUS)
    owners = {name: owner for one in dataclass_types for name, owner in _owners(one).items()}
    owners |= dict.fromkeys(_COMMON & owners.keys(), _Common)
    order = [_Common, *(owner for one in dataclass_types for owner in one.__mro__ if owner in owners.values())]
    order.sort(key=lambda owner: (owner in (_Common, TrainingArguments), owner is TrainingArguments))
    for owner in dict.fromkeys(order):
        group = parser.add_argument_group(_title(owner))
        own = [action for action in parser._optionals._group_actions if owners.get(action.dest) is owner]
        for action in own:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)


class _Common:
    """The arguments of transformers that are given most"""


def _owners(dataclass_type: type) -> dict[str, type]:
    """Field -> the class in whose body it is; of a changed default the class that had the field first."""
    owners: dict[str, type] = {}
    for one in dataclass_type.__mro__:
        if dataclasses.is_dataclass(one):
            owners |= {name: one for name in vars(one).get("__annotations__", {})}
    return owners


def _title(owner: type) -> str:
    if owner is TrainingArguments:
        return "All other arguments of transformers.TrainingArguments"
    return re.split(r"[.,;:]", (owner.__doc__ or owner.__name__).replace("`", ""))[0].strip()


def _reflowed(text: str) -> str:
    """The text in 80 columns; a command that is longer goes on in the next line."""
    paragraphs = []
    for paragraph in textwrap.dedent(text).strip().split("\n\n"):
        if not paragraph.startswith("    "):
            paragraphs.append(textwrap.fill(paragraph, WIDTH))
            continue
        lines = []
        for command in re.sub(r"\\\n", " ", paragraph).splitlines():
            command, _, comment = re.sub(r"(?<=\S) +", " ", command).partition(" # ")
            lines += [f"    # {comment}"] if comment else []
            kept_together = re.sub(r"(--\S+) (?!--)", "\\1\0", command)  # a flag and its value
            wrapped = textwrap.wrap(
                kept_together, WIDTH - 2, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
            )
            lines += " \\\n".join(wrapped).replace("\0", " ").split("\n")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One name of each flag, a short word for its value, and its default where it has one."""

    with_opposite: frozenset[str] = frozenset()  # switches that are on by default, for which there is a --no_

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=_COLUMN, width=WIDTH)

    def add_argument(self, action: argparse.Action) -> None:
        if not _is_opposite(action):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._HelpAction) or not action.option_strings:
            return ", ".join(action.option_strings)
        name = action.option_strings[0]
        if action.nargs in (0, "?"):
            return f"{name}, --no_{action.dest}" if action.dest in self.with_opposite else name
        letter = action.metavar or _LETTERS.get(action.type, "VALUE")  # type: ignore[arg-type]
        return f"{name} {letter}{' ...' if action.nargs in ('+', '*') else ''}"

    def _expand_help(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").replace("%%", "%").split())
        if action.choices is not None:
            text += f" One of {', '.join(map(str, action.choices))}."
        value = action.default.value if isinstance(action.default, Enum) else action.default
        return text if value in (None, False, "", [], {}) or action.nargs == 0 else f"{text} [{_shown(value)}]"


def _is_opposite(action: argparse.Action) -> bool:
    return action.option_strings[:1] == [f"--no_{action.dest}"]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
