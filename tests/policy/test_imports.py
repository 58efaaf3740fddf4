"""The floors of the house, held against the imports as they are: who may import whom, and which library lives where.

A new module gets a floor here, a new use of a library a line: on purpose, so that both are decided and do not happen.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# A module imports only modules of its own floor and of those below. The longest prefix decides.
FLOORS = {
    "words": (
        "tsp",
        "tsp.errors",
        "tsp.yaml12",
        "tsp.config",
        "tsp.masking",
        "tsp.paths",
        "tsp.records",
        "tsp.progress",
        "tsp.settings",
        "tsp.shared",
        "tsp.demo",
        "tsp.files",
        "tsp.fresh",
        "tsp.policy",
        "tsp.slices",
    ),
    "maths": (
        "tsp.losses",
        "tsp.penalties",
        "tsp.selection",
        "tsp.targets",
        "tsp.demo.card",
        "tsp.demo.corpus",
        "tsp.demo.muon",
    ),
    "things": (
        "tsp.adapters",
        "tsp.chat",
        "tsp.checkpoint",
        "tsp.data",
        "tsp.decoder",
        "tsp.documents",
        "tsp.demo.train",
        "tsp.evaluation",
        "tsp.figures",
        "tsp.footprint",
        "tsp.gates",
        "tsp.linear",
        "tsp.live",
        "tsp.machine",
        "tsp.proof",
        "tsp.safety",
        "tsp.sharding",
        "tsp.shards",
        "tsp.sizes",
        "tsp.skeleton",
        "tsp.source",
        "tsp.surgery",
    ),
    "machines": (
        "tsp.engine",
        "tsp.heartbeat",
        "tsp.interrupts",
        "tsp.journal",
        "tsp.mounted",
        "tsp.numbers",
        "tsp.optimizer_state",
        "tsp.ranks",
        "tsp.states",
        "tsp.tracking",
        "tsp.training",
    ),
    "methods": ("tsp.methods",),
    "whole": (
        "tsp.advise",
        "tsp.audit",
        "tsp.bounds",
        "tsp.calibrate",
        "tsp.capacity",
        "tsp.choose",
        "tsp.compare",
        "tsp.drop",
        "tsp.evaluate",
        "tsp.evidence",
        "tsp.export",
        "tsp.gguf_file",
        "tsp.gguf_vocabulary",
        "tsp.grid",
        "tsp.job",
        "tsp.loaders",
        "tsp.monitor",
        "tsp.nodes",
        "tsp.outcome",
        "tsp.pipeline",
        "tsp.plan",
        "tsp.promote",
        "tsp.quantize",
        "tsp.registered",
        "tsp.remeasure",
        "tsp.resume",
        "tsp.saving",
        "tsp.search",
        "tsp.space",
        "tsp.study",
        "tsp.sweep",
        "tsp.tracked",
        "tsp.tune",
        "tsp.tuned",
        "tsp.verify",
    ),
    "doors": (
        "tsp.__main__",
        "tsp.cli",
        "tsp.cli_compare",
        "tsp.cli_models",
        "tsp.cli_monitor",
        "tsp.cli_plan",
        "tsp.cli_registry",
        "tsp.cli_runs",
        "tsp.cli_server",
        "tsp.cli_tune",
        "tsp.console",
        "tsp.doctor",
        "tsp.exits",
        "tsp.launch",
        "tsp.options",
        "tsp.report",
        "tsp.report_compare",
        "tsp.report_monitor",
        "tsp.report_plan",
        "tsp.report_registry",
        "tsp.report_tune",
        "launchers",
    ),
}

# Where a library may be imported. `tsp` stands for all floors but the words and the doors.
LIBRARIES = {
    "PIL": ("tsp.tracking",),
    "alembic": ("tsp.tracking",),
    "click": (
        "tsp.cli",
        "tsp.cli_compare",
        "tsp.cli_models",
        "tsp.cli_monitor",
        "tsp.cli_plan",
        "tsp.cli_registry",
        "tsp.cli_runs",
        "tsp.cli_server",
        "tsp.cli_tune",
        "tsp.launch",
        "tsp.options",
        "launchers",
    ),
    "datasets": ("tsp.documents",),
    "deepspeed": ("tsp.engine",),
    "filelock": ("tsp.study", "tsp.tracking"),
    "gguf": ("tsp.gguf_file", "tsp.loaders"),
    "huggingface_hub": ("tsp.source",),
    "jinja2": ("tsp.chat", "tsp.compare.page"),
    "lm_eval": ("tsp.evaluation.harness", "tsp.evaluation.zero_shot"),
    "matplotlib": ("tsp.compare.canvas", "tsp.compare.plots", "tsp.figures"),
    "mlflow": ("tsp.tracking",),
    "numpy": ("tsp.figures", "tsp.gguf_file", "tsp.outcome"),
    "optuna": ("tsp.study",),
    "packaging": ("tsp.doctor",),
    "peft": ("tsp.adapters",),
    "psutil": ("tsp.calibrate", "tsp.doctor", "tsp.exits", "tsp.tracking"),
    "pyarrow": ("tsp.documents",),
    "pydantic": ("tsp.config", "tsp.settings"),
    "rich": (
        "tsp.console",
        "tsp.report",
        "tsp.report_compare",
        "tsp.report_monitor",
        "tsp.report_plan",
        "tsp.report_registry",
        "tsp.report_tune",
    ),
    "safetensors": (
        "tsp.checkpoint",
        "tsp.drop",
        "tsp.gguf_file",
        "tsp.proof",
        "tsp.saving",
        "tsp.shards",
        "tsp.states",
    ),
    "sqlalchemy": ("tsp.tracking",),
    "tokenizers": ("tsp.demo.train",),
    "torch": ("tsp.doctor", "maths", "things", "machines", "methods", "whole"),
    "torchao": ("tsp.quantize",),
    "tqdm": ("tsp.demo.train", "tsp.progress"),
    "transformers": (
        "tsp.skeleton",
        "tsp.source",
        "tsp.checkpoint",
        "tsp.demo.train",
        "tsp.engine",
        "tsp.gguf_file",
        "tsp.linear",
        "tsp.evaluation.generation_speed",
        "tsp.proof",
        "tsp.quantize",
        "tsp.safety",
        "tsp.surgery",
        "tsp.tracking.registry",
    ),
    "yaml": ("tsp.yaml12", "tsp.tracked", "tsp.report", "tsp.tracking.registry", "tsp.tuned"),
}

# What takes more than a tenth of a second to import.
HEAVY = {
    "accelerate",
    "datasets",
    "deepspeed",
    "matplotlib",
    "mlflow",
    "numpy",
    "pandas",
    "peft",
    "pydantic",
    "torch",
    "transformers",
}

FAMILIES = re.compile(
    r"llama|gpt[-_]?(2|j|neo)|(?<![a-z])opt(?![a-z])|qwen|mi[sx]tral|bloom(?!ing)|falcon|gemma|(?<![a-z])phi(?![a-z])"
    r"|deepseek|codegen|(?<![a-z])mpt(?![a-z])",
    re.IGNORECASE,
)

MAX_LINES = 300

MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("tsp", "launchers")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def is_below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def floor_of(module: str) -> str:
    prefixes = {prefix: floor for floor, members in FLOORS.items() for prefix in members if is_below(module, prefix)}
    # `tsp` is the package itself: a new module below it has no floor before it is given one.
    prefixes = {prefix: floor for prefix, floor in prefixes.items() if prefix != "tsp" or module == "tsp"}
    assert prefixes, f"{module} has no floor; give it one in {Path(__file__).name}"
    return prefixes[max(prefixes, key=len)]


def imports_of(tree: ast.Module) -> set[str]:
    """Names of all modules that the code imports when it runs, also inside functions; not under TYPE_CHECKING."""
    only_for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in only_for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in full if name in MODULES}
            names |= modules or {str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def libraries_of(tree: ast.Module) -> set[str]:
    tops = {name.partition(".")[0] for name in imports_of(tree)}
    return tops - set(sys.stdlib_module_names) - {"tsp", "launchers"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    order = list(FLOORS)
    mine = order.index(floor_of(module))
    above = {
        name: floor_of(name)
        for name in imports_of(TREES[module])
        if name in MODULES and order.index(floor_of(name)) > mine
    }
    assert not above, f"{module} is on the floor of {order[mine]} and imports {above}"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_where_they_live(module):
    floor = floor_of(module)
    strayed = {
        library
        for library in libraries_of(TREES[module])
        if not any(place == floor or is_below(module, place) for place in LIBRARIES.get(library, ()))
    }
    assert not strayed, f"{module} imports {strayed}"


def test_every_place_of_a_library_is_in_use():
    unused = [
        (library, place)
        for library, places in LIBRARIES.items()
        for place in places
        if place not in FLOORS
        and not any(is_below(module, place) and library in libraries_of(tree) for module, tree in TREES.items())
    ]
    assert not unused, f"take out of LIBRARIES: {unused}"


@pytest.mark.parametrize("module", [module for module in MODULES if is_below(module, "tsp.methods")])
def test_methods_know_neither_machines_nor_tracking(module):
    forbidden = {name for name in imports_of(TREES[module]) if name.startswith(("deepspeed", "mlflow", "tsp.tracking"))}
    assert not forbidden


@pytest.mark.parametrize(
    "module", ["tsp.cli", "tsp.launch", "tsp.options", "tsp.exits", "tsp.errors", "tsp.paths", "tsp.methods"]
)
def test_doors_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    # methods has to read its presets
    allowed = {"pydantic"} if module == "tsp.methods" else set()
    assert set(loaded.stdout.split()) <= allowed


def test_config_needs_nothing_heavy_but_pydantic():
    code = f"import sys, tsp.config; print(*sorted({HEAVY!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["pydantic"]


@pytest.mark.parametrize("module", [module for module in MODULES if not is_below(module, "tsp.demo")])
def test_no_family_is_known_by_name(module):
    """Docstrings and comments may name families; strings and names in the code may not. llama.cpp is a program."""
    tree = TREES[module]
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    words = [
        (node.lineno, word)
        for node in ast.walk(tree)
        for word in (
            [node.value]
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
            else [node.id]
            if isinstance(node, ast.Name)
            else [node.attr]
            if isinstance(node, ast.Attribute)
            else []
        )
        if FAMILIES.search(word.replace("llama.cpp", ""))
    ]
    words += [(0, name) for name in imports_of(tree) if FAMILIES.search(name)]
    assert not words


@pytest.mark.parametrize("word", ["llama", "GPT2LMHeadModel", "opt", "facebook/opt-125m", "Qwen2", "phi", "gpt_neo"])
def test_the_family_pattern_finds_families(word):
    assert FAMILIES.search(word)


@pytest.mark.parametrize("word", ["option", "optimizer", "adopt", "graph", "prompt", "--option", "blooming", "empty"])
def test_the_family_pattern_leaves_words_alone(word):
    assert not FAMILIES.search(word)


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_syntax_is_that_of_python_3_10(module):
    ast.parse(MODULES[module].read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize("module", MODULES)
def test_first_lines_say_what_it_is_for(module):
    assert ast.get_docstring(TREES[module])
