"""`tsp doctor`: is this machine ready for a job, and if not, what to do.

    for check in examine(Path.cwd()):
        print(check["name"], check["ok"], check["found"], check["advice"])

It looks, and changes nothing. It says nothing about a model or a corpus: that is `tsp prune --dry-run`.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

GIB = 2**30
MIN_PYTHON = (3, 10)
MIN_FREE_GIB = 2
"""The environment's own files, the store and a small checkpoint; a large model needs its own size on top."""
MIN_MEMORY_GIB = 4

SHOWN_PACKAGES = ("torch", "deepspeed", "transformers", "mlflow", "datasets")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    """What to do where it is not ok."""


def examine(root: Path) -> list[dict[str, Any]]:
    """Look at everything a job needs.

    Args:
        root: working directory of the job.

    Returns:
        One dict per check: `name`, `ok`, `found`, and `advice`, which is empty where all is well.
    """
    return [
        asdict(check)
        for check in (
            check_python(),
            check_compiler(),
            check_ninja(),
            *check_packages(_requirements(), _installed),
            check_processors(),
            check_cpu_op(),
            check_store(root),
            check_disk(root),
        )
    ]


def check_python() -> Check:
    """The interpreter that runs this."""
    ok = sys.version_info >= MIN_PYTHON
    advice = "" if ok else f"use Python >= {'.'.join(map(str, MIN_PYTHON))}"
    return Check("Python", ok, f"{platform.python_version()}, {sys.executable}", advice)


def check_compiler() -> Check:
    """The C++ compiler that torch would call."""
    compiler = os.environ.get("CXX", "c++")
    path = shutil.which(compiler)
    if path:
        return Check("C++ compiler", True, path)
    advice = "install one (Debian, Ubuntu: apt-get install g++), or name it in CXX"
    return Check("C++ compiler", False, f"no {compiler}", advice)


def check_ninja() -> Check:
    """The build tool, on PATH or beside the interpreter (`Engine.start` looks there too)."""
    path = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return Check("ninja", path is not None, path or "none", "" if path else "pip install ninja")


def check_packages(requirements: list[Requirement] | None, installed: Callable[[str], str | None]) -> Iterator[Check]:
    """The versions of the main packages, and any other that is missing or out of its range.

    Args:
        requirements: of tsp; None where it is not installed.
        installed: the version of a package, None without it.
    """
    if requirements is None:
        yield Check("tsp", False, "not installed, runs from its sources", "pip install -e . in its folder")
        requirements = [Requirement(name) for name in SHOWN_PACKAGES]
    for requirement in requirements:
        version = installed(requirement.name)
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        if ok and requirement.name not in SHOWN_PACKAGES:
            continue
        found = version or "not installed"
        if not ok and version:
            found += f", needs {requirement.specifier}"
        yield Check(requirement.name, ok, found, "" if ok else f"pip install '{requirement}'")


def check_processors() -> Check:
    """GPUs, or else cores and memory."""
    if importlib.util.find_spec("torch") is None:
        return Check("processors", False, "unknown without torch", "install torch")
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Check("processors", True, "; ".join(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in devices))
    import psutil

    memory_gib = psutil.virtual_memory().total / GIB
    found = f"no GPU; {len(os.sched_getaffinity(0))} CPU cores, {memory_gib:.1f} GiB memory"
    if shutil.which("nvidia-smi"):
        advice = f"nvidia-smi is there, but torch {torch.__version__} sees no GPU: install a torch build with CUDA"
        return Check("processors", False, found, advice)
    if memory_gib < MIN_MEMORY_GIB:
        return Check("processors", False, found, f"the demo needs {MIN_MEMORY_GIB} GiB memory")
    return Check("processors", True, found)


def check_cpu_op() -> Check:
    """Whether the first job on a CPU will have to compile; no fault if so."""
    if importlib.util.find_spec("torch") is None:
        return Check("deepspeed's CPU op", True, "unknown without torch")
    from tsp.machine import compiled_cpu_op

    compiled = compiled_cpu_op()
    found = str(compiled) if compiled else "not compiled; the first job on a CPU waits about a minute for it, once"
    return Check("deepspeed's CPU op", True, found)


def check_store(root: Path) -> Check:
    """The tracking store of a job in this folder."""
    if importlib.util.find_spec("mlflow") is None:
        return Check("tracking store", False, "unknown without mlflow", "install mlflow")
    from tsp.tracking.ui import store_condition

    return Check("tracking store", *store_condition(root))


def check_disk(root: Path) -> Check:
    """Space for checkpoints."""
    free_gib = shutil.disk_usage(root).free / GIB
    ok = free_gib >= MIN_FREE_GIB
    advice = "" if ok else f"free at least {MIN_FREE_GIB} GiB, or work in a folder on another disk"
    return Check("free disk", ok, f"{free_gib:.1f} GiB", advice)


def _requirements() -> list[Requirement] | None:
    """What the installed tsp asks for, without its extras."""
    try:
        lines = importlib.metadata.requires("tsp") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    parsed = map(Requirement, lines)
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
