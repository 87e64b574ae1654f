"""The repositories and files that a lineage is published as, and what is not published yet; without network access."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from born_again._files import write_atomically
from born_again.hub.model_card import any_model_card, ensemble_card, image_classifier_card, language_model_card
from born_again.lineage.folders import (
    CURVE_NAME,
    REPORT_NAME,
    REPORT_PICTURE_NAME,
    WEIGHTS_NAME,
    check_weights,
)
from born_again.lineage.lock import FolderLock
from born_again.lineage.manifest import LineageError, Manifest, is_repo_id
from born_again.models.remote_code import remote_code
from born_again.models.saved import read_settings

# An allow list: for example training_args.bin, a pickle that may hold a token, is never uploaded.
GENERATION_FILES = (
    WEIGHTS_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    CURVE_NAME,
)
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class HubSettings:
    """Where and how a lineage is published.

    Args:
        namespace: user or organisation.
        pattern: of a repository's name, with {name} of the lineage and {index} of the generation.
        private: whether new repositories are private.
        branch: to commit to, created if missing; None is main.
        license: for the cards, such as "apache-2.0"; None leaves it out.
        report: whether report.png, the picture of the lineage's report, goes into the repositories and their cards. It
            shows no item of the data. report.html, which does, is never published.

    Raises:
        ValueError: an invalid namespace, branch or license; a pattern that gives an invalid name, or the same name for
            two generations; a private or report that is neither True nor False.
    """

    namespace: str
    pattern: str = "{name}-gen{index}"
    private: bool = False
    branch: str | None = None
    license: str | None = None
    report: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.namespace, str) or not is_repo_id(f"{self.namespace}/name"):
            raise ValueError(
                f"hub_namespace: got {self.namespace!r}, expected the name of a user or an organisation, without '/'; "
                "give the one that the token may write to."
            )
        names = [self._named("name", index) for index in (0, 1)] if isinstance(self.pattern, str) else []
        if len(set(names)) < 2 or not all(is_repo_id(f"namespace/{name}") for name in names):
            raise ValueError(
                f"hub_name_pattern: got {self.pattern!r}, expected a plain name with {{index}} and optionally "
                "{name}, such as '{name}-gen{index}'."
            )
        for field in ("private", "report"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}: got {getattr(self, field)!r}, expected True or False.")
        for field, example in (("branch", "main"), ("license", "apache-2.0")):
            value = getattr(self, field)
            if value is not None and not (
                isinstance(value, str) and re.fullmatch(r"\w[\w./-]{0,95}", value, re.ASCII)
            ):
                raise ValueError(f"hub_{field}: got {value!r}, expected a plain name such as {example!r}, or None.")

    def repo(self, name: str, index: int) -> str:
        """The repository of a generation, namespace/name."""
        return f"{self.namespace}/{self._named(name, index)}"

    def _named(self, name: str, index: int) -> str:
        # Not str.format: a pattern read from a file could access attributes or ask for gigabytes of padding.
        return self.pattern.replace("{name}", name).replace("{index}", str(index))

    def ensemble_repo(self, name: str) -> str:
        """The repository of the lineage's ensemble."""
        return f"{self.namespace}/{name}-ensemble"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, for the manifest."""
        return dataclasses.asdict(self)


def unpublished(manifest: Manifest) -> dict[str, str]:
    """What is finished and not published.

    Args:
        manifest: of the lineage.

    Returns:
        From "gen2", "ensemble" or "collection" to the reason: the message of the last attempt, or "not tried yet".
        Ensemble and collection are included only after every generation of the spec is finished.
    """
    with manifest.lock:
        waiting = {
            f"gen{record['index']}": _reason(record["hub"])
            for record in manifest.generations
            if record["status"] == "finished" and not is_published(record["hub"])
        }
        if is_complete(manifest):
            held = manifest.content.get("hub") or {}
            collection = held.get("collection")
            if ensemble_to_publish(manifest) is not None:
                waiting["ensemble"] = _reason(held.get("ensemble"))
            if waiting or not is_published(collection) or collection.get("items") != list(collection_notes(manifest)):
                waiting["collection"] = _reason(collection)
        return waiting


def collection_notes(manifest: Manifest) -> dict[str, str]:
    """The repositories of a completely published lineage's collection, in order, each with its note."""
    gathered = {}
    for record in manifest.generations:
        index, parent = record["index"], record["parent"]
        origin = "the teacher" if parent is None else f"taught by generation {parent}"
        if manifest.spec.control is not None:
            origin = f"trained on labels, a control ({manifest.spec.control})"
        gathered[record["hub"]["repo"]] = f"Generation {index}, {origin}."
    ensemble = manifest.content["hub"].get("ensemble")
    if is_published(ensemble):
        gathered[ensemble["repo"]] = "The newest generations as one network."
    return gathered


def is_published(state: Mapping[str, Any] | None) -> bool:
    """Whether the state of a generation, ensemble or collection is published, with a repository or slug."""
    if not state or state.get("status") != "published":
        return False
    return bool(state.get("slug") or (state.get("repo") and state.get("commit")))


def is_complete(manifest: Manifest) -> bool:
    """Whether every generation of the spec is finished."""
    with manifest.lock:
        records = manifest.generations
        return len(records) > manifest.spec.generations and all(record["status"] == "finished" for record in records)


def ensemble_to_publish(manifest: Manifest) -> dict[str, Any] | None:
    """The newest evaluated ensemble; None if it is published or there is none."""
    measured = [record for record in manifest.content.get("ensembles", []) if record["metrics"]]
    if not measured:
        return None
    state = (manifest.content.get("hub") or {}).get("ensemble")
    newest = measured[-1]
    known = is_published(state) and state.get("weights_sha256") == newest["weights_sha256"]
    return None if known else newest


def _reason(state: Mapping[str, Any] | None) -> str:
    return (state or {}).get("message") or "not tried yet"


def generation_card(content: Mapping[str, Any], folder: Path, index: int, *, on_hub: bool = False) -> str:
    """The card of a generation, rendered from the manifest's content.

    Args:
        content: of lineage.json.
        folder: of the generation; config.json tells the task (the metrics do where it is missing, as where records
            are kept without weights), and training.png is shown if it exists.
        index: of the generation.
        on_hub: whether it is published: it shows of the lineage's report what is published beside it. In its folder
            it shows what exists.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if (folder / "config.json").is_file():
        is_image = read_settings(folder).get("model_type") == "timm_wrapper"
    elif folder.is_dir():
        is_image = all("perplexity" not in values for values in content["generations"][index]["metrics"].values())
    else:
        raise FileNotFoundError(
            f"{folder}: is missing, expected the folder of generation {index}; put it back, or make an empty one to "
            "render the card alone."
        )
    write = image_classifier_card if is_image else language_model_card
    if content["spec"].get("task") is not None:
        write = any_model_card
    links = _published_links(content, folder.parent) if on_hub else _local_links(folder.parent)
    return write(content, index, curve=CURVE_NAME if (folder / CURVE_NAME).is_file() else None, **links)


def _local_links(output_dir: Path) -> dict[str, str]:
    """What cards in the folders of a lineage show of its report."""
    names = {"report": REPORT_NAME, "picture": REPORT_PICTURE_NAME}
    return {what: f"../{name}" for what, name in names.items() if (output_dir / name).is_file()}


def _published_links(content: Mapping[str, Any], output_dir: Path) -> dict[str, str]:
    return {"picture": REPORT_PICTURE_NAME} if report_files(content, output_dir) else {}


def report_files(content: Mapping[str, Any], output_dir: Path) -> dict[str, bytes | Path]:
    """The picture of the report, by name, where it is there and was asked to be published."""
    path = output_dir / REPORT_PICTURE_NAME
    is_wanted = (content.get("hub") or {}).get("report") is True and path.is_file() and not path.is_symlink()
    return {path.name: path} if is_wanted else {}


def render_cards(output_dir: str | Path) -> list[Path]:
    """Renders the cards of the finished generations and of the ensemble again, from lineage.json.

    Returns:
        The paths of the cards.

    Raises:
        FileNotFoundError: there is no lineage.
        LineageError: lineage.json cannot be read, or another run uses the folder.
        OSError: a folder is missing or cannot be written.
    """
    folder = Path(output_dir)
    Manifest.read(folder)  # raises before a lock is made in another folder
    with FolderLock(folder):
        manifest = Manifest.read(folder)
        written = []
        for record in manifest.generations:
            if record["status"] == "finished":
                own = folder / f"gen{record['index']}"
                write_atomically(own / "README.md", generation_card(manifest.content, own, record["index"]))
                written.append(own / "README.md")
        measured = [record for record in manifest.content.get("ensembles", []) if record["metrics"]]
        if measured and (folder / "ensemble").is_dir():
            card = ensemble_card(manifest.content, measured[-1], **_local_links(folder))
            write_atomically(folder / "ensemble" / "README.md", card)
            written.append(folder / "ensemble" / "README.md")
        return written


def generation_files(manifest: Manifest, index: int) -> dict[str, bytes | Path]:
    """The files that a generation is published as, by name: those on the allow list, and some made for the Hub.

    config.json also names the code that loads the network without this package; lineage.json covers the lineage up to
    this generation.

    Raises:
        LineageError: the weights are missing or changed, or weights or config.json are a link.
        OSError: a file cannot be read.
        ValueError: config.json is no JSON object.
    """
    folder = manifest.path.parent / f"gen{index}"
    for name in (WEIGHTS_NAME, "config.json"):
        if (folder / name).is_symlink():
            raise LineageError(
                f"{folder / name}: is a link, expected the file itself, since no link is followed to what is "
                "published; put a copy in its place."
            )
    check_weights(folder, manifest.generations[index])
    with manifest.lock:
        content = copy.deepcopy(manifest.content)
    files: dict[str, bytes | Path] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and (path.name in GENERATION_FILES or _SHARD.fullmatch(path.name))
    }
    settings, code = remote_code(read_settings(folder))
    files |= {name: text.encode() for name, text in code.items()}
    files["config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    files |= report_files(content, folder.parent)
    files["README.md"] = generation_card(content, folder, index, on_hub=True).encode()
    files["lineage.json"] = (
        json.dumps(_truncated_manifest(content, index), indent=2, allow_nan=False) + "\n"
    ).encode()
    return files


def ensemble_files(manifest: Manifest, record: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """The files that an ensemble is published as: ensemble.json naming its members' repositories, and its card.

    Args:
        manifest: of the lineage, its members published.
        record: of the ensemble.
    """
    with manifest.lock:
        content = copy.deepcopy(manifest.content)
    members = []
    for index in record["members"]:
        generation = content["generations"][index]
        members.append(
            {
                "generation": index,
                "folder": f"../gen{index}",
                "weights_sha256": generation["weights_sha256"],
                "repo": generation["hub"]["repo"],
                "commit": generation["hub"]["commit"],
            }
        )
    named = {"format": "born_again.ensemble", "version": 1, "average": record["average"], "members": members}
    output_dir = manifest.path.parent
    return {
        "ensemble.json": (json.dumps(named, indent=2) + "\n").encode(),
        "README.md": ensemble_card(content, record, **_published_links(content, output_dir)).encode(),
        **report_files(content, output_dir),
    }


def _truncated_manifest(content: dict[str, Any], index: int) -> dict[str, Any]:
    """The manifest to publish beside a generation: up to this generation, which is marked as published."""
    kept = {name: value for name, value in content.items() if name not in ("ensembles", "restart")}
    kept["generations"] = content["generations"][: index + 1]
    if kept.get("hub"):
        unknown_here = ("ensemble", "collection", "newest")
        kept["hub"] = {name: value for name, value in kept["hub"].items() if name not in unknown_here}
    for record in kept["generations"]:
        # Without messages and times of publishing, so that repeated uploads are equal.
        record["hub"] = {name: (record["hub"] or {}).get(name) for name in ("status", "repo", "commit")}
    kept["generations"][index]["hub"] |= {"status": "published", "commit": None}
    return kept
