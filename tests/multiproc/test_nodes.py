"""Two nodes: the same end as on one; a node or a link that dies ends the job everywhere, and it is gone on with.

pytest tests/multiproc/test_nodes.py -s     prints the seconds until the end everywhere, of each fault
"""

import json
import shutil
import signal
import sys
import time

import pytest

from tests.models import REPOSITORY, corpus_file, free_port, model_folder, sample, tiny_model
from tests.multiproc.nodes import ADDRESSES, Nodes, why_not

pytestmark = pytest.mark.multiproc

PRUNE = REPOSITORY / "launchers/prune.py"
HELD = REPOSITORY / "tests/multiproc/killed_prune.py"
WEIGHTS = "model/model.safetensors"
LIMIT_S = 90
SETTINGS = {
    "data.block_tokens": 16,
    "eval.block_tokens": 16,
    "eval.speed_runs": 0,
    "eval.prompts": 0,
    "train.batch_size": 8,
    "stage2.steps": 4,
    "stage2.lora.rank": 4,
}
OPTIONS = (
    *("--model", "tiny-model", "--data", "tiny-text.jsonl", "--num-drop", "1", "--no-register"),
    *("--experiment", "nodes"),
    *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")),
)


@pytest.fixture(scope="module")
def nodes():
    if reason := why_not():
        pytest.skip(reason)
    made = Nodes()
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model and text, as each node has it."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_model(num_layers=4)
    model_folder(folder / "tiny-model", model)
    corpus_file(folder / "tiny-text.jsonl", sample(model, 64, 16))
    return folder


@pytest.fixture(scope="module")
def shared(inputs, tmp_path_factory):
    """A working directory that both nodes see, as on a network file system."""
    return shutil.copytree(inputs, tmp_path_factory.mktemp("shared") / "work")


@pytest.fixture(scope="module")
def whole(launch, inputs, tmp_path_factory):
    """The output of the job on two ranks of one node."""
    root = shutil.copytree(inputs, tmp_path_factory.mktemp("one") / "work")
    done = launch(PRUNE, *OPTIONS, "--output", "out", num_ranks=2, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "out"


def runs(root, output):
    """Of a job, by its folder."""
    from mlflow import MlflowClient

    from tsp.tracking.store import resolve_uri

    client = MlflowClient(resolve_uri(root))
    found = client.search_runs([client.get_experiment_by_name("nodes").experiment_id])
    return [run for run in found if run.data.tags["tsp.output"] == str(output)]


def ended_run(root, output):
    """The one run of a job, once it has its status: a watcher may be writing it."""
    deadline = time.monotonic() + 60
    while True:
        [run] = runs(root, output)
        if run.info.status != "RUNNING" or time.monotonic() > deadline:
            return run
        time.sleep(0.5)


def errors_of(log):
    return [line for line in log.read_text().splitlines() if line.startswith("error:")]


def end(nodes, jobs, cwds, limit_s=400):
    """Wait for both launchers to end well."""
    ended = nodes.seconds_to_the_end(jobs, limit_s)
    assert [job.poll() for job in jobs] == [0, 0], (ended, [logged(cwd) for cwd in cwds])


def logged(cwd):
    return {path.name: path.read_text()[-2000:] for path in cwd.glob("node*.log")}


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_one_and_need_no_shared_folder(nodes, inputs, whole, tmp_path):
    """Each has a working directory of its own, with copies of model and text; rank 0 alone writes."""
    cwds = [shutil.copytree(inputs, tmp_path / name / "work") for name in "ab"]
    before = sorted(path.relative_to(cwds[1]) for path in cwds[1].rglob("*"))
    end(nodes, nodes.start(PRUNE, *OPTIONS, "--output", "out", cwds=cwds), cwds)
    (cwds[1] / "node1.log").unlink()
    assert sorted(path.relative_to(cwds[1]) for path in cwds[1].rglob("*")) == before
    results = [json.loads((output / "result.json").read_text()) for output in (whole, cwds[0] / "out")]
    for key in ("dropped", "perplexity"):
        assert results[0][key] == results[1][key]
    assert (cwds[0] / "out" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def fault(nodes, shared, name, moment, output):
    """Start the job, let the fault happen at the moment, and return the exit codes of the launchers."""
    held = shared / f"{output}.held"
    arguments = (*OPTIONS, "--output", output)
    jobs = nodes.start(HELD, *arguments, cwds=[shared, shared], KILL_AFTER=moment, HELD_BY=str(held))
    while not held.exists():
        assert [job.poll() for job in jobs] == [None, None], logged(shared)
        time.sleep(0.1)
    strike = {
        "node 0 killed": lambda: nodes.kill(jobs[0]),
        "node 1 killed": lambda: nodes.kill(jobs[1]),
        "link down": nodes.unplug,
        "packets dropped": nodes.drop_silently,
    }
    strike[name]()
    held.unlink()
    ended = nodes.seconds_to_the_end(jobs, LIMIT_S)
    nodes.plug_in()
    print(f"\n{name} in {moment.partition(':')[0]}: node 0 ended after {ended[0]} s, node 1 after {ended[1]} s")
    assert None not in ended, f"no end everywhere within {LIMIT_S} s: {ended}, {logged(shared)}"
    return [job.returncode for job in jobs]


def check_run(shared, output, status, reason):
    run = ended_run(shared, shared / output)
    assert run.info.status == status
    assert reason in run.data.tags["tsp.failure"]
    assert not (shared / output / "model").exists()


def test_a_node_that_is_killed_in_stage_2_ends_the_job_everywhere(nodes, shared):
    codes = fault(nodes, shared, "node 1 killed", "stage2:2", "killed-1")
    assert codes == [1, -signal.SIGKILL]
    [line] = errors_of(shared / "node0.log")
    assert line.startswith("error: rank 1 on ")
    check_run(shared, "killed-1", "FAILED", "rank 1 on ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["link down", "packets dropped"])
@pytest.mark.parametrize("moment", ["journal:1", "stage2:2"])
def test_a_dead_link_ends_the_job_everywhere(nodes, shared, name, moment):
    output = f"{name}-{moment.partition(':')[0]}".replace(" ", "-")
    assert fault(nodes, shared, name, moment, output) == [1, 1]
    for number, other in enumerate((1, 0)):
        [line] = errors_of(shared / f"node{number}.log")
        assert f"rank {other} on " in line
        assert "silent for 60 s" in line
    check_run(shared, output, "FAILED", "rank 1 on ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moment", "status", "reason"),
    [
        ("node 0 killed", "stage2:2", "KILLED", "the process disappeared"),
        ("node 0 killed", "journal:1", "KILLED", "the process disappeared"),
        ("node 1 killed", "journal:1", "FAILED", "rank 1 on "),
    ],
)
def test_a_killed_job_is_gone_on_with_on_both_nodes(nodes, shared, whole, name, moment, status, reason):
    output = f"{name}-{moment.partition(':')[0]}".replace(" ", "-")
    fault(nodes, shared, name, moment, output)
    check_run(shared, output, status, reason)

    arguments = (*OPTIONS, "--output", output, "--resume", "latest")
    end(nodes, nodes.start(PRUNE, *arguments, cwds=[shared, shared]), [shared])
    assert "measurements of the run before are known" in (shared / "node0.log").read_text()
    assert (shared / output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    [run] = runs(shared, shared / output)
    assert (run.info.status, run.data.tags["tsp.failure"]) == ("FINISHED", "")


@pytest.mark.slow
def test_nodes_that_have_read_other_texts_are_refused_everywhere(nodes, inputs, tmp_path):
    cwds = [shutil.copytree(inputs, tmp_path / name / "work") for name in "ab"]
    lines = (cwds[1] / "tiny-text.jsonl").read_text().splitlines(keepends=True)
    (cwds[1] / "tiny-text.jsonl").write_text("".join(lines[::-1]))
    jobs = nodes.start(PRUNE, *OPTIONS, "--output", "out", cwds=cwds)
    nodes.seconds_to_the_end(jobs, LIMIT_S + 120)
    assert [job.poll() for job in jobs] == [2, 2]
    for number, cwd in enumerate(cwds):
        [line] = errors_of(cwd / f"node{number}.log")
        assert "rank 1 on " in line
        assert "has other texts than rank 0 on " in line
    assert not (cwds[0] / "out").exists()


@pytest.mark.slow
def test_a_model_that_one_node_lacks_is_said_by_all(nodes, inputs, tmp_path):
    cwds = [shutil.copytree(inputs, tmp_path / name / "work") for name in "ab"]
    shutil.rmtree(cwds[1] / "tiny-model")
    (cwds[1] / "tiny-model").mkdir()
    jobs = nodes.start(PRUNE, *OPTIONS, "--output", "out", cwds=cwds)
    nodes.seconds_to_the_end(jobs, LIMIT_S + 120)
    assert [job.poll() for job in jobs] == [2, 2]
    assert "(rank 1 on " in errors_of(cwds[0] / "node0.log")[0]
    assert not (cwds[0] / "out").exists()


# What `deepspeed` needs of ssh and pdsh: the check, the address, and one command on all hosts, `%n` being the number.
SSH = """#!/bin/sh
for last; do :; done
[ "$last" = "-I" ] && echo {address} || hostname
"""
PDSH = """#!{python}
import subprocess, sys
words = sys.argv[1:]
hosts, command = words[words.index("-w") + 1].split(","), " ".join(words[words.index("-w") + 2:])
own = "mount -t tmpfs tmpfs /dev/shm; "
enter = ["ip", "netns", "exec"]
started = [
    subprocess.Popen([*enter, {names}[{addresses}.index(host)], "sh", "-c", own + command.replace("%n", str(number))])
    for number, host in enumerate(hosts)
]
sys.exit(max(child.wait() for child in started))
"""


@pytest.mark.slow
def test_tsp_prune_starts_all_nodes_of_a_hostfile(nodes, command, inputs, whole, tmp_path, monkeypatch):
    """Through deepspeed's own multi-node runner; `ssh` and `pdsh` are scripts that enter the namespaces."""
    root = shutil.copytree(inputs, tmp_path / "work")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(SSH.format(address=ADDRESSES[0]))
    (programs / "pdsh").write_text(PDSH.format(python=sys.executable, names=nodes.names, addresses=ADDRESSES))
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    (root / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    (root / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=tspcable\n")
    words = ["tsp", "prune", "--hostfile", "hostfile", "--master-port", free_port()]
    done = command([*words, *OPTIONS, "--output", "out"], cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (root / "out" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
