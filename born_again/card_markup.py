"""Text of users in Markdown, YAML and code: shown as what it is, and never obeyed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from born_again.lineage.schema import is_repo_id

# Longer text is cut: a card is read by people.
LONGEST = 300
_JOINERS = "\u200c\u200d"  # inside emoji and some scripts; other invisible characters can turn text around
_MARKUP = re.compile(r"([\\`*_{}\[\]|$~])")
_BEGINS_A_BLOCK = re.compile(r"^([#+=-]+(?=\s|$)|\d+(?=[.)](\s|$)))")
_LOCAL = re.compile(r"(file:)?([/~]|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\]|\\\\)")
# The folders of a path in the middle of a text; "https://" is none.
_FOLDERS = re.compile(r"(?<![\w/\\])(?:(?:file://|~|\.{1,2}|\b[A-Za-z]:)?[/\\](?![/\\]))(?:[^\s,;=\"'<>|/\\]+[/\\])+")


class _Dumper(yaml.SafeDumper):
    """Texts that other readers of YAML might take for a number stand in quotes, and nothing is an anchor."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # YAML 1.2, which the Hub reads, knows more numbers than PyYAML does: 1e3, 0o17.
    is_word = text[:1].isalpha() and "<" not in text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_word else '"')


_Dumper.add_representer(str, _represent_text)


def one_line(value: Any, longest: int = LONGEST) -> str:
    """A text without line breaks, control characters and folders of this machine, cut where it is long."""
    text = "".join(char if char.isprintable() or char in _JOINERS else " " for char in str(value))
    text = _FOLDERS.sub("", " ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def plain(value: Any) -> Markup:
    """A text in a line of Markdown or a cell of a table, without any effect as Markdown or HTML.

    What is `Markup` already, such as what comes from here, is left as it is.
    """
    if isinstance(value, Markup):
        return value
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKUP.sub(r"\\\1", text).replace("://", ":\\//")
    text = re.sub(r"(?i)\bwww\.", lambda match: f"{match[0][:-1]}\\.", text)
    return Markup(_BEGINS_A_BLOCK.sub(lambda match: match[0] + "\\" if match[0].isdigit() else "\\" + match[0], text))


def setting(value: Any) -> Markup:
    """The value of an argument: `plain`, of a path in it the last part alone."""
    value = _without_folders(value)
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {last_part(str(key)): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return last_part(value) if isinstance(value, str) and _LOCAL.match(value) else value


def local_name(source: str) -> str:
    """A model or a network as it may be shown: a name or a Hub id as it is, of a folder the last part."""
    return source if is_hub_id(source) else last_part(source)


def last_part(source: str) -> str:
    """Of a path, and a name without folders as it is."""
    if not re.search(r"[/\\]|^[~.]", source):
        return source
    last = re.split(r"[/\\]+", source.rstrip("/\\"))[-1]
    return last if last.strip("~.: ") else "a local folder"


def is_hub_id(source: Any) -> bool:
    """Whether this is namespace/name of the Hub, and no folder here: libraries look for a folder first."""
    return is_repo_id(source) and not Path(source).is_dir()


def front_matter(header: Mapping[str, Any]) -> str:
    """YAML between two lines of dashes, as ModelCardData.to_yaml writes it but for the dumper."""
    text = yaml.dump(dict(header), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    # Inside of quotes the same text to YAML, and no tag to whatever shows the front matter as it stands.
    return "---\n" + text.rstrip().replace("<", "\\x3C") + "\n---"
