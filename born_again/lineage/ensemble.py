"""Ensembles of a lineage's generations, and their evaluation after the training: the paper's Ens*2 and Ens*3."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput, cached_file

from born_again._files import write_atomically
from born_again.lineage.evaluation import finite_or_none, load_generation
from born_again.lineage.machine import on_first_process
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, check_one_lineage, is_repo_id
from born_again.lineage.members import (
    AVERAGES,
    ENSEMBLE_NAME,
    FORMAT,
    VERSION,
    Member,
    MemberInfo,
    check_compatible,
    members_to_choose,
    read_ensemble,
    renormalization_between,
    select_generations,
    verified_folder,
)
from born_again.lineage.predictions import ensemble_predictions_name, predictions_by_split, write_predictions
from born_again.objectives import widened
from born_again.teacher import logits_of, mean_log_probabilities
from born_again.teacher.preprocessing import renormalized

logger = logging.getLogger(__name__)

_GENERATION_FOLDER = re.compile("gen[0-9]+")
# A loss of each member, a tuple instead of named outputs, a cache that all members would write to.
_REFUSED_INPUTS = ("labels", "return_dict", "past_key_values")
FOLDER = "ensemble"
_AVERAGE = "probabilities"
ENSEMBLES = (2, 3)  # members of those that are evaluated after a training: the paper's Ens*2 and Ens*3


@dataclass
class EnsembleOutput(ModelOutput):
    """The output of an ensemble.

    Args:
        logits: (..., classes), float32 or wider: the logarithm of the mean probabilities, or the mean of the logits.
        state: the recurrent states of all members after this window, concatenated in one tuple; None without.
    """

    logits: Tensor | None = None
    state: tuple[Tensor, ...] | None = None


class LineageEnsemble(nn.Module):
    """Finished generations of a lineage as one network: image classifiers, or language models token by token.

    Made by `from_lineage` or `from_pretrained`. It is frozen and always in eval mode. It is evaluated like a
    generation, and can be a teacher: BornAgainTrainer(teacher=ensemble). Each language model that carries a state
    carries its own.

    Pixel values are normalised for the first member, as the config of the ensemble says. For members trained with
    another mean and std, such as a teacher trained elsewhere, they are renormalised.

    Args:
        output_dir: the lineage's folder, which holds the members' folders; None for members that name a repository.
        members: one or more.
        average: "probabilities" (what the paper does is not stated; this is the usual reading) or "logits".
        sequential: keeps one member in memory at a time: every call loads the members from their folders in turn. For
            networks too large to be held together, with large batches.
        load: from the folder of a member to its network; None takes `born_again.load_generation`. For networks of a
            class of your own.

    Raises:
        LineageError: weights that are missing or not those of a member, members of different kinds, labels or
            vocabularies.
        ValueError: no members, an unknown average, or a folder that holds no generation.
        FileNotFoundError: a member's folder lacks its config.json.

    Example:
        >>> ensemble = LineageEnsemble.from_lineage("outputs/wide-resnet-digits", members="last 2")
        >>> [member.generation for member in ensemble.members]
        [1, 2]
        >>> probabilities = ensemble(pixel_values=torch.zeros(4, 3, 16, 16)).logits.softmax(dim=1)  # (4, 10)
        >>> each = [network(torch.zeros(4, 3, 16, 16)).logits.softmax(dim=1) for network in ensemble.networks]
        >>> torch.allclose(probabilities, sum(each) / 2)
        True
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        members: Sequence[Member],
        average: str = "probabilities",
        sequential: bool = False,
        load: Callable[[Path], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if average not in AVERAGES:
            raise ValueError(f"average: got {average!r}, expected {' or '.join(map(repr, AVERAGES))}.")
        if not members:
            raise ValueError("members: got none, expected at least one; from_lineage finds those of a lineage.")
        self.output_dir = None if output_dir is None else Path(output_dir).resolve()
        self.members = tuple(members)
        self.average = average
        self.sequential = sequential
        self._load_network = load or load_generation
        self.networks = nn.ModuleList()
        self._conversions: list[Callable[[Tensor], Tensor]] = []
        self._skeleton: list[nn.Module] = []  # in a list, so that it is not registered as a submodule
        infos = [self._add_member(member) for member in self.members]
        for other in infos[1:]:
            check_compatible(infos[0], other)
        self._state_parts = [info.state_parts for info in infos]
        self._renormalizations = [renormalization_between(infos[0], info) for info in infos]
        self.eval()

    @classmethod
    def from_lineage(
        cls,
        output_dir: str | Path,
        members: str | Sequence[int] = "last 3",
        average: str = "probabilities",
        sequential: bool = False,
        load: Callable[[Path], nn.Module] | None = None,
    ) -> LineageEnsemble:
        """The ensemble of some of a lineage's finished generations.

        Args:
            output_dir: the folder with lineage.json.
            members: "last 3" for the three newest finished students without the teacher (the paper's Ens*3; "last 2"
                is its Ens*2); "all" for every finished generation and the teacher; or indices, as "1,2,3" or a list of
                whole numbers, where 0 is the teacher.
            average: see the class.
            sequential: see the class.
            load: see the class.

        Raises:
            FileNotFoundError: there is no lineage.json, or there are those of several seeds.
            ValueError: invalid members or average.
            LineageError: fewer finished generations than requested, or what the class raises.
        """
        folder = Path(output_dir)
        check_one_lineage("output_dir", folder)
        if not (folder / MANIFEST_NAME).is_file():
            raise FileNotFoundError(
                f"output_dir: {folder} has no {MANIFEST_NAME}, expected the folder of a lineage; give the output_dir "
                "that the lineage was trained into."
            )
        manifest = Manifest.read(folder)
        chosen = [
            Member(index, manifest.generations[index]["weights_sha256"])
            for index in select_generations(members, manifest)
        ]
        return cls(folder, chosen, average, sequential, load)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, sequential: bool = False, revision: str | None = None
    ) -> LineageEnsemble:
        """Loads an ensemble that `save_pretrained` saved or that was published.

        Args:
            path_or_repo: a folder such as OUTPUT_DIR/ensemble, whose members are read from the folders beside it, or
                a Hub repository, whose members are read from theirs at the commits it names.
            sequential: see the class.
            revision: branch, tag or commit of the Hub repository.

        Raises:
            FileNotFoundError: there is no ensemble.json.
            LineageError: it is no JSON, of a newer version, has a wrong field or a member that is not a generation
                beside it; or what the class raises.
            OSError: the Hub has no such repository, or cannot be reached.
        """
        if not Path(path_or_repo).exists() and is_repo_id(str(path_or_repo)):
            path = Path(str(cached_file(str(path_or_repo), ENSEMBLE_NAME, revision=revision)))
            members, average = read_ensemble(path, from_hub=True)
            return cls(None, members, average, sequential)
        path = Path(path_or_repo).resolve() / ENSEMBLE_NAME
        members, average = read_ensemble(path)
        return cls(path.parent.parent, members, average, sequential)

    def save_pretrained(
        self,
        folder: str | Path,
        metrics: Mapping[str, Mapping[str, float | None]] | None = None,
        write_card: Callable[[Mapping[str, Any], Mapping[str, Any]], str] | None = None,
    ) -> None:
        """Writes ensemble.json, which names the members and holds no weights, and README.md.

        Args:
            folder: in the lineage's folder, such as OUTPUT_DIR/ensemble; made if needed, an ensemble's is replaced.
            metrics: of the ensemble by split, for the card: {"test": {"accuracy": ...}}.
            write_card: from (manifest content, record of the ensemble) to the text of README.md, such as
                `born_again.hub.model_card.ensemble_card`; None writes none, and removes an existing one.

        Raises:
            LineageError: a folder outside the lineage's, or with other content; a member that lineage.json does not
                have.
            OSError: the folder cannot be written; an ensemble in it is intact.
        """
        if self.output_dir is None:
            raise LineageError(
                f"folder: got {folder} for an ensemble from the Hub, expected one from a lineage's folder, in "
                "which it is saved; a published one needs no saving."
            )
        target = Path(folder).resolve()
        if target.parent != self.output_dir or _GENERATION_FOLDER.fullmatch(target.name):
            raise LineageError(
                f"folder: got {folder}, expected a folder of its own beside its members in {self.output_dir}, which "
                f"it refers to by relative paths; take {self.output_dir / 'ensemble'}."
            )
        is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        if not is_free and not (target / ENSEMBLE_NAME).is_file():
            raise LineageError(
                f"folder: {folder} holds something that is no ensemble (it has no {ENSEMBLE_NAME}), expected a new or "
                "empty folder; nothing in it was touched."
            )
        manifest = Manifest.read(self.output_dir)
        for member in self.members:
            record = manifest.record(member.generation)
            if record is None or record["weights_sha256"] != member.weights_sha256:
                raise LineageError(
                    f"members: {manifest.path} does not have generation {member.generation} with the weights of this "
                    "ensemble; make the ensemble again with from_lineage."
                )
        record = {"members": [member.generation for member in self.members], "average": self.average}
        card = write_card and write_card(manifest.content, {**record, "metrics": metrics or {}})
        members = [
            {
                "generation": member.generation,
                "folder": f"../gen{member.generation}",
                "weights_sha256": member.weights_sha256,
            }
            for member in self.members
        ]
        content = {"format": FORMAT, "version": VERSION, "average": self.average, "members": members}
        # In this order: after a crash a folder without ensemble.json would be refused as something else.
        write_atomically(target / ENSEMBLE_NAME, json.dumps(content, indent=2) + "\n")
        if card is None:
            (target / "README.md").unlink(missing_ok=True)
        else:
            write_atomically(target / "README.md", card)

    @torch.no_grad()
    def forward(
        self, first: Tensor | None = None, /, *, state: Sequence[Tensor] | None = None, **inputs: Any
    ) -> EnsembleOutput:
        """Runs every member, and averages their predictions.

        Args:
            first: pixel_values or input_ids, where they are not given by name.
            state: as returned for the previous window, for members that carry one; None to begin.
            **inputs: of every member.

        Returns:
            Logits without gradient, and the next state.

        Raises:
            ValueError: labels, return_dict or past_key_values among the inputs; a state of another number of tensors.
        """
        for name in _REFUSED_INPUTS:
            if name in inputs:
                raise ValueError(
                    f"{name}: got one, expected the inputs alone; an ensemble returns logits (and a state) by name, "
                    "from which a loss can be computed."
                )
        if first is not None:
            name = self._first_network().main_input_name
            if name in inputs:
                raise TypeError(f"{name}: got it twice, by its place and by its name; expected it once.")
            inputs[name] = first
        outputs = [self._predict(index, inputs, own) for index, own in enumerate(self._split_state(state))]
        logits = [own for own, _ in outputs]
        if self.average == "probabilities":
            mean = mean_log_probabilities(logits)
        else:
            mean = torch.stack([widened(own) for own in logits]).mean(0)
        return EnsembleOutput(logits=mean, state=tuple(part for _, after in outputs for part in after) or None)

    def train(self, mode: bool = True) -> LineageEnsemble:
        """Stays in eval mode, whatever the mode: the members are trained."""
        return super().train(False)

    @property
    def config(self) -> PretrainedConfig:
        """The first member's; all members have the same labels or vocabulary."""
        return self._first_network().config

    @property
    def forward_signature(self) -> inspect.Signature:
        """The signature of the members' forward."""
        return inspect.signature(self._first_network().forward)

    @property
    def carries_state(self) -> bool:
        """Whether the members carry a recurrent state; see `born_again.teacher.carries_state`."""
        return any(self._state_parts)

    def get_output_embeddings(self) -> nn.Module | None:
        """The first member's, without values where `sequential`; None for image classifiers."""
        find = getattr(self._first_network(), "get_output_embeddings", None)
        return None if find is None else find()

    def extra_repr(self) -> str:
        """What the logits depend on, so that a teacher cache can tell ensembles apart."""
        members = ", ".join(member.weights_sha256[:12] for member in self.members)
        return f"average={self.average!r}, members=[{members}], own_pixels={self._renormalizations}"

    def _first_network(self) -> Any:
        return (self._skeleton or self.networks)[0]

    def _predict(
        self, index: int, inputs: Mapping[str, Any], state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A method of its own, so that a member loaded for it is freed before the next one is loaded."""
        if self.sequential:
            network = self._load(verified_folder(self.output_dir, self.members[index]))
        else:
            network = self.networks[index]
        inputs = renormalized(inputs, self._renormalizations[index])
        output = network(**inputs, **({} if state is None else {"state": state}))
        return logits_of(output), tuple(output.state) if self._state_parts[index] else ()

    def _split_state(self, state: Sequence[Tensor] | None) -> list[tuple[Tensor, ...] | None]:
        """Each member's part of a state."""
        if state is None:
            return [None] * len(self.members)
        if len(state) != sum(self._state_parts):
            raise ValueError(
                f"state: got {len(state)} tensors, expected {sum(self._state_parts) or 'none'} from members with "
                f"{self._state_parts}; pass what the ensemble returned for the previous window."
            )
        parts = iter(state)
        return [tuple(islice(parts, count)) for count in self._state_parts]

    def _add_member(self, member: Member) -> MemberInfo:
        folder = verified_folder(self.output_dir, member)
        network = self._load(folder)
        infos = MemberInfo.of(network, folder, member.generation)
        if not self.sequential:
            self.networks.append(network)
        elif not self._skeleton:
            self._skeleton.append(network.to("meta"))
        return infos

    def _load(self, folder: Path) -> nn.Module:
        network = self._load_network(folder).requires_grad_(False)
        for convert in self._conversions:
            network._apply(convert)
        return network

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LineageEnsemble:
        # to(), double() and the like are applied again to each member when it is loaded.
        if self.sequential:
            self._conversions.append(fn)
        return super()._apply(fn, recurse)


# ---- Evaluation after a training ----


def largest_ensemble(students: int) -> int:
    """How many members the largest ensemble has that is evaluated of so many students; 0 where there is none."""
    return max((count for count in ENSEMBLES if count <= students), default=0)


def missing_ensembles(manifest: Manifest, counts: Sequence[int]) -> list[list[int]]:
    """The ensembles of the newest students that the manifest does not have yet.

    Args:
        manifest: of the lineage.
        counts: number of members of each ensemble; those above the number of students are left out. Of independent
            runs all count as students.

    Returns:
        Indices of the members of each.
    """
    students = members_to_choose(manifest)
    known = [(record["members"], record["average"]) for record in manifest.content.get("ensembles", [])]
    wanted = [students[-count:] for count in sorted(set(counts)) if 1 <= count <= len(students)]
    return [members for members in wanted if (members, _AVERAGE) not in known]


def evaluate_ensemble(
    manifest: Manifest,
    members: Sequence[int],
    evaluate: Callable[[nn.Module], Mapping[str, Mapping[str, float]]],
    write_card: Callable[[Mapping[str, Any], Mapping[str, Any]], str] | None = None,
    load: Callable[[Path], nn.Module] | None = None,
) -> None:
    """Evaluates the mean probability of some generations, and saves the ensemble.

    Its record is added to the manifest, which the caller writes; OUTPUT_DIR/ensemble, which holds no weights, is
    replaced by this ensemble. If a member cannot be loaded, a warning is logged and no metrics are
    recorded.

    Args:
        manifest: of the lineage, its generations finished.
        members: their indices.
        evaluate: from a network to metrics by split.
        write_card: see `LineageEnsemble.save_pretrained`.
        load: see `LineageEnsemble`.

    Raises:
        LineageError: a member's weights are missing or changed.
    """
    folder = Path(manifest.path).parent
    weights = [manifest.generations[index]["weights_sha256"] for index in members]
    try:
        ensemble = LineageEnsemble.from_lineage(folder, members, _AVERAGE, load=load)
    except ValueError as error:
        if PartialState().is_main_process:
            logger.warning("The ensemble of generations %s is not evaluated: %s", members, error)
        metrics = {}
    else:
        measured = evaluate(ensemble)
        metrics = {split: finite_or_none(values) for split, values in measured.items()}

        def write() -> None:
            ensemble.save_pretrained(folder / FOLDER, metrics, write_card)
            write_predictions(
                folder / FOLDER / ensemble_predictions_name(members), predictions_by_split(measured), weights
            )

        on_first_process(write)
    record = {
        "members": list(members),
        "average": _AVERAGE,
        "weights_sha256": weights,
        "metrics": metrics,
    }
    with manifest.lock:
        manifest.content.setdefault("ensembles", []).append(record)
