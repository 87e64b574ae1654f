"""Cached outputs of one teacher on one training set: where they are, how large they become, what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from born_again._files import write_atomically
from born_again.teacher.cache.storage import DiskRows, MemoryRows, RowLayout, RowStore
from born_again.teacher.precision import cpu_capabilities

# Of a configuration: where it came from, not what it computes.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def network_sha256(network: nn.Module) -> str:
    """SHA-256, hexadecimal, of what a network computes with: layers, configuration, every parameter and buffer."""
    digest = hashlib.sha256(f"{type(network).__qualname__} {network!r}".encode())
    config = getattr(network, "config", None)
    if hasattr(config, "to_dict"):
        values = {name: value for name, value in config.to_dict().items() if name not in _ORIGIN}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    # Buffers that no checkpoint holds are computed with too.
    for name, tensor in sorted({**dict(network.named_buffers()), **network.state_dict()}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def precision_of(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of an output beside weights and inputs, at the moment of the call."""
    autocast = torch.is_autocast_enabled(device.type)
    on_cuda = device.type == "cuda"
    return {
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "convolution_tf32": torch.backends.cudnn.allow_tf32 if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "cpu": None if on_cuda else [torch.backends.cpu.get_cpu_capability(), cpu_capabilities().get("cpu_name")],
        "threads": None if on_cuda else torch.get_num_threads(),  # sums are shared among them
        "torch": torch.__version__,
    }


def cache_identity(networks: Sequence[nn.Module], data: str, device: torch.device, **facts: Any) -> dict[str, Any]:
    """Everything that a cached output depends on.

    Args:
        networks: of the teacher, as they were given.
        data: `cache_fingerprint` of the training set.
        device: that they are on.
        **facts: whatever else, JSON-able.
    """
    teachers = [network_sha256(network) for network in networks]
    return {"format": 3, "teachers": teachers, "data": data, **precision_of(device), **facts}


def identity_name(identity: Mapping[str, Any]) -> str:
    """A folder's name: the first 20 digits of the identity's SHA-256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


logger = logging.getLogger(__name__)

HEADER_NAME, SIZES_NAME = "header.json", "exact_sizes.json"
_GIB = 1 << 30


class CachedOutputs:
    """Outputs by the cache keys of a training set, opened at the first lookup, when what they depend on is known.

    On disk each identity has a folder of its own in `folder`, named by its hash, so that outputs of another teacher,
    of other data or of another precision are never read.

    Args:
        folder: on disk; None caches in memory.
        keys: how many keys the training set has.
        limit_gib: their maximum size; None is half of the memory (a process's share of it) or disk that is free.
        processes: of this machine, which share its memory.
        identify: returns what outputs depend on, JSON-able; called once, at the first lookup.

    Attributes:
        layout: of one output, None until the first is cached or found.
        kind: what an output is, "logits" or "hidden states"; stored beside the outputs.
        sizes: for batches of so many rows, whether a row's output is bit-equal to that in a batch of full size;
            stored beside the outputs.

    Raises:
        ValueError: a folder that cannot be made or written.
    """

    def __init__(
        self,
        folder: Path | None,
        keys: int,
        limit_gib: float | None,
        processes: int,
        identify: Callable[[], dict[str, Any]],
    ) -> None:
        self.folder, self.keys, self.limit_gib, self.processes = folder, keys, limit_gib, processes
        self.layout: RowLayout | None = None
        self.kind: str | None = None
        self.sizes: dict[int, bool] = {}
        self._identify = identify
        self._identity: dict[str, Any] | None = None
        self._store: RowStore | None = None
        self._own_folder: Path | None = None
        self._is_open = False
        if folder is not None:
            self._check_folder(folder)

    def read(self, keys: np.ndarray, device: torch.device) -> tuple[np.ndarray, list[Tensor] | None]:
        """Looks outputs up.

        Args:
            keys: (n,) int64.
            device: for the tensors.

        Returns:
            Which are cached (n,) bool, and the parts of those alone, in order; None where none is.
        """
        self._open_existing()
        if self._store is None:
            return np.zeros(len(keys), bool), None
        rows, found = self._store.read(keys)
        if not found.any():
            return found, None
        return found, self.layout.unpack(rows if found.all() else rows[found], device)

    def write(self, keys: np.ndarray, parts: Sequence[Tensor], kind: str) -> None:
        """Caches outputs until the limit is reached.

        Args:
            keys: (n,) int64.
            parts: the tensors of the outputs, (n, ...) each.
            kind: the same for all.

        Raises:
            ValueError: tensors of another dtype or shape than those before.
        """
        self._open_existing()
        if self._store is None:
            if self.layout is not None:
                return  # it could not be opened
            self.layout, self.kind = RowLayout.of(parts), kind
            self._open()
        if self._store is not None and not self._store.closed:
            self._store.write(keys, self.layout.pack(parts))
            if self._store.closed:
                logger.info("Teacher cache: full with %s outputs; no more are added.", f"{self._store.count:,}")

    def remember_size(self, rows: int, exact: bool) -> None:
        """Records in `sizes` whether batches of so many rows are bit-equal."""
        self.sizes[rows] = exact
        if self._own_folder is not None and self._store is not None and not self._store.closed:
            text = json.dumps({str(size): found for size, found in sorted(self.sizes.items())})
            self._try(lambda: write_atomically(self._own_folder / SIZES_NAME, text))

    def close(self) -> None:
        """Closes files; the next lookup opens them again if the outputs are still valid."""
        if self._store is not None:
            self._store.close()
        self._is_open = False

    def _open_existing(self) -> None:
        """Opens the outputs that an earlier training cached on disk for the same identity."""
        if self._is_open:
            return
        self._is_open = True
        identity = self._identify()
        if identity == self._identity:
            return
        self._identity, self._store, self.layout, self.sizes = identity, None, None, {}
        if self.folder is None:
            return
        self._own_folder = self.folder / identity_name(self._identity)
        try:
            header = json.loads((self._own_folder / HEADER_NAME).read_text("utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning("teacher_cache: %s cannot be read (%s); it is made anew.", self._own_folder, error)
            header = {}
        if header.get("identity") != self._identity:
            shutil.rmtree(self._own_folder, ignore_errors=True)
            return
        self.layout, self.kind = RowLayout.from_json(header["layout"]), header["meaning"]
        self._open()

    def _open(self) -> None:
        """Logs how large the cache becomes, then makes or opens the store."""
        row, where = self.layout.row_bytes, "memory" if self.folder is None else str(self.folder)
        limit = self._limit_bytes()
        fitting = min(self.keys, limit // row)
        logger.info(
            "Teacher cache in %s: %s outputs of %s bytes, %.3g GiB when all are there, limit %.3g GiB%s.",
            where,
            f"{self.keys:,}",
            f"{row:,}",
            (self.keys * row) / _GIB,
            limit / _GIB,
            "" if fitting == self.keys else f": {fitting / self.keys:.0%} of them fit, the teacher computes the rest",
        )
        if self.folder is None:
            self._store = MemoryRows(self.keys, row, limit)
        else:
            self._try(self._open_on_disk)

    def _open_on_disk(self) -> None:
        self._own_folder.mkdir(parents=True, exist_ok=True)
        header = {"identity": self._identity, "layout": self.layout.to_json(), "meaning": self.kind}
        if not (self._own_folder / HEADER_NAME).is_file():
            write_atomically(self._own_folder / HEADER_NAME, json.dumps(header, indent=2))
        sizes = self._own_folder / SIZES_NAME
        if sizes.is_file():
            self.sizes |= {int(size): exact for size, exact in json.loads(sizes.read_text("utf-8")).items()}
        self._store = DiskRows(self._own_folder, self.keys, self.layout.row_bytes, self._limit_bytes())

    def _limit_bytes(self) -> int:
        if self.limit_gib is not None:
            return int(self.limit_gib * _GIB) // (self.processes if self.folder is None else 1)
        if self.folder is None:
            return psutil.virtual_memory().available // 2 // self.processes
        there = next(path for path in (self._own_folder, *self._own_folder.parents) if path.exists())
        used = sum(path.stat().st_size for path in self._own_folder.glob("shard-*"))
        return used + shutil.disk_usage(there).free // 2

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if self._store is not None:
                self._store.closed = True
            logger.warning(
                "teacher_cache: %s cannot be written (%s). The teacher computes every output; the training is not "
                "affected.",
                self.folder,
                error.strerror or error,
            )

    @staticmethod
    def _check_folder(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"teacher_cache_dir: {folder} cannot be made ({error.strerror or error}), expected a folder that can "
                "be written; give another one, or use teacher_cache='memory'."
            ) from error
