"""The batch file with `srun` and `scontrol` played by scripts, and the manifest as far as a parser can tell."""

import os
import signal
import subprocess
import time

import pytest
import yaml

from tests.models import REPOSITORY
from tsp.cli import launched_prune

SBATCH = REPOSITORY / "launchers/slurm.sbatch"

PROGRAMS = {
    "scontrol": '[ "$1" = show ] && printf "node-a\\nnode-b\\n" || echo "$@" >> requeued',
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit $?; done',
    "deepspeed": 'echo "$@" >> started; touch running; sleep "${SECONDS_LONG:-0}"; exit "${EXIT_CODE:-0}"',
}


@pytest.fixture
def batch(tmp_path):
    """Starts the file as Slurm does, with variables of its own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "8"}

    def start(*words, **variables):
        path = f"{programs}:{os.environ['PATH']}"
        environment = {**os.environ, **slurm, **variables, "PATH": path}
        return subprocess.Popen(["bash", SBATCH, *words], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)

    start.root = tmp_path
    return start


def test_slurm_starts_a_launcher_on_each_node(batch):
    assert batch("--output", "out a").wait(20) == 0
    assert (batch.root / "hostfile.4711").read_text() == "node-a slots=8\nnode-b slots=8\n"
    common = f"--hostfile {batch.root}/hostfile.4711 --no_ssh --node_rank %d --master_addr node-a --master_port 24711"
    common += " launchers/prune.py --resume latest --output out a"
    assert (batch.root / "started").read_text().splitlines() == [common % 0, common % 1]
    assert not (batch.root / "requeued").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "ends", "queued"), [(1, 0, 0, True), (1, 3, 1, False), (2, 0, 2, False), (3, 0, 3, False)]
)
def test_slurm_tries_again_what_another_try_may_mend(batch, code, restarts, ends, queued):
    assert batch(EXIT_CODE=str(code), SLURM_RESTART_COUNT=str(restarts)).wait(20) == ends
    assert (batch.root / "requeued").exists() == queued


def test_slurm_queues_the_job_again_before_its_time_is_up(batch):
    job = batch(SECONDS_LONG="5")
    deadline = time.monotonic() + 20
    while not (batch.root / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(4) == 0
    assert (batch.root / "requeued").read_text() == "requeue 4711\n"


def test_slurm_is_asked_for_what_the_file_relies_on():
    asked = {line.removeprefix("#SBATCH ") for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--ntasks-per-node=1", "--requeue", "--signal=B:USR1@120"} <= asked


def test_the_manifest_of_kubernetes_fits_together():
    service, job = yaml.safe_load_all((REPOSITORY / "launchers/kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    nodes = next(int(one["value"]) for one in container["env"] if one["name"] == "NODES")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == nodes
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    [script] = container["args"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"{name}-$node.{pod['subdomain']} slots={container['resources']['limits']['nvidia.com/gpu']}" in script
    assert f"--master_addr {name}-0.{pod['subdomain']}" in script
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    words = script.replace("\\\n", " ").split("launchers/prune.py", 1)[1].split()
    assert launched_prune.make_context("prune", words).params["resume"] == "latest"
