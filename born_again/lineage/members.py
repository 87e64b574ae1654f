"""Which generations an ensemble is made of: chosen by the user or named by ensemble.json, found, and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from born_again.lineage.manifest import LineageError, Manifest, file_sha256, is_repo_id
from born_again.teacher import carries_state
from born_again.teacher.preprocessing import Preprocessing, Renormalization, preprocessing_of_network
from born_again.teacher.tokenizers import check_same_tokens

ENSEMBLE_NAME = "ensemble.json"
FORMAT = "born_again.ensemble"
VERSION = 1
AVERAGES = ("probabilities", "logits")

_LARGEST = 10**6 - 1


@dataclass(frozen=True)
class Member:
    """One network of an ensemble.

    Args:
        generation: its index; it is the folder gen{index} of the lineage.
        weights_sha256: of its model.safetensors, hexadecimal.
        repo: on the Hub, where it is read from there and not from the folder.
        commit: of that repository.

    Raises:
        ValueError: a generation that is no whole number from 0 on.
    """

    generation: int
    weights_sha256: str
    repo: str | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        # It becomes the name of a folder, which must never be a way to another one.
        if type(self.generation) is not int or not 0 <= self.generation <= _LARGEST:
            raise ValueError(f"generation: got {self.generation!r}, expected a whole number from 0 to {_LARGEST}.")


@dataclass(frozen=True)
class Facts:
    """What is known of a member.

    Args:
        generation: its index.
        kind: in words.
        classes: names of the labels by index, or how many words.
        tokenizer: where its tokenizer.json would be.
        state_parts: how many tensors its state has, 0 without.
        preprocessing: of the images it was trained on, None where it says nothing.
    """

    generation: int
    kind: str
    classes: Mapping[int, str] | int
    tokenizer: Path
    state_parts: int
    preprocessing: Preprocessing | None = None

    @classmethod
    def of(cls, network: nn.Module, folder: Path, generation: int) -> Facts:
        """Looks at a network that `load_generation` gave; one that carries a state is asked for one word."""
        tokenizer = folder / "tokenizer.json"
        if network.main_input_name == "pixel_values":
            labels = dict(network.config.id2label)
            own = preprocessing_of_network(network)
            return cls(generation, "an image classifier", labels, tokenizer, 0, own)
        words = network.config.get_text_config().vocab_size
        if not carries_state(network):
            return cls(generation, "a language model without a state", words, tokenizer, 0)
        with torch.no_grad():
            after = network(torch.zeros(1, 1, dtype=torch.int64)).state
        return cls(generation, "a language model that carries a state", words, tokenizer, len(after))


def own_pixels(first: Facts, other: Facts) -> Renormalization | None:
    """What makes the pixel values of one member those of another; None where they are the same, or not known.

    Raises:
        LineageError: images with another number of channels.
    """
    if first.preprocessing is None or other.preprocessing is None:
        return None
    try:
        return Renormalization.between(first.preprocessing, other.preprocessing)
    except ValueError as error:
        raise LineageError(
            f"members: generations {first.generation} and {other.generation} take images of other numbers of channels "
            f"({error}); choose members trained on the same data."
        ) from error


def check_alike(first: Facts, other: Facts) -> None:
    """Refuses two members whose predictions cannot be averaged.

    Raises:
        LineageError: of different kinds, labels or words, or a tokenizer.json that cannot be read.
    """
    us, them = f"generation {first.generation}", f"generation {other.generation}"
    if first.kind != other.kind:
        raise LineageError(f"members: {us} is {first.kind}, {them} {other.kind}; expected one kind, choose others.")
    if isinstance(first.classes, int):
        if first.classes != other.classes:
            raise LineageError(
                f"members: {us} has {first.classes} words, {them} {other.classes}; expected the same, since their "
                "predictions are averaged word by word; choose members with one vocabulary."
            )
        if first.tokenizer.is_file() and other.tokenizer.is_file():
            try:
                check_same_tokens(_words(other.tokenizer), _words(first.tokenizer))
            except ValueError as error:
                raise LineageError(f"members: {us} and {them} do not mean the same words: {error}") from error
        return
    for index in sorted({*first.classes, *other.classes}):
        if first.classes.get(index) != other.classes.get(index):
            raise LineageError(
                f"members: class {index} is {first.classes.get(index)!r} for {us}, {other.classes.get(index)!r} for "
                f"{them}; expected the same labels in the same order; choose members trained on the same data."
            )


def _words(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise LineageError(f"{path}: is no tokenizer ({error}); restore it from a copy, or remove it.") from error


def checked_folder(output_dir: Path | None, member: Member) -> Path:
    """The folder of a member, after checking that it is here and holds the member's weights.

    Args:
        output_dir: of the lineage; None for a member on the Hub, which is downloaded at its commit.
        member: with a repo and a commit where there is no output_dir.

    Raises:
        LineageError: it is missing, leads elsewhere, or has other weights.
        OSError: the Hub has no such member, or cannot be reached.
    """
    if output_dir is None:
        path = Path(cached_file(member.repo, SAFE_WEIGHTS_NAME, revision=member.commit))
        for name in ("config.json", "tokenizer.json"):
            cached_file(member.repo, name, revision=member.commit, _raise_exceptions_for_missing_entries=False)
        _check_hash(path, member)
        return path.parent
    folder = output_dir / f"gen{member.generation}"
    path = folder / SAFE_WEIGHTS_NAME
    for own in (folder, *folder.glob("*")):
        _refuse_link(own)
    if not path.is_file():
        raise LineageError(f"{path}: is missing, expected the weights of a member; put the file back.")
    _check_hash(path, member)
    return folder


def _check_hash(path: Path, member: Member) -> None:
    if file_sha256(path) != member.weights_sha256:
        raise LineageError(
            f"{path}: does not hash to what is written of generation {member.generation} "
            f"({member.weights_sha256[:12]}...), so it is another network; put the file back, or make the ensemble "
            "of other members."
        )


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise LineageError(f"{path}: is a link, expected nothing that leads elsewhere; put a copy in its place.")


def chosen_generations(members: str | Sequence[int], manifest: Manifest) -> list[int]:
    """The indices of the generations that `LineageEnsemble.from_lineage` is asked for, all of them finished.

    Raises:
        ValueError: members that cannot be understood.
        LineageError: members that are not there, or not finished.
    """
    finished = [record["index"] for record in manifest.generations if record["status"] == "finished"]
    if isinstance(members, str):
        if members == "all":
            members = finished
        elif last := re.fullmatch("last ([1-9][0-9]{0,5})", members):
            count, students = int(last[1]), [index for index in finished if index > 0]
            if len(students) < count:
                raise LineageError(
                    f"members: got {members!r}, and {manifest.path} has {len(students)} finished students; train "
                    "more, or take fewer."
                )
            members = students[-count:]
        elif re.fullmatch(r"[0-9]{1,6}(\s*,\s*[0-9]{1,6})*", members):
            members = [int(index) for index in members.split(",")]
    if (
        isinstance(members, str)
        or not isinstance(members, Sequence)
        or any(type(index) is not int or index < 0 for index in members)
        or len(set(members)) < len(members)
    ):
        raise ValueError(
            f"members: got {members!r}, expected 'last 3' (students), 'all', or indices of generations, each once, "
            "as '1,2,3' or [1, 2, 3]."
        )
    missing = [index for index in members if index not in finished]
    if missing or not members:
        raise LineageError(
            f"members: got {list(members)}, expected one or more of the finished generations {finished} of "
            f"{manifest.path}; train the others first, or leave them out."
        )
    return list(members)


def read_ensemble(path: Path, from_hub: bool = False) -> tuple[list[Member], str]:
    """Reads and checks an ensemble.json.

    Layout: {"format", "version", "average", "members": [{"generation", "folder", "weights_sha256"}]}; on the Hub each
    member has its "repo" and "commit" too.

    Args:
        path: of the file.
        from_hub: whether the members are to be read from their repositories.

    Returns:
        Members, and what is averaged.

    Raises:
        FileNotFoundError: there is none.
        LineageError: it is no JSON, of a newer version, or a field is wrong; names the field.
    """

    def expect(condition: bool, field: str, got: Any, expected: str) -> None:
        if not condition:
            raise LineageError(
                f"{path}: the field {field!r} is {got!r:.99}, expected {expected}; restore the file from a copy."
            )

    if not from_hub:  # its cache is made of links
        _refuse_link(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"folder: {path.parent} has no {path.name}, expected what LineageEnsemble.save_pretrained wrote; for the "
            "folder of a lineage take from_lineage."
        ) from error
    except (ValueError, RecursionError) as error:  # no text, no JSON, numbers or nesting beyond all measure
        raise LineageError(f"{path}: is not JSON ({error}); restore it from a copy.") from error
    expect(isinstance(content, dict), "", content, "an object")
    expect(content.get("format") == FORMAT, "format", content.get("format"), repr(FORMAT))
    version, average, entries = content.get("version"), content.get("average"), content.get("members")
    expect(type(version) is int and version >= 1, "version", version, "a whole number above 0")
    if version > VERSION:
        raise LineageError(f"{path}: has version {version}, this born_again reads up to {VERSION}; upgrade it.")
    expect(average in AVERAGES, "average", average, " or ".join(map(repr, AVERAGES)))
    expect(isinstance(entries, list) and len(entries) > 0, "members", entries, "a list that is not empty")
    members: list[Member] = []
    for index, entry in enumerate(entries):
        field = f"members[{index}]"
        expect(isinstance(entry, dict), field, entry, "an object")
        generation, folder, sha256 = (entry.get(name) for name in ("generation", "folder", "weights_sha256"))
        whole = type(generation) is int and 0 <= generation <= _LARGEST
        new = generation not in [member.generation for member in members]
        expect(whole and new, f"{field}.generation", generation, "a whole number from 0 on, each once")
        # Nothing else is ever opened: a path in a file that someone else may have written leads nowhere.
        expect(folder == f"../gen{generation}", f"{field}.folder", folder, f"'../gen{generation}'")
        is_hash = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None
        expect(is_hash, f"{field}.weights_sha256", sha256, "a SHA-256")
        if from_hub:
            repo, commit = entry.get("repo"), entry.get("commit")
            expect(is_repo_id(repo), f"{field}.repo", repo, "a repository, namespace/name")
            is_commit = isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit) is not None
            expect(is_commit, f"{field}.commit", commit, "a commit, 40 hexadecimal digits")
            members.append(Member(generation, sha256, repo, commit))
        else:
            members.append(Member(generation, sha256))
    return members, average
