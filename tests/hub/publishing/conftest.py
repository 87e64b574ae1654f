"""One Hub server for a module of tests, and finished lineages to publish there."""

import shutil
from pathlib import Path

import pytest
from hub_fixtures import redirected
from hub_server import HubServer
from lineage_folders import WORDS, add_ensemble, lineage, network


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for the module: a client that is made anew reads the certificates of the system for a tenth of a second."""
    with HubServer(tmp_path_factory.mktemp("hub_home")) as server, redirected(server):
        yield server


@pytest.fixture
def hub(server) -> HubServer:
    """The server of the module, empty, and nothing downloaded from it yet."""
    server.reset()
    shutil.rmtree(server.home / "hub", ignore_errors=True)
    yield server
    server.reset()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A teacher and a student of images; read only."""
    return lineage(tmp_path_factory.mktemp("images") / "out", [network("image", seed) for seed in range(2)])


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A teacher, two students, and the ensemble of these; read only."""
    networks = [network("lstm", seed) for seed in range(3)]
    folder = lineage(tmp_path_factory.mktemp("texts") / "out", networks, words=[WORDS] * 3)
    add_ensemble(folder, [1, 2])
    return folder


@pytest.fixture
def folder(images, tmp_path) -> Path:
    """A copy of `images`."""
    return shutil.copytree(images, tmp_path / "out")


@pytest.fixture
def text_folder(texts, tmp_path) -> Path:
    """A copy of `texts`."""
    return shutil.copytree(texts, tmp_path / "out")
