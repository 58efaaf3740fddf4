"""What stands around the code: shipped YAML and JSON, dependencies, constraints, the make targets and the CI script."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tsp.cli import launched_prune
from tsp.config import load_config
from tsp.methods import METHODS, preset
from tsp.options import configs_from_options
from tsp.sharding import read_json, resolve
from tsp.yaml12 import read_yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {canonicalize_name(Requirement(line).name): Requirement(line) for line in PROJECT["dependencies"]}
TEST_EXTRA = {
    canonicalize_name(Requirement(line).name): Requirement(line) for line in PROJECT["optional-dependencies"]["test"]
}

# All but the one that holds no settings.
YAMLS = sorted(
    set((REPOSITORY / "tsp").rglob("*.yaml")) - {REPOSITORY / "tsp" / name for name in ("gguf_words.yaml", "gpus.yaml")}
)
EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))
JSONS = sorted((REPOSITORY / "ds_configs").glob("*.json"))

# Import name -> name in the index, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
# Come with a dependency, and are used where we use its inner parts.
COME_WITH = {"alembic": "mlflow", "sqlalchemy": "mlflow"}
NEVER_IMPORTED = {
    "accelerate": "transformers' HfDeepSpeedConfig asks for it",
    "ninja": "torch calls it to compile deepspeed's op",
}


OPTIONAL = {
    "gguf": "extra of its own, asked for where it is missing",
    "lm_eval": "extra `eval`, asked for where it is missing",
    "optuna": "extra `tune`, asked for where it is missing",
    "torchao": "extra `quantize`, asked for where it is missing",
}


def imported_libraries() -> set[str]:
    names = set()
    for folder in ("tsp", "launchers"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - set(OPTIONAL) - {"tsp", "launchers"}


def constraints() -> dict[str, Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_shipped_yaml_is_a_valid_config(path):
    content = read_yaml(path)
    assert content
    load_config([content])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_is_a_sweep_of_valid_jobs(path):
    options = launched_prune.make_context("prune", ["--config", str(path)]).params
    jobs = configs_from_options(options)
    assert len(jobs) > 1
    assert all(varied for varied, _ in jobs)
    assert {config.tracking.experiment for _, config in jobs} == {
        path.stem.replace("_", "-").replace("demo", "demo-sweep")
    }
    # The command that runs it stands at its head.
    assert f"experiments/{path.name}" in path.read_text() or "make sweep" in path.read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_goes_with_the_demo(method):
    demo = read_yaml(REPOSITORY / "tsp" / "demo" / "prune.yaml")
    load_config([demo, preset(method), {"prune": {"method": method}}])


def test_all_yaml_and_json_is_found():
    assert {"paper.yaml", "prune.yaml"} <= {path.name for path in YAMLS}
    assert {"paper_table", "ablations", "calibration_size"} <= {path.stem for path in EXPERIMENTS}
    assert {path.stem for path in JSONS} >= {"zero2", "zero3", "zero3_offload", "zero_infinity"}


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shipped_sharding_resolves_with_the_defaults(path, world_size, dtype):
    resolved = resolve(read_json(path), load_config([]), world_size=world_size, hidden_size=64, dtype=dtype)
    assert "auto" not in str(resolved)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.name)
def test_shipped_sharding_says_how_to_shard_and_nothing_else(path):
    assert set(read_json(path)) <= {"zero_optimization", "aio"}


def test_every_imported_library_is_a_dependency():
    needed = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in imported_libraries() - set(COME_WITH)}
    assert needed <= set(DEPENDENCIES), needed - set(DEPENDENCIES)


def test_every_dependency_is_needed():
    imported = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in imported_libraries()}
    assert set(DEPENDENCIES) == (imported - set(COME_WITH)) | set(NEVER_IMPORTED)


@pytest.mark.parametrize("name", [*DEPENDENCIES, *TEST_EXTRA])
def test_the_change_log_says_why_a_dependency_is_there(name):
    assert re.search(rf"^- `{re.escape(name)}`: \S", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", [*DEPENDENCIES, *TEST_EXTRA])
def test_the_tested_version_is_allowed(name):
    (pin,) = constraints()[name].specifier
    assert pin.operator == "=="
    assert "+" not in pin.version
    assert {**DEPENDENCIES, **TEST_EXTRA}[name].specifier.contains(pin.version)


def test_constraints_are_exact_and_name_no_index():
    assert all([pin.operator for pin in pinned.specifier] == ["=="] for pinned in constraints().values())
    assert "://" not in (REPOSITORY / "constraints.txt").read_text()
    assert "--" not in (REPOSITORY / "constraints.txt").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(
    ("target", "last"),
    [
        ("prune", "deepspeed launchers/prune.py --ds ds_configs/zero3.json"),
        ("test", 'OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile -m "not slow and not browser"'),
        ("lint", "mypy"),
        ("bench", "python benchmarks/run.py"),
        ("demo-model", "tsp demo train --output build/demo-model"),
    ],
)
def test_make_runs_what_it_says(target, last):
    command = ["make", "--dry-run", "--always-make", target]
    # These tests are run by make themselves, and may have been given variables of ours.
    inherited = {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "MARKERS", "PYTEST", "PYTHON", "WORKERS"}
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    printed = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True).stdout
    lines = printed.strip().splitlines()
    assert re.sub(r'^PATH="[^"]*/\.venv/bin:\$PATH" ', "", lines[-1].strip()) == last
    assert "-c constraints.txt" in printed


def test_no_gate_is_left_open():
    for name in ("Makefile", ".ci/run"):
        text = (REPOSITORY / name).read_text()
        assert "|| true" not in text
        assert "|| :" not in text
    assert (REPOSITORY / ".ci" / "run").stat().st_mode & 0o111


def test_launchers_and_sharding_are_shipped_where_they_are_looked_for():
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"launchers": "tsp/shipped/launchers", "ds_configs": "tsp/shipped/ds_configs"}
