"""Registered models: told, compared, taken out whole, served over HTTP, and what none of them needs cleared away."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from mlflow import MlflowClient

from tests.finished import finished
from tests.models import REPOSITORY, free_port
from tests.unit.test_tracking_registry import make_checkpoint
from tsp.errors import ConfigError, ModelError
from tsp.export import export
from tsp.promote import Wanted, promote
from tsp.registered import compare, describe, find, overview
from tsp.tracking.leftovers import leftovers, remove
from tsp.tracking.manifest import download_name
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.run import start_run
from tsp.tracking.spool import sync
from tsp.tracking.store import resolve_uri
from tsp.tracking.versions import registry

PPL = {"1": 11.0, "2": 12.0}
TEXT = "def f(x):"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A working folder whose jobs have registered two versions of `small`; the first is its champion."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for number, ppl in PPL.items():
        make_version(tmp_path, seed=int(number), ppl=ppl)
    promote(Wanted(name="small", version="1"), root=tmp_path)
    return tmp_path


def make_version(root: Path, *, seed: int, ppl: float) -> str:
    """As a job does: output below `mlruns/`, `result.json`, a version. The run's id."""
    tracker = start_run(root, experiment=None, run_name=None, tags={}, params={})
    output = root / "mlruns" / "output" / tracker.run_id
    torch.manual_seed(seed)
    checkpoint = make_checkpoint(output / "model")
    result = finished().result | {
        "checkpoint": str(checkpoint),
        "seed": seed,
        "settings": finished().result["settings"] | {"seed": seed},
        "perplexity": {"wiki": {"dense": 10.0, "bare_drop": 20.0, "pruned": ppl}},
    }
    (output / "result.json").write_text(json.dumps(result))
    tracker.artifact(output / "result.json")
    tracker.finish("FINISHED")
    about = {"run_id": tracker.run_id, "tags": {"base_revision": "abc"}, "description": "", "metadata": {}}
    register_checkpoint(tracker.uri, checkpoint, "small", **about)
    return tracker.run_id


def files_of(version: str) -> Path:
    """The folder that MLflow itself says a version's files are in."""
    client = MlflowClient(resolve_uri(Path.cwd()))
    return Path(client.get_model_version_download_uri("small", version).removeprefix("file://")) / "model"


def test_a_version_is_told_in_full(site):
    with registry(site) as client:
        told = describe(client, find(client, "models:/small@champion"))
        assert find(client, "small").version == find(client, "small/2").version == 2
    assert (told["model"], told["version"], told["aliases"]) == ("small", "1", ["champion"])
    assert (told["base_model"], told["base_revision"]) == ("tiny/model", "abc")
    assert (told["dropped"], told["num_layers"], told["method"]) == ([2, 5], 8, "sleb")
    assert told["measured"]["ppl_ratio"] == pytest.approx(1.1)
    assert told["calibration"]["fingerprint"] == "c" * 16
    assert told["link"].endswith(f"/runs/{told['run_id']}?workflowType=machine_learning")


def test_all_versions_are_listed_the_newest_first(site):
    with registry(site) as client:
        rows = overview(client, None)
        assert [(row["model"], row["version"], row["aliases"]) for row in rows] == [
            ("small", "2", []),
            ("small", "1", ["champion"]),
        ]
        with pytest.raises(ModelError, match="no registered model 'smal'; did you mean small"):
            overview(client, "smal")


def test_two_versions_differ_in_what_they_were_made_with_and_what_was_measured(site):
    with registry(site) as client:
        found = compare(client, "small/1", "small/2")
    assert found["made"] == []
    assert found["settings"] == [{"name": "seed", "a": 1, "b": 2}]
    rows = {row["name"]: row for row in found["measured"]}
    assert rows["ppl_ratio"]["b_to_a"] == pytest.approx(12.0 / 11.0)
    assert rows["ppl/wiki"] == {"name": "ppl/wiki", "a": 11.0, "b": 12.0, "b_to_a": pytest.approx(12 / 11)}


@pytest.mark.parametrize("text", ["small@nobody", "small/3", "small@", "a/b/c", ""])
def test_what_is_no_version_is_wrong_input(site, text):
    with registry(site) as client, pytest.raises(ModelError):
        find(client, text)


def test_an_exported_folder_is_what_was_registered_and_loads_without_mlflow(site):
    document = export("models:/small@champion", site / "out", root=site)
    assert document == {"model": "small", "version": "1", "output": str(site / "out"), "files": 5, "hashes": "ok"}
    for path in files_of("1").iterdir():
        ours, theirs = (site / "out" / path.name).read_bytes(), path.read_bytes()
        assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest()
    assert (site / "out" / "model.safetensors").samefile(files_of("1") / "model.safetensors")
    code = "import transformers as t; [c.from_pretrained('out') for c in (t.AutoTokenizer, t.AutoModelForCausalLM)]"
    subprocess.run([sys.executable, "-c", code], cwd=site, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        export("models:/small@champion", site / "out", root=site)


def test_an_exported_gguf_file_is_read_as_the_same_model(site):
    pytest.importorskip("gguf")
    document = export("models:/small@champion", site / "out", file_format="gguf", root=site)
    assert (document["files"], [path.name for path in (site / "out").iterdir()]) == (1, ["model.gguf"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.arange(40)[None]
    wanted, found = load(files_of("1")), load(site / "out", gguf_file="model.gguf")
    assert torch.equal(found(tokens).logits, wanted(tokens).logits)


def damage(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")


def take_away(folder):
    (folder / "tokenizer.json").unlink()


def add(folder):
    (folder / "modeling.py").write_text("print('mine')")


@pytest.mark.parametrize("file_format", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("change", "found"),
    [(damage, "config.json changed"), (take_away, "tokenizer.json is gone"), (add, "modeling.py was added")],
)
def test_files_that_were_not_registered_are_not_exported(site, change, found, file_format):
    change(files_of("1"))
    with pytest.raises(ModelError, match=re.escape(found)):
        export("models:/small/1", site / "out", file_format=file_format, root=site)
    assert sorted(path.name for path in site.iterdir()) == ["mlruns"]


def test_what_a_version_has_itself_can_go_and_the_last_copy_cannot(site):
    outputs = sorted((site / "mlruns" / "output").iterdir())
    assert sorted(one.path for one in leftovers(site, unregistered=False)) == [output / "model" for output in outputs]
    (files_of("2") / "model.safetensors").unlink()
    found = leftovers(site, unregistered=True)
    assert [one.why for one in found] == ["it is version 1 of small, which has its own files"]
    remove(site, found)
    assert found[0].path.parent.is_dir()
    assert not found[0].path.exists()
    assert leftovers(site, unregistered=False) == []
    export("models:/small@champion", site / "out", root=site)


def test_of_a_deleted_version_nothing_stays_but_of_a_running_job_all(site):
    tracker = start_run(site, experiment=None, run_name=None, tags={}, params={})
    running = site / "mlruns" / "output" / tracker.run_id / "model"
    running.mkdir(parents=True)
    client = MlflowClient(resolve_uri(site))
    gone, kept = files_of("2").parent, files_of("1").parent
    client.delete_model_version("small", "2")
    found = leftovers(site, unregistered=False)
    assert gone in [one.path for one in found if one.what == "logged model"]
    remove(site, found)
    assert not gone.exists()
    assert kept.is_dir()
    assert running.is_dir()
    tracker.finish("FAILED")
    assert running.parent not in [one.path for one in leftovers(site, unregistered=False)], "it may be resumed"
    for path in (running, running.parent):
        os.utime(path, (0, 0))
    found = leftovers(site, unregistered=False)
    assert (running.parent, "its job ended FAILED more than a day ago") in [(one.path, one.why) for one in found]


def test_logged_models_of_others_stay(site):
    client = MlflowClient(resolve_uri(site))
    run = client.create_run(client.create_experiment("theirs"))
    logged = client.create_logged_model(run.info.experiment_id, name="theirs", source_run_id=run.info.run_id)
    client.finalize_logged_model(logged.model_id, "READY")
    client.set_terminated(run.info.run_id)
    assert not [one for one in leftovers(site, unregistered=True) if one.what == "logged model"]


def test_a_registration_that_is_refused_for_good_holds_up_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    tracker = start_run(tmp_path, experiment=None, run_name=None, tags={}, params={})
    checkpoint = make_checkpoint(tmp_path / "model")
    assert tracker.register(checkpoint, "no/name", tags={}, description="", metadata={}) is None
    tracker.finish("FINISHED")
    assert sync(tmp_path) == []
    assert MlflowClient(resolve_uri(tmp_path)).get_run(tracker.run_id).info.status == "FINISHED"
    assert "MLflow refuses the registration" in caplog.text


def test_checkpoints_that_nobody_registered_go_only_when_asked(site):
    tracker = start_run(site, experiment=None, run_name=None, tags={}, params={})
    checkpoint = site / "mlruns" / "output" / tracker.run_id / "model"
    make_checkpoint(checkpoint)
    tracker.finish("FINISHED")
    assert checkpoint not in [one.path for one in leftovers(site, unregistered=False)]
    assert checkpoint in [one.path for one in leftovers(site, unregistered=True)]


def test_a_downloaded_version_stays_while_an_alias_leads_to_it(site):
    client = MlflowClient(resolve_uri(site))
    names = [download_name(client.get_model_version("small", number), client.tracking_uri) for number in PPL]
    for name in (*names, "small-v1-ofanotherone"):
        (site / "mlruns" / "cache" / name).mkdir(parents=True)
    fresh = [one.path.name for one in leftovers(site, unregistered=False) if one.what == "download"]
    assert fresh == [], "a job may read what was fetched just now"
    for name in (*names, "small-v1-ofanotherone"):
        os.utime(site / "mlruns" / "cache" / name, (0, 0))
    downloads = [one.path.name for one in leftovers(site, unregistered=False) if one.what == "download"]
    assert downloads == sorted([*names, "small-v1-ofanotherone"])[1:]
    assert names[0] not in downloads


def test_half_made_folders_go_when_they_are_old(site):
    half = site / "mlruns" / "cache" / ".download-x"
    half.mkdir(parents=True)
    assert half not in [one.path for one in leftovers(site, unregistered=False)]
    os.utime(half, (0, 0))
    assert half in [one.path for one in leftovers(site, unregistered=False)]


def test_another_store_says_nothing_of_these_outputs(site, monkeypatch):
    foreign = site / "mlruns" / "output" / ("f" * 32) / "model"
    foreign.mkdir(parents=True)
    assert foreign not in [one.path for one in leftovers(site, unregistered=True)]


def tsp(*words):
    return subprocess.run(
        [sys.executable, "-m", "tsp", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_commands_print_tables_and_only_delete_removes(site):
    assert re.search(r"small +│ 1 +│ champion +│ tiny/model", tsp("models", "list").stdout)
    shown = tsp("models", "show", "small@champion").stdout
    assert re.search(r"measured on wiki +│ e{16}, 40 x 32 tokens", shown)
    assert re.search(r"calibration text +│ text c{16}, 16 x 32 tokens", shown)
    assert re.search(r"ppl_ratio +│ 1.1 +│ 1.2 +│ 1.091", tsp("models", "diff", "small/1", "small/2").stdout)
    assert json.loads(tsp("gc", "--json").stdout)["deleted"] is False
    assert len(list((site / "mlruns" / "output").glob("*/model"))) == 2
    assert "2 things" in tsp("gc", "--delete").stdout
    assert tsp("gc").stdout == "nothing is left over\n"
    assert "as registered" in tsp("export", "models:/small@champion", "out").stdout
    wrong = tsp("models", "show", "small@chanpion")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


class Served:
    """`tsp serve` as a process."""

    def __init__(self, uri: str) -> None:
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tsp", "serve", uri, "--port", str(self.port)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.printed = ""
        while "Ctrl-C" not in self.printed:
            line = self.process.stdout.readline()
            assert line, self.printed
            self.printed += line

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=30) == 0

    def ask(self, **params: int) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations",
            data=json.dumps({"inputs": [TEXT], "params": params}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["predictions"][0]


def plain(version: str, num_new: int) -> str:
    """What transformers alone writes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(files_of(version))
    tokenizer = transformers.AutoTokenizer.from_pretrained(files_of(version))
    tokens = model.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=num_new, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_the_served_champion_answers_and_so_does_the_next(site):
    with Served("models:/small@champion") as server:
        assert server.printed.startswith("models:/small/1 answers")
        assert server.ask(max_new_tokens=7) == plain("1", 7)
        promote(Wanted(name="small", version="2"), root=site)
        # The alias was looked up at the start.
        assert server.ask() == plain("1", 64)
    with Served("models:/small@champion") as server:
        assert server.ask(max_new_tokens=7) == plain("2", 7) != plain("1", 7)


def test_what_is_not_as_it_was_registered_is_not_served(site):
    damage(files_of("1"))
    refused = tsp("serve", "models:/small@champion", "--port", str(free_port()))
    assert refused.returncode == 2
    assert "model/config.json changed" in refused.stderr
