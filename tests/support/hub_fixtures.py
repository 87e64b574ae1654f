"""Fixtures that let the real clients of a test talk to a small Hub on the loopback interface (hub_server.py).

`hub` is a fresh HubServer for one test; while it lives, huggingface_hub, transformers, timm and datasets inside of
pytest's own process use it as their Hub, although conftest.py has set HF_HUB_OFFLINE for the whole suite. Three things
make the switch, and all are undone afterwards:

- The clients read their environment when they are imported, so new variables come too late: the module constants are
  replaced instead. Passing HfApi(endpoint=...) would not be enough, since HF_HUB_OFFLINE forbids every request.
- A few objects are made at import and keep the address of that moment: `huggingface_hub.create_repo` and the other
  functions of that kind are methods of one of them.
- The HTTP client that all of huggingface_hub shares is closed before and after, since it reads the proxies when it is
  made. The server is the proxy for every other address, so nothing leaves the machine: `hub.outside` shows what tried.

The process is not logged in: HF_TOKEN and the token files are out of sight, so a real token is never sent. Tests pass
`token=hub.token`, or ask for `logged_in_hub`, where HF_TOKEN is the token of the server.

Use another process with env=hub.environment() for what cannot be undone here: code files of a repository
(trust_remote_code), which stay in sys.modules; evaluate, whose address is not replaced; and kills.
"""

from __future__ import annotations

import contextlib
import io
import types
from collections.abc import Iterator

import pytest
from hub_server import HubServer
from hub_store import Commit, Store


@contextlib.contextmanager
def redirected(hub: HubServer) -> Iterator[None]:
    """Makes the clients of this process talk to a server; what `hub` does, for tests with servers of their own."""
    from huggingface_hub.utils import close_session

    try:
        with pytest.MonkeyPatch.context() as patch:
            replace_settings(hub, patch)
            close_session()
            yield
    finally:
        close_session()


def replace_settings(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Of huggingface_hub, transformers and datasets, and the few variables that are read when they are needed."""
    # Imported now, before anything is replaced: a module that copies a constant must not copy one of ours.
    import datasets
    import huggingface_hub.file_download
    import huggingface_hub.hf_file_system
    import huggingface_hub.utils._http
    import transformers.utils.hub
    from huggingface_hub import constants, hf_api

    # HF_HUB_OFFLINE stays, for a child process that a test starts without hub.environment().
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    for name, value in hub.proxies().items():
        patch.setenv(name, value)

    cache = hub.home / "hub"
    replaced = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(hub.home),
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(hub.home / "token"),
        "HF_STORED_TOKENS_PATH": str(hub.home / "stored_tokens"),
    }
    # What only a newer huggingface_hub has.
    if hasattr(constants, "HF_URL_HOSTS"):
        replaced["HF_URL_HOSTS"] = constants.HF_URL_HOSTS | {"127.0.0.1"}
    if hasattr(constants, "AGENT_HARNESSES_PATH"):
        replaced["AGENT_HARNESSES_PATH"] = str(hub.home / ".agent_harnesses.json")
    for name, value in replaced.items():
        patch.setattr(constants, name, value)
    http = huggingface_hub.utils._http
    if hasattr(http, "_HUB_ORIGINS"):
        patch.setattr(http, "_HUB_ORIGINS", http._HUB_ORIGINS | {http._url_origin(hub.endpoint)})
    patch.setattr(hf_api.api, "endpoint", hub.endpoint)
    files = huggingface_hub.hf_file_system.hffs
    patch.setattr(files, "endpoint", hub.endpoint)
    patch.setattr(files._api, "endpoint", hub.endpoint)
    patch.setattr(transformers.utils.hub, "_hf_api", None)

    settings = datasets.config
    patch.setattr(settings, "HF_ENDPOINT", hub.endpoint)
    patch.setattr(settings, "HUB_DATASETS_URL", hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
    patch.setattr(settings, "HF_HUB_OFFLINE", False)
    patch.setattr(settings, "HF_DATASETS_OFFLINE", False)
    patch.setattr(settings, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    patch.setattr(settings, "HF_DATASETS_CACHE", hub.home / "datasets")


@pytest.fixture
def hub(tmp_path) -> Iterator[HubServer]:
    """A fresh Hub that this process talks to, without being logged in."""
    with HubServer(tmp_path / "hub_home") as server, redirected(server):
        yield server


@pytest.fixture
def logged_in_hub(hub, monkeypatch) -> HubServer:
    """The same, where clients find its token in HF_TOKEN."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that huggingface_hub would have waited before it tried again; it tries again at once."""
    import time

    from huggingface_hub.utils import _http

    seconds: list[float] = []
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(**{**vars(time), "sleep": seconds.append}))
    return seconds


def put_cifar100(store: Store, train: int = 40, test: int = 20, oid: str | None = None) -> Commit:
    """uoft-cs/cifar100 in its real layout, with a few images of noise.

    Args:
        store: of the Hub that is to have it.
        train: images in the train split.
        test: images in the test split.
        oid: the commit's id, where a test pins the one of the real dataset.
    """
    import datasets
    import numpy as np
    from PIL import Image

    fine, coarse = [f"fine_{index}" for index in range(100)], [f"coarse_{index}" for index in range(20)]
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=fine),
            "coarse_label": datasets.ClassLabel(names=coarse),
        }
    )
    generator = np.random.default_rng(0)
    files = {
        "README.md": b"---\nlicense: unknown\nconfigs:\n- config_name: cifar100\n  data_files:\n"
        b"  - split: train\n    path: cifar100/train-*\n  - split: test\n    path: cifar100/test-*\n---\n# CIFAR-100\n"
    }
    for split, rows in {"train": train, "test": test}.items():
        labels = [index * 7 % 100 for index in range(rows)]
        pixels = generator.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
        columns = {
            "img": [Image.fromarray(image) for image in pixels],
            "fine_label": labels,
            "coarse_label": [label // 5 for label in labels],
        }
        content = io.BytesIO()
        datasets.Dataset.from_dict(columns, features).to_parquet(content)
        files[f"cifar100/{split}-00000-of-00001.parquet"] = content.getvalue()
    return store.put("dataset", "uoft-cs/cifar100", files, oid=oid)
