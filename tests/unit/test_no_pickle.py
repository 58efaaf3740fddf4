"""What is registered holds no pickle, whatever lay beside the weights; and it is used with pickle turned off."""

import gzip
import io
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import REPOSITORY, model_folder, tiny_model
from tsp.config import ModelConfig
from tsp.drop import drop_layers
from tsp.errors import ModelError
from tsp.safety import known_files
from tsp.source import open_source
from tsp.tracking.fetch import checkpoint_path
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.run import start_run

PICKLES = {
    "pytorch_model.bin": lambda path: torch.save({"x": torch.zeros(2)}, path),
    "training_args.bin": lambda path: torch.save({"lr": 1.0}, path),
    "optimizer.pt": lambda path: torch.save({"state": {}}, path, _use_new_zipfile_serialization=False),
    "rng_state.pth": lambda path: torch.save([1], path),
    "scaler.pkl": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
    "old.pkl": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=0)),
    "model.joblib": lambda path: path.write_bytes(pickle.dumps([1], protocol=4)),
    # Under the name of another kind.
    "notes.txt": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=5)),
    "extra.model": lambda path: torch.save({"x": torch.zeros(2)}, path),
    "more.json": lambda path: path.write_bytes(gzip.compress(pickle.dumps([1]))),
}
OTHERS = {"setup.py": b"import os", "run.sh": b"#!/bin/sh", "model.onnx": b"\x08\x07", "events.out.tfevents.1": b"\0"}
GOOD = {
    "LICENSE": b"Apache-2.0",
    "spiece.model": b"\n\x0e\n\x05<unk>",
    "chat_template.jinja": b"{{ x }}",
    "README.md": b"#",
}


def is_pickle(path: Path) -> bool:
    """By Python's own disassembler, up to the end of a pickle; and of archives, whether one is in them."""
    if zipfile.is_zipfile(path):
        return True
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    try:
        # It keeps account of the stack: a text whose letters happen to be opcodes does not pass.
        pickletools.dis(content, io.StringIO())
    except Exception:  # noqa: BLE001  It raises what comes, and then it is none.
        return False
    return True


def stray(folder: Path) -> Path:
    for name, make in PICKLES.items():
        make(folder / name)
    for name, content in (OTHERS | GOOD).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A checkpoint among pickles, and all that was registered of it."""
    root = tmp_path_factory.mktemp("no-pickle")
    checkpoint = stray(model_folder(root / "out" / "model", tiny_model(num_layers=2)))
    tracker = start_run(root, experiment=None, run_name=None, tags={}, params={})
    wanted = {"run_id": tracker.run_id, "tags": {}, "description": "", "metadata": {}}
    register_checkpoint(tracker.uri, checkpoint, "tiny", **wanted)
    tracker.finish("FINISHED")
    return root, checkpoint, checkpoint_path("models:/tiny/1", root)


def test_the_scan_finds_every_pickle(registered):
    _, checkpoint, _ = registered
    assert {path.name for path in checkpoint.iterdir() if is_pickle(path)} == set(PICKLES)


def test_nothing_that_is_registered_is_a_pickle(registered):
    _, checkpoint, folder = registered
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert {"MLmodel", "config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert not [path for path in files if is_pickle(path)]
    there = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in folder.iterdir()} == there - set(PICKLES) - set(OTHERS)
    assert set(GOOD) <= {path.name for path in folder.iterdir()}


def test_a_version_works_with_pickle_turned_off(registered):
    """In a process of its own, as a server of the version is one, and which ends when it unpickles anything."""
    root, _, _ = registered
    code = """
import sys
def refuse(event, arguments):
    if event == "pickle.find_class":
        raise SystemExit(f"unpickled {arguments}")
import mlflow
from pathlib import Path
from tsp.tracking.store import open_store, resolve_uri
uri = resolve_uri(Path.cwd())
open_store(uri, Path.cwd())
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION
assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
mlflow.set_tracking_uri(uri)
sys.addaudithook(refuse)
print(mlflow.pyfunc.load_model("models:/tiny/1").predict(["w2 w3"])[0])
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_ALLOW")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=variables | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("w2 w3")


def test_what_lies_beside_the_weights_is_not_handed_on_either(tmp_path):
    dense = model_folder(tmp_path / "dense", tiny_model(num_layers=3))
    before = {path.name for path in dense.iterdir()}
    weights = load_file(dense / "model.safetensors")
    stray(dense)
    drop_layers(open_source(ModelConfig(path=str(dense))), (1,), tmp_path / "out")
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == before | set(GOOD) - {"README.md"}
    assert len(load_file(tmp_path / "out" / "model.safetensors")) < len(weights)


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_python_code_goes_with_a_model_that_names_it(tmp_path, place):
    folder = model_folder(tmp_path / "model", tiny_model(num_layers=2))
    (folder / "modeling_own.py").write_text("x = 1")
    assert "modeling_own.py" not in {path.name for path in known_files(folder)}
    content = json.loads((folder / place).read_text())
    (folder / place).write_text(json.dumps(content | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    assert "modeling_own.py" in {path.name for path in known_files(folder)}


def test_a_pickle_called_safetensors_is_refused(tmp_path):
    folder = model_folder(tmp_path / "model", tiny_model(num_layers=2))
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    assert {"model.safetensors", "other.safetensors"} <= {path.name for path in known_files(folder)}
    torch.save({"x": torch.zeros(2)}, folder / "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors is missing or damaged"):
        known_files(folder)
