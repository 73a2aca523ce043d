"""The scripts that start a run on many machines are what their schedulers read, and start one here."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_shell(script: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    assert subprocess.run([bash, "-n", str(LAUNCH / script)], check=False).returncode == 0


def test_the_job_of_kubernetes_starts_a_command_that_can_be_started_again() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "OnFailure"
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"
    words = [*container["command"], *container["args"]]
    assert words[:3] == ["torchrun", "-m", "danlu"]
    assert words[words.index("--out") + 1].startswith(
        tuple(mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly"))
    )
    assert "--resume" in words
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    policy = job["spec"]["elasticPolicy"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]


def test_what_ray_calls_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("ray_train", LAUNCH / "ray_train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(300)))
    words = ["--data", str(text), "--data.vocab_size", "270", "--data.length", "12", "--data.batch", "2"]
    words += ["--model.dim", "16", "--steps", "2"]
    options = {"recipe": "lm-dense", "out": str(tmp_path / "run"), "words": words}
    module.train(options)
    module.train(options)
    with pytest.raises(RuntimeError, match="exit code 2"):
        module.train({**options, "recipe": "no-such-recipe"})


def test_the_slurm_script_starts_two_processes_and_asks_to_be_queued_again_if_they_fail(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    # What the scheduler gives: its own commands, and torchrun from this Python.
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, does in {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": f'case "$1" in show) echo 127.0.0.1;; *) echo "$@" >> "{tmp_path}/asked";; esac',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(300)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "LAUNCHER": str(LAUNCH / "torchrun.sh"),
        "PROCESSES": "2",
        "PORT": port,
        "RECIPE": "lm-dense",
        "RESTARTS": "0",
        "DANLU_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    words = ["--data", str(text), "--data.vocab_size", "270", "--data.length", "12", "--data.batch", "2"]
    words += ["--model.dim", "16", "--steps", "2"]
    done = subprocess.run([bash, str(LAUNCH / "slurm.sbatch"), *words], env=environment, timeout=280, check=False)
    assert done.returncode == 0
    assert (tmp_path / "runs" / "job" / "report.html").is_file()
    assert not (tmp_path / "asked").exists()
    (commands / "torchrun").write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run([bash, str(LAUNCH / "slurm.sbatch"), *words], env=environment, timeout=280, check=False)
    assert done.returncode == 1
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
