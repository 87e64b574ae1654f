"""Several nodes without a shared file system: the first one's folder is the truth, the others receive from it."""

from __future__ import annotations

import logging
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from accelerate.utils.environment import get_int_from_env
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from born_again._files import replaced_atomically, write_atomically
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256

logger = logging.getLogger(__name__)

_PIECE = 64 << 20  # bytes that are sent at a time
_SECONDS = 10  # until a new file of a network file system is seen by another node
_LOCAL_SIZES = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]


class NodeFolders:
    """The folder of a lineage on every node of a launch.

    With one node, and where all nodes share the folder, nothing is exchanged. Every process makes one and calls its
    methods at the same places.

    Args:
        folder: of the lineage, by the same path on every node.

    Attributes:
        is_shared: whether every node sees the first one's files.

    Raises:
        LineageError: a node's own folder holds another lineage than the first one's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._processes = PartialState()
        count = self._processes.num_processes
        local = get_int_from_env(_LOCAL_SIZES, count)
        self.is_shared = count <= max(gather_object([local])) if count > 1 else True
        if self.is_shared:
            return
        self.is_shared = all(gather_object([self._sees_first()]))
        if not self.is_shared:
            self._check_own()
            self._processes.wait_for_everyone()

    @property
    def _receives(self) -> bool:
        """Whether this process is the one of its node that writes what comes from the first node."""
        return self._is_elsewhere and self._processes.is_local_main_process

    def _sees_first(self) -> bool:
        name = broadcast_object_list([f".{uuid.uuid4().hex}.tmp"])[0]
        path, can_write = self.folder / name, [True]
        if self._processes.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError:  # a finished lineage in a folder that is read-only
                can_write = [False]
        is_seen, end = path.exists(), time.monotonic() + _SECONDS
        can_write = broadcast_object_list(can_write)[0]
        while can_write and not is_seen and time.monotonic() < end:
            time.sleep(0.2)
            is_seen = path.exists()
        self._is_elsewhere = can_write and not is_seen
        self._processes.wait_for_everyone()
        if self._processes.is_main_process:
            path.unlink(missing_ok=True)
        return not self._is_elsewhere

    def _check_own(self) -> None:
        """Refuses to write over a lineage of another experiment; a stale copy of this one is what a run leaves."""
        own = problem = None
        try:
            if (self.folder / MANIFEST_NAME).exists():
                own = Manifest.read(self.folder).spec
        except LineageError as error:
            problem = f"{error} (on {socket.gethostname()})"
        first = broadcast_object_list([own])[0]
        if own is not None and (first is None or own.differences(first)):
            problem = (
                f"output_dir: {self.folder} on {socket.gethostname()} holds another lineage than on the first node, "
                "whose files it would receive; move it away, or give another output_dir."
            )
        problems = [found for found in gather_object([problem]) if found is not None]
        if problems:
            raise LineageError(problems[0])
        if self._processes.is_main_process:
            logger.info(
                "%s is a folder of its own on each node: that of the first node is the lineage's, and the others "
                "receive what a generation begins with.",
                self.folder,
            )

    def receive(self, pattern: str) -> None:
        """Gives every node the first one's files that match, where its own are not the same; removes nothing.

        Args:
            pattern: of paths in the folder, such as "gen0/**/*".
        """
        if self.is_shared:
            return
        found = {}
        if self._processes.is_main_process:
            paths = sorted(path for path in self.folder.glob(pattern) if path.is_file() and not path.is_symlink())
            found = {path.relative_to(self.folder).as_posix(): _facts(path) for path in paths}
        found = broadcast_object_list([found])[0]
        lacking = [name for name, facts in found.items() if self._receives and _facts(self.folder / name) != facts]
        wanted = sorted({*gather_object(lacking)})
        for name in wanted:
            self._send(name, found[name][0], keeps=name in lacking)
        self._processes.wait_for_everyone()  # every process of a node reads what one of them has written
        if wanted and self._processes.is_main_process:
            size = sum(found[name][0] for name in wanted) / 2**20
            logger.info("Sent to other nodes: %d files of %s, %.1f MiB.", len(wanted), pattern, size)

    def _send(self, name: str, size: int, keeps: bool) -> None:
        path, device = self.folder / name, self._processes.device
        if self._processes.is_main_process:
            with open(path, "rb") as file:
                for start in range(0, size, _PIECE):
                    piece = bytearray(file.read(min(_PIECE, size - start)))
                    broadcast(torch.frombuffer(piece, dtype=torch.uint8).to(device))
            return

        def pieces() -> Any:
            for start in range(0, size, _PIECE):
                yield broadcast(torch.empty(min(_PIECE, size - start), dtype=torch.uint8, device=device))

        if not keeps:
            for _ in pieces():
                pass
            return
        with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
            for piece in pieces():
                file.write(piece.cpu().numpy().data)

    def on_other_nodes(self, step: Callable[[], Any]) -> None:
        """Does on each other node with a folder of its own what the first process does on the first."""
        if not self.is_shared and self._receives:
            step()


class GatherRandomStates(TrainerCallback):
    """Brings the random states of processes on other nodes into the first node's checkpoint, so that it is whole.

    Args:
        nodes: of the lineage.
        checkpoint_dir: of the generation.
    """

    def __init__(self, nodes: NodeFolders, checkpoint_dir: Path) -> None:
        self.nodes, self.checkpoint_dir = nodes, checkpoint_dir

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.nodes.is_shared:
            return
        folder = self.checkpoint_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        name = f"rng_state_{args.process_index}.pth"
        states = gather_object([(name, (folder / name).read_bytes())])
        if args.process_index == 0:
            for name, content in states:
                if not (folder / name).exists():
                    write_atomically(folder / name, content)
        self.nodes.on_other_nodes(lambda: shutil.rmtree(folder))
        PartialState().wait_for_everyone()


def _facts(path: Path) -> tuple[int, str] | None:
    """Size and SHA-256 of a file, None where there is none."""
    try:
        return path.stat().st_size, file_sha256(path)
    except FileNotFoundError:
        return None
