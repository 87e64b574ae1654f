"""Two launches on the loopback interface as two nodes, each with a folder of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from example_scripts import EXAMPLES

FLAGS = ["--smoke", "--generations", "1", "--num_train_epochs", "8", "--save_steps", "5", "--threads", "1"]
FLAGS += ["--disable_tqdm", "True", "--output_dir", "out"]  # the same path, in another working directory


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def launch(folders: list[Path], *flags: str) -> list[subprocess.Popen]:
    port, nodes = free_port(), []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(EXAMPLES / "accelerate/multi_node.yaml"), "--num_processes", "2"]
        command += ["--num_machines", str(len(folders)), "--machine_rank", str(rank), "--main_process_port", port]
        nodes.append(
            subprocess.Popen(
                [*command, str(EXAMPLES / "run_cifar.py"), *FLAGS, *flags],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return nodes


def ended(nodes: list[subprocess.Popen], status: int | None = 0) -> str:
    said = "".join(node.communicate(timeout=500)[0] for node in nodes)
    assert status is None or [node.returncode for node in nodes] == [status] * len(nodes), said[-4000:]
    return said


def hashes(folder: Path) -> list[str]:
    content = json.loads((folder / "out/lineage.json").read_text())
    assert [record["computation"]["processes"] for record in content["generations"]] == [2, 2]
    return [record["weights_sha256"] for record in content["generations"]]


@pytest.mark.slow
def test_a_folder_each_where_the_second_node_is_replaced_by_an_empty_one(tmp_path):
    whole, nodes = tmp_path / "whole", [tmp_path / "first", tmp_path / "second"]
    running, end = launch(nodes), time.monotonic() + 300
    while not [*nodes[0].glob("out/checkpoints/gen1/checkpoint-*/trainer_state.json")]:
        assert time.monotonic() < end and running[0].poll() is None, ended(running)
        time.sleep(0.1)
    for node in running:
        node.send_signal(signal.SIGTERM)
    said = ended(running, None)
    assert "is a folder of its own on each node" in said and "Sent to other nodes: " in said
    shutil.rmtree(nodes[1])
    said = ended(launch(nodes))
    assert "resumed from checkpoint-" in said
    ended(launch([whole]))
    assert hashes(nodes[0]) == hashes(nodes[1]) == hashes(whole)

    shutil.rmtree(nodes[0])
    said = ended(launch(nodes), 1)
    assert "holds another lineage than on the first node" in said
