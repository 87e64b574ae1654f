"""Which checkpoint a training can go on from: the newest that was written to its end."""

from __future__ import annotations

import json
import logging
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_RNG = re.compile(r"rng_state_([0-9]{1,6})\.pth")
_CARRIED = re.compile(r"carried_state_[0-9]{1,6}_of_([0-9]{1,6})\.safetensors")

_STATE = "trainer_state.json"
_WEIGHTS = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
# What Trainer, our trainers and tokenizers leave in a checkpoint of whole files.
_USUAL = re.compile(
    r"(adapter_)?model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|(optimizer|scheduler|scaler)\.pt|rng_state(_[0-9]{1,6})?\.pth"
    r"|carried_state_[0-9]{1,6}_of_[0-9]{1,6}\.safetensors|training_args\.bin|spiece\.model|.*\.(json|jinja|txt|md|py)"
)
_INDEX = f"{_WEIGHTS}.index.json"
# Everything that reading a file of the wrong bytes can end in.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, OverflowError, struct.error, zlib.error)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a training, None where there is none.

    Those that are not are named in the log, with the file and what is wrong with it. Nothing is unpickled.

    Args:
        folder: the `output_dir` of the training's arguments; need not exist.
    """
    if not folder.is_dir():
        return None
    numbered = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    for step, checkpoint in sorted(((int(found[1]), path) for found, path in numbered if found), reverse=True):
        flaw = checkpoint_flaw(checkpoint, step)
        if flaw is None:
            return checkpoint
        logger.warning("%s cannot be gone on from (%s); one before it is looked for.", checkpoint, flaw)
    return None


def checkpoint_step(path: Path) -> int | None:
    """The step in the name of a checkpoint as Trainer writes it, None for any other name."""
    found = _CHECKPOINT.fullmatch(path.name)
    return None if found is None else int(found[1])


def is_torn(checkpoint: Path) -> bool:
    """Whether a kill can have left a checkpoint so, while it was written: without the file that Trainer writes last.

    A folder in which anything is that Trainer does not write into it is never called torn.
    """
    return has_usual_files(checkpoint) and _file_flaw(checkpoint / _STATE) is not None


def has_usual_files(checkpoint: Path) -> bool:
    """Whether a folder holds only files that are called as those of a checkpoint are."""
    return all(
        path.is_file() and not path.is_symlink() and _USUAL.fullmatch(path.name) for path in checkpoint.iterdir()
    )


def checkpoint_flaw(checkpoint: Path, step: int) -> str | None:
    """Why a training cannot go on from a checkpoint to the weights it would have had, None where it can.

    Trainer writes, on the first process, weights, optimizer, scheduler, scaler and trainer_state.json, in this order;
    every process writes the state of its random numbers, and what it carries from window to window, without waiting
    for the others. None of it is synced to the disk, so after a loss of power any file may be short or missing.

    Files are read as their readers do, without their objects: JSON is parsed; of safetensors the header is compared
    with the length of the file; the checksums of torch.save's archives are computed, which takes 0.05 s (0.2 s from a
    disk of 1 GB/s) for 200 MB. Weights have no checksum: a part of them that is wrong at the right length is not seen.

    A checkpoint of `save_only_model` has no optimizer, and so none of them is one to go on from. How many processes
    wrote it is known from the names of its files: where the last of three or more has written nothing, and carries
    nothing, that is not seen.

    Args:
        checkpoint: the folder.
        step: the number in its name, in optimisation steps.

    Returns:
        A few words that name the file.
    """
    try:
        if checkpoint.is_symlink() or not checkpoint.is_dir():
            return "it is no folder"
        # A link is none of Trainer's files, and may lead anywhere.
        files = {path.name: path for path in sorted(checkpoint.iterdir()) if path.is_file() and not path.is_symlink()}
        for name, path in files.items():
            flaw = _file_flaw(path)
            if flaw is not None:
                return f"{name}: {flaw}"
        missing = next((name for name in _needed(files) if name not in files), None)
        if missing is not None:
            why = "; save_only_model=True never writes it" if missing == "optimizer.pt" else ""
            return f"{missing} is missing{why}"
        state = _read_json(files[_STATE])
    except (OSError, ValueError) as error:  # ValueError: a run writes it anew at this moment
        return f"it cannot be read ({error})"
    written = state.get("global_step") if isinstance(state, dict) else None
    if type(written) is not int or written != step:
        return f"{_STATE}: its global_step is {ascii(written):.40}, expected {step}"
    return None


def _needed(files: dict[str, Path]) -> Iterator[str]:
    """Names of the files without which a training goes on to other weights, or not at all."""
    if _WEIGHTS not in files and _INDEX in files:
        index = _read_json(files[_INDEX])
        shards = index.get("weight_map") if isinstance(index, dict) else None
        yield from sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else (_WEIGHTS,)
    else:
        yield _ADAPTER if _ADAPTER in files and _WEIGHTS not in files else _WEIGHTS
    yield from ("optimizer.pt", "scheduler.pt", _STATE)
    carried = {int(found[1]) for name in files if (found := _CARRIED.fullmatch(name))}
    # One process writes rng_state.pth, so that a number says that there are two or more.
    ranks = {max(int(found[1]) + 1, 2) for name in files if (found := _RNG.fullmatch(name))}
    processes = max(carried | ranks, default=1)
    yield from ("rng_state.pth",) if processes <= 1 else (f"rng_state_{rank}.pth" for rank in range(processes))
    for count in sorted(carried):
        yield from (f"carried_state_{rank}_of_{count}.safetensors" for rank in range(count))


def _file_flaw(path: Path) -> str | None:
    """What is wrong with a file, of those that going on reads; None for any other."""
    try:
        if path.suffix == ".json":
            _read_json(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):  # compares header and length
                pass
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() if _has_checksums() else None
            if damaged is not None:
                return f"its part {damaged} has another checksum than when it was written"
    except (*_UNREADABLE, zipfile.BadZipFile, SafetensorError) as error:
        return f"cannot be read to its end ({error})"
    return None


def _has_checksums() -> bool:
    """Whether torch writes them: a process can tell it not to, which one that has not loaded torch has not done."""
    torch = sys.modules.get("torch")
    return torch is None or torch.serialization.get_crc32_options()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
