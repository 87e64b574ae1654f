"""Texts from users, made fit to be shown to others: one line, without control characters and folders of a machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from born_again.lineage.manifest import is_repo_id

# Longer text is truncated.
LONGEST = 300
_JOINERS = "\u200c\u200d"  # in emoji and some scripts; other invisible characters can reverse text
_LOCAL = re.compile(r"(file:)?([/~]|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\]|\\\\)")
# The folders of a path in the middle of a text; "https://" is none.
_FOLDERS = re.compile(r"(?<![\w/\\])(?:(?:file://|~|\.{1,2}|\b[A-Za-z]:)?[/\\](?![/\\]))(?:[^\s,;=\"'<>|/\\]+[/\\])+")


def one_line(value: Any, longest: int = LONGEST) -> str:
    """A text without line breaks, control characters and local folders, truncated to `longest` characters."""
    text = "".join(char if char.isprintable() or char in _JOINERS else " " for char in str(value))
    text = _FOLDERS.sub("", " ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def without_folders(value: Any) -> Any:
    """A JSON value whose paths are shortened to their last part."""
    if isinstance(value, Mapping):
        return {last_part(str(key)): without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return last_part(value) if isinstance(value, str) and _LOCAL.match(value) else value


def local_name(source: str) -> str:
    """A model name or Hub id unchanged, a folder shortened to its last part."""
    return source if is_hub_id(source) else last_part(source)


def last_part(source: str) -> str:
    """The last part of a path; a plain name unchanged."""
    if not re.search(r"[/\\]|^[~.]", source):
        return source
    last = re.split(r"[/\\]+", source.rstrip("/\\"))[-1]
    return last if last.strip("~.: ") else "a local folder"


def is_hub_id(source: Any) -> bool:
    """Whether this is a Hub id, and no local folder, which libraries would prefer."""
    return is_repo_id(source) and not Path(source).is_dir()
