"""The members of an ensemble: selected by the user or read from ensemble.json, located, verified and compared."""

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
from born_again.teacher import vocabulary_size as size_of_vocabulary
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
        generation: its index; its folder is gen{index} of the lineage.
        weights_sha256: of its model.safetensors, hexadecimal.
        repo: Hub repository that it is read from; None reads it from its folder.
        commit: of that repository.

    Raises:
        ValueError: a generation that is no whole number from 0 on.
    """

    generation: int
    weights_sha256: str
    repo: str | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        # It becomes part of a path, which must not lead to another folder.
        if type(self.generation) is not int or not 0 <= self.generation <= _LARGEST:
            raise ValueError(f"generation: got {self.generation!r}, expected a whole number from 0 to {_LARGEST}.")


@dataclass(frozen=True)
class MemberInfo:
    """Properties of a member that must match those of the others.

    Args:
        generation: its index.
        kind: for error messages.
        classes: names of the labels by index, or the size of the vocabulary.
        tokenizer: path of its tokenizer.json, which may be missing.
        state_parts: number of tensors of its recurrent state, 0 without one.
        preprocessing: of the images it was trained on, None where it is not known.
    """

    generation: int
    kind: str
    classes: Mapping[int, str] | int
    tokenizer: Path
    state_parts: int
    preprocessing: Preprocessing | None = None

    @classmethod
    def of(cls, network: nn.Module, folder: Path, generation: int) -> MemberInfo:
        """Inspects a network as it was loaded; one that carries a state predicts one token for it."""
        tokenizer, config = folder / "tokenizer.json", getattr(network, "config", None)
        if (vocabulary_size := size_of_vocabulary(network)) is None:
            labels = dict(getattr(config, "id2label", None) or {})
            is_image = getattr(network, "main_input_name", None) == "pixel_values"
            kind = "an image classifier" if is_image else f"a {type(network).__name__}"
            return cls(generation, kind, labels, tokenizer, 0, preprocessing_of_network(network))
        if not carries_state(network):
            return cls(generation, "a language model without a state", vocabulary_size, tokenizer, 0)
        with torch.no_grad():
            after = network(torch.zeros(1, 1, dtype=torch.int64)).state
        return cls(generation, "a language model that carries a state", vocabulary_size, tokenizer, len(after))


def renormalization_between(first: MemberInfo, other: MemberInfo) -> Renormalization | None:
    """The conversion of pixel values from one member's mean and std to another's; None where none is needed or known.

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


def check_compatible(first: MemberInfo, other: MemberInfo) -> None:
    """Checks that the predictions of two members can be averaged.

    Raises:
        LineageError: of different kinds, labels or vocabularies, or a tokenizer.json that cannot be read.
    """
    us, them = f"generation {first.generation}", f"generation {other.generation}"
    if first.kind != other.kind:
        raise LineageError(f"members: {us} is {first.kind}, {them} {other.kind}; expected one kind, choose others.")
    if isinstance(first.classes, int):
        if first.classes != other.classes:
            raise LineageError(
                f"members: {us} has a vocabulary of {first.classes} tokens, {them} of {other.classes}; expected the "
                "same, since their predictions are averaged token by token; choose members with one vocabulary."
            )
        if first.tokenizer.is_file() and other.tokenizer.is_file():
            try:
                check_same_tokens(_read_tokenizer(other.tokenizer), _read_tokenizer(first.tokenizer))
            except ValueError as error:
                raise LineageError(f"members: {us} and {them} do not have the same vocabulary: {error}") from error
        return
    for index in sorted({*first.classes, *other.classes}):
        if first.classes.get(index) != other.classes.get(index):
            raise LineageError(
                f"members: class {index} is {first.classes.get(index)!r} for {us}, {other.classes.get(index)!r} for "
                f"{them}; expected the same labels in the same order; choose members trained on the same data."
            )


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise LineageError(f"{path}: is no tokenizer ({error}); restore it from a copy, or remove it.") from error


def verified_folder(output_dir: Path | None, member: Member) -> Path:
    """The folder of a member, after its weights were verified.

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
        raise LineageError(f"{path}: is missing, expected the weights of a member; restore the file.")
    _check_hash(path, member)
    return folder


def _check_hash(path: Path, member: Member) -> None:
    if file_sha256(path) != member.weights_sha256:
        raise LineageError(
            f"{path}: does not match the recorded hash of generation {member.generation} "
            f"({member.weights_sha256[:12]}...), so it is another network; restore the file, or make the ensemble "
            "of other members."
        )


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise LineageError(f"{path}: is a link, expected a file or folder; put a copy in its place.")


def members_to_choose(manifest: Manifest) -> list[int]:
    """The indices of the generations that ensembles are made of: the students, or all of a control of many seeds."""
    is_control = manifest.spec.control is not None
    return [record["index"] for record in manifest.generations if record["parent"] is not None or is_control]


def select_generations(members: str | Sequence[int], manifest: Manifest) -> list[int]:
    """The indices of the finished generations that the `members` argument of `from_lineage` selects.

    Raises:
        ValueError: members that cannot be understood.
        LineageError: members that do not exist or are not finished.
    """
    finished = [record["index"] for record in manifest.generations if record["status"] == "finished"]
    if isinstance(members, str):
        if members == "all":
            members = finished
        elif last := re.fullmatch("last ([1-9][0-9]{0,5})", members):
            count, students = int(last[1]), [index for index in members_to_choose(manifest) if index in finished]
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
        Members, and the average: "probabilities" or "logits".

    Raises:
        FileNotFoundError: there is none.
        LineageError: it is no JSON, of a newer version, or a field is wrong; names the field.
    """

    def expect(condition: bool, field: str, got: Any, expected: str) -> None:
        if not condition:
            raise LineageError(
                f"{path}: the field {field!r} is {got!r:.99}, expected {expected}; restore the file from a copy."
            )

    if not from_hub:  # the cache of the Hub consists of links
        _refuse_link(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"folder: {path.parent} has no {path.name}, expected what LineageEnsemble.save_pretrained wrote; for the "
            "folder of a lineage take from_lineage."
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too large numbers or too deep nesting
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
        # No other path is ever opened: the file may come from someone else.
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
