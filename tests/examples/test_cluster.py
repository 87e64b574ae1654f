"""The configurations for accelerate and the scripts for SLURM: loaded, and run where a CPU can."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import is_deepspeed_available
from example_scripts import EXAMPLES

ROOT = EXAMPLES.parent
CONFIGURATIONS = {
    "cpu": ("MULTI_GPU", 2, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "multi_node": ("MULTI_GPU", 16, 2),
    "one_gpu": ("NO", 1, 1),
    "zero3": ("DEEPSPEED", 8, 1),
}
JOBS = {path.stem: path for path in sorted((EXAMPLES / "slurm").glob("*.sbatch"))}
SMOKE = ["--smoke", "--generations", "1", "--num_train_epochs", "1", "--threads", "1", "--disable_tqdm", "True"]


def test_every_configuration_loads():
    files = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
    assert [path.stem for path in files] == [*CONFIGURATIONS]
    for path in files:
        config = load_config_from_file(str(path))
        found = config.distributed_type.value, config.num_processes, config.num_machines
        assert found == CONFIGURATIONS[path.stem]
        assert config.fsdp_config.get("fsdp_version", 2) == 2
        assert config.deepspeed_config.get("zero_stage", 3) == 3


def launch(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )


def _environment(**values: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **values}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("one_gpu", 1),
        ("cpu", 2),
        pytest.param(
            "zero3", 2, marks=pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
        ),
    ],
)
def test_what_a_cpu_can_run(tmp_path, name, processes):
    config = EXAMPLES / f"accelerate/{name}.yaml"
    command = ["--num_processes", str(processes), "examples/run_cifar.py", *SMOKE, "--bf16", "False"]
    done = launch("--config_file", config, *command, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    generations = json.loads((tmp_path / "out/lineage.json").read_text())["generations"]
    assert [record["status"] for record in generations] == ["finished"] * 2
    assert generations[1]["computation"]["processes"] == processes


# ---- SLURM ----

# In the place of srun the step runs here, scancel signals it, and scontrol notes what it is told.
STUBS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; echo $$ > "$STUBS/step"; exec "$@"',
    "scancel": 'kill -TERM "$(cat "$STUBS/step")"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STUBS/told"; fi',
    "accelerate": f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"',
    "python": f'exec {sys.executable} "$@"',
}


@pytest.fixture
def slurm(tmp_path):
    """Starts a job; `requeued` is what scontrol was told."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)

    def start(*words: str | Path, **variables: str) -> subprocess.Popen:
        (stubs / "step").unlink(missing_ok=True)
        values = {"STUBS": str(stubs), "PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
        return subprocess.Popen(["bash", *map(str, words)], cwd=ROOT, env=_environment(**values))

    start.step, start.requeued = stubs / "step", stubs / "told"
    return start


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.poll() in (None, 0, 3), path
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="bash")
def test_a_job_goes_back_in_the_queue_where_a_signal_stopped_it_and_only_there(slurm, tmp_path):
    # A training that leaves with 143 after SIGTERM, one that fails, one that ends.
    training = tmp_path / "training.sh"
    training.write_text(
        'trap "sleep 0.2; exit 143" TERM\ntouch "$1"\nwhile [ "$2" = waits ]; do sleep 0.05; done\nexit "$2"\n'
    )
    seeds = JOBS["seeds"].read_text().replace("python ", "bash ")
    job = tmp_path / "seeds.sbatch"
    job.write_text(seeds)
    for how, signum, status, requeued in (
        ("3", None, 3, ""),
        ("0", None, 0, ""),
        ("waits", signal.SIGUSR1, 143, "requeue 7\n"),
        ("waits", signal.SIGTERM, 143, "requeue 7\n" * 2),
    ):
        begun = tmp_path / f"begun-{how}-{signum}"
        process = slurm(job, training, begun, how, SLURM_ARRAY_TASK_ID="10")
        wait_for(begun, process)
        if signum is not None:
            process.send_signal(signum)
        assert process.wait(60) == status
        assert (slurm.requeued.read_text() if slurm.requeued.exists() else "") == requeued


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_written_as_bash_reads_it(name):
    assert subprocess.run(["bash", "-n", JOBS[name]]).returncode == 0
    text = JOBS[name].read_text()
    assert "#SBATCH --requeue\n" in text and "#SBATCH --signal=B:USR1@120\n" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus", "processes"), [("seeds", "1", 1), ("one_node", "2", 2), ("several_nodes", "2", 2)]
)
def test_a_job_that_is_preempted_goes_on_and_ends_like_one_that_is_not(slurm, tmp_path, name, gpus, processes):
    variables = {
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    hashes = []
    for folder in (tmp_path / "preempted", tmp_path / "whole"):
        own = folder / "seed3" if name == "seeds" else folder
        words = (JOBS[name], "examples/run_cifar.py", *SMOKE, "--num_train_epochs", "8", "--output_dir", folder)
        process = slurm(*words, **variables)
        if folder.name == "preempted":
            wait_for(own / "lineage.json", process)
            time.sleep(1)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(300) != 0 and slurm.requeued.read_text() == "requeue 7\n"
            process = slurm(*words, **variables)
        assert process.wait(500) == 0
        generations = json.loads((own / "lineage.json").read_text())["generations"]
        assert generations[0]["computation"]["processes"] == processes
        hashes.append([record["weights_sha256"] for record in generations])
    assert hashes[0] == hashes[1]
