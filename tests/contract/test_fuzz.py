"""Whatever stands in a file or an option: it is read, or refused in one printable line with exit code 2.

The suite runs some thousand cases, `make fuzz` 180,000 (profile `fuzz` of `tests/conftest.py`).
"""

import json
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.models import model_folder, tiny_model
from tsp.config import ModelConfig, load_config, parse_override
from tsp.errors import TspError
from tsp.journal import _read
from tsp.options import layer_indices
from tsp.policy import read_policy, read_requirement
from tsp.sharding import read_json, resolve
from tsp.slices import read_slices
from tsp.source import open_source
from tsp.yaml12 import read_yaml

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Text that is nearly YAML: the signs that mean something, and words of ours.
SIGNS = [*"{}[]:,-&*!|>%@`'\"#?\n \t0123456789.eE~=<\x00\u2028", "seed", "stage2", "lr", "<<", "nan", "ppl_ratio"]
YAMLISH = st.lists(st.sampled_from(SIGNS), max_size=40).map("".join)
WORDS = st.text(max_size=40) | YAMLISH


# In a module the profile is known; each test has as many, as the slow ones are not many.
cases = settings(max_examples=max(200, settings.default.max_examples))


def refused_or_read(call):
    """Both are right; nothing else is."""
    try:
        return call()
    except TspError as error:
        refusal = error
    assert refusal.exit_code == 2, repr(refusal)
    assert str(refusal).strip()
    return None


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def folder(place):
    return model_folder(place / "model", tiny_model(num_layers=2))


@cases
@given(YAMLISH | st.text(max_size=80) | TREES.map(json.dumps))
@example("a: " + "[" * 3000)
@example("? {a: 1}\n: 2")
@example("a: &a {b: *a}")
@example("[a]: b")
@example("2026-13-45: 1")
@example("a: 2026-99-99")
@example("a: !!int x")
@example("a: !!binary ///")
def test_yaml_of_a_config(place, text):
    path = place / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    content = refused_or_read(lambda: read_yaml(path, "--config"))
    if content is not None:
        refused_or_read(lambda: load_config([content]))
    refused_or_read(lambda: read_policy(path))
    refused_or_read(lambda: read_slices(str(path)))


@cases
@given(st.binary(max_size=80))
def test_bytes_that_are_no_text(place, content):
    path = place / "bytes.yaml"
    path.write_bytes(content)
    refused_or_read(lambda: read_yaml(path, "--config"))
    refused_or_read(lambda: read_json(path))
    _read(path)  # The journal cuts off what is no line of it.


@cases
@given(
    st.dictionaries(
        st.sampled_from(["prune", "stage1", "stage2", "data", "eval", "state", "seed", "x"]), TREES, max_size=3
    )
)
def test_a_config_of_anything(tree):
    refused_or_read(lambda: load_config([tree]))


@cases
@given(TREES | st.fixed_dictionaries({"zero_optimization": TREES}, optional={"bf16": TREES, "optimizer": TREES}))
@example({"zero_optimization": {"stage": [3]}})
@example({"zero_optimization": {"stage": {}}})
@example({"gradient_clipping": {"auto": "auto"}, "zero_optimization": {"stage": 3}})
def test_a_deepspeed_json(place, tree):
    import torch

    path = place / "ds.json"
    path.write_text(json.dumps(tree))
    content = refused_or_read(lambda: read_json(path))
    if content is not None:
        options = {"world_size": 1, "hidden_size": 32, "dtype": torch.float32}
        refused_or_read(lambda: resolve(content, load_config([{}]), **options))


@cases
@given(WORDS)
@example("ppl_ratio<=1e999")
@example("a<=0x10")
@example("a==" + "9" * 5000)
def test_a_requirement(text):
    found = refused_or_read(lambda: read_requirement(text))
    if found is not None:
        assert read_requirement(str(found)) == found


@cases
@given(WORDS, WORDS)
@example("seed", "9" * 5000)
@example("a" + ".b" * 2000, "1")
def test_an_override(key, value):
    given_ = refused_or_read(lambda: parse_override(f"{key}={value}"))
    if given_ is not None:
        refused_or_read(lambda: load_config([given_]))


@cases
@given(WORDS)
@example("9" * 5000)
@example("\u0661,\u0662")
def test_layers(text):
    refused_or_read(lambda: layer_indices("--layers", text))


@cases
@given(TREES)
@example({"weight_map": {"a": 3}})
@example({"weight_map": {"a": "../x"}, "metadata": 3})
def test_an_index_of_shards(folder, tree):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(tree))
    try:
        refused_or_read(lambda: open_source(ModelConfig(path=str(folder))))
    finally:
        path.unlink()


@cases
@given(
    st.binary(max_size=64) | TREES.map(lambda tree: json.dumps(tree).encode()), st.binary(max_size=32), st.booleans()
)
def test_a_header_of_safetensors(folder, header, behind, honest):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    length = len(header) if honest else len(header) + 2**40
    path.write_bytes(struct.pack("<Q", length) + header + behind)
    try:
        refused_or_read(lambda: open_source(ModelConfig(path=str(folder))))
    finally:
        path.write_bytes(good)
