"""Checkpoints that somebody made to harm, or that came damaged: refused in one line, soon, and nothing is left."""

import contextlib
import json
import os
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models import model_folder, sharded, tiny_model
from tsp.cli import main
from tsp.config import ModelConfig
from tsp.errors import ModelError
from tsp.safety import check_folder, weight_files
from tsp.source import open_source

SECONDS = 10
INDEX, FIRST, SECOND = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
QUERY, KEY = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The same model in one file and in two."""
    place = tmp_path_factory.mktemp("good")
    model_folder(place / "whole", tiny_model(num_layers=3))
    shutil.copytree(place / "whole", place / "sharded")
    sharded(place / "sharded", 2)
    return place


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def config(**changes):
    return lambda folder: edit(folder / "config.json", lambda content: content.update(changes))


def index(change):
    return lambda folder: edit(folder / INDEX, lambda content: change(content["weight_map"]))


def first_file(name):
    """The index calls the first file by another name, under which it can be found."""

    def spoil(folder):
        target = Path(os.path.join(folder, name.format(folder=folder)))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / FIRST, target)
        edit(folder / INDEX, lambda content: content["weight_map"].update(
            {tensor: name.format(folder=folder) for tensor, file in content["weight_map"].items() if file == FIRST}
        ))  # fmt: skip

    return spoil


def header(change=lambda content: None, *, raw=None, length=None):
    def spoil(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        change(entries)
        encoded = json.dumps(entries).encode() if raw is None else raw
        path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + content[end:])

    return spoil


def entry(**changes):
    return header(lambda entries: entries[QUERY].update(changes))


def tensor(change):
    """The file is a good one, with another tensor in it."""

    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        weights[QUERY] = change(weights[QUERY])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return spoil


def link(name, target="../elsewhere"):
    def spoil(folder):
        (folder / target).parent.mkdir(exist_ok=True)
        shutil.move(folder / name, folder / target)
        (folder / name).symlink_to(target)

    return spoil


def all_of(*spoils):
    return lambda folder: [spoil(folder) for spoil in spoils]


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


DEEP = b"[" * 100_000
DAMAGED = "model.safetensors is missing or damaged"
# What is done to the folder, and what the message says.
OF_AN_INDEX = {
    "a path out of the folder": (first_file("../x.safetensors"), r"must name files like .*'\.\./x\.safetensors'"),
    "two folders up": (first_file("../../x.safetensors"), "must name files like"),
    "an absolute path": (first_file("{folder}/../x.safetensors"), "must name files like"),
    "a folder below": (first_file("below/x.safetensors"), "must name files like"),
    "a pickle": (first_file("x.bin"), "must name files like"),
    "a missing file": (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing or damaged"),
    "a folder for a file": (index(lambda names: names.update({QUERY: "."})), "must name files like"),
    "a number for a file": (index(lambda names: names.update({QUERY: 7})), "must name files like"),
    "a zero byte": (index(lambda names: names.update({QUERY: "a\0.safetensors"})), "must name files like"),
    "a tensor that no file has": (index(lambda names: names.update(ghost=FIRST)), "tensor ghost is not in it"),
    "a tensor of another file": (index(lambda names: names.update({QUERY: FIRST})), f"are at odds: tensor {QUERY}"),
    "a tensor left out": (index(lambda names: names.pop(QUERY) and None), f"{QUERY} is in it and not in the index"),
    "an empty index": (index(lambda names: names.clear()), "weight_map must name a file"),
    "a list for an index": (write(INDEX, b"[]"), "must hold an object, got list"),
    "a list for a map": (write(INDEX, b'{"weight_map": ["x"]}'), "weight_map must name a file"),
    "an index without end": (write(INDEX, DEEP), "missing or damaged: maximum recursion"),
    "one shard elsewhere": (link(SECOND), "is a link out of the model's folder"),
    "another shape in a shard": (
        lambda folder: save_file(load_file(folder / FIRST) | {"lm_head.weight": torch.zeros(2, 2)}, folder / FIRST),
        "tensor lm_head.weight must be of shape",
    ),
}
OF_A_HEADER = {
    "a header of 2^60 bytes": (header(length=2**60), "model.safetensors is missing or damaged: header too large"),
    "a header of 2^64 - 1 bytes": (header(length=2**64 - 1), "header too large"),
    "a header beyond the file": (header(length=50_000_000), DAMAGED),
    "no header": (header(length=0), DAMAGED),
    "a header that is no JSON": (header(raw=b"{" * 99), "missing or damaged: invalid JSON"),
    "a header without end": (header(raw=DEEP), DAMAGED),
    "a header that is a list": (header(raw=b"[]"), DAMAGED),
    "an empty file": (write("model.safetensors", b""), "missing or damaged: header too small"),
    "overlapping tensors": (
        header(lambda entries: entries[QUERY].update(data_offsets=entries[KEY]["data_offsets"])),
        DAMAGED,
    ),
    "data beyond the file": (entry(data_offsets=[0, 10**12]), DAMAGED),
    "data before the file": (entry(data_offsets=[-4096, 0]), DAMAGED),
    "a shape beyond all numbers": (entry(shape=[2**63, 2**63]), DAMAGED),
    "a dtype that there is not": (entry(dtype="pickle"), DAMAGED),
    "an entry that is a word": (header(lambda entries: entries.update({QUERY: "x"})), DAMAGED),
    "a truncated file": (lambda folder: os.truncate(folder / "model.safetensors", 9000), DAMAGED),
}
OF_A_TENSOR = {
    "another shape": (tensor(lambda x: x.reshape(64, 16)), rf"{QUERY} must be of shape.*got \[64, 16\]"),
    "a larger one": (tensor(lambda x: torch.zeros(33, 32)), f"{QUERY} must be of shape"),
    "whole numbers": (tensor(lambda x: x.int()), f"{QUERY} must be of dtype F32, got I32"),
    "truth values": (tensor(lambda x: x > 0), f"{QUERY} must be of dtype F32, got BOOL"),
    "a coarser one": (tensor(lambda x: x.half()), f"{QUERY} must be of dtype F32, got F16"),
    "a far coarser one": (tensor(lambda x: x.to(torch.float8_e4m3fn)), f"{QUERY} must be of dtype F32, got F8_E4M3"),
    "a finer one": (tensor(lambda x: x.double()), f"{QUERY} must be of dtype F32, got F64"),
    "said to be quantized": (
        all_of(tensor(lambda x: x.reshape(64, 16)), config(quantization_config={"quant_method": "gptq", "bits": 4})),
        f"{QUERY} must be of shape",
    ),
}
OF_A_FOLDER = {
    "weights elsewhere": (link("model.safetensors"), "model.safetensors is a link out of the model's folder"),
    "a config elsewhere": (link("config.json"), "config.json is a link out of"),
    "a tokenizer elsewhere": (link("tokenizer.json"), "tokenizer.json is a link out of"),
    "a link to any file": (lambda folder: (folder / "notes.txt").symlink_to("/etc/passwd"), "notes.txt is a link"),
    "a link to itself": (lambda folder: (folder / "a").symlink_to("a"), "a is a link out of"),
    # transformers would load something else than what was looked at.
    "other weights by the config": (
        all_of(
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "other.safetensors"),
            config(transformers_weights="other.safetensors"),
        ),
        "transformers_weights must be the file that is there",
    ),
    "other weights far away": (config(transformers_weights="../x.safetensors"), "transformers_weights must be"),
    "an adapter of another model": (
        write("adapter_config.json", b'{"base_model_name_or_path": "/elsewhere"}'),
        "holds an adapter of another model",
    ),
}
OF_A_CONFIG = {
    "a list for a config": (write("config.json", b"[]"), "config.json must hold an object, got list"),
    "a config that is no text": (write("config.json", b"\xff\xfe\0"), "config.json is missing or damaged"),
    "a config without end": (write("config.json", DEEP), "config.json is missing or damaged"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers must be at most 30 with 30 tensors"),
    "a billion further down": (config(text_config={"num_layers": 10**9}), "num_layers must be at most 30"),
    "a billion labels": (config(num_labels=10**9), "num_labels must be at most 100000"),
    "a billion experts": (config(num_experts=10**9), "num_experts must be at most 100000"),
    "no layers": (config(num_hidden_layers=0), "each layer must take the hidden state first"),
    "fewer than no layers": (config(num_hidden_layers=-1), "must have exactly one list of -1 layers"),
    "a word for the layers": (config(num_hidden_layers="many"), "is no causal language model"),
    "no heads": (config(num_attention_heads=0), "is no causal language model"),
    "an endless vocabulary": (config(vocab_size=10**12), r"must be of shape \[1000000000000, 32\]"),
    "an endless width": (config(hidden_size=10**9), "must be of shape"),
    "a width below zero": (config(hidden_size=-32), "is no causal language model"),
    "a function for a dtype": (config(dtype="os.system"), "is no causal language model"),
    "a list for a file": (config(transformers_weights=[{}]), "transformers_weights must be"),
    "code of its own": (config(auto_map={"AutoConfig": "x.Y"}), "--trust-remote-code"),
    "code of somebody else": (config(auto_map={"AutoConfig": "org/name--x.Y"}), "--trust-remote-code"),
}
WHOLE = OF_A_HEADER | OF_A_TENSOR | OF_A_FOLDER | OF_A_CONFIG
CRAFTED = {name: ("sharded", *row) for name, row in OF_AN_INDEX.items()}
CRAFTED |= {name: ("whole", *row) for name, row in WHOLE.items()}
TOKENIZERS = {
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "a tokenizer that is no JSON": write("tokenizer.json", DEEP),
    "a tokenizer that is an empty object": write("tokenizer.json", b"{}"),
    "a tokenizer of an unknown kind": lambda folder: edit(
        folder / "tokenizer.json", lambda content: content["model"].update(type="Evil")
    ),
}


def everything_below(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def refused(words, folder, message):
    """By the command: exit code 2, one line, soon, and the folder is as it was."""
    before, started = everything_below(folder), time.monotonic()
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 2, done.output
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert re.search(message, last)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert everything_below(folder) == before
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(("kind", "spoil", "message"), CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_checkpoint_is_refused_at_every_door(good, tmp_path, kind, spoil, message):
    # Three levels deep, so that a way out is seen.
    folder = shutil.copytree(good / kind, tmp_path / "a" / "b" / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(ModelConfig(path=str(folder)))
    assert caught.value.exit_code == 2
    refused(["drop", folder, "--layers", "1", "--output", tmp_path / "out"], tmp_path, message)
    refused(["prune", "--dry-run", "--model", folder, "--num-drop", "1"], tmp_path, message)


@pytest.mark.parametrize("spoil", TOKENIZERS.values(), ids=TOKENIZERS)
def test_without_a_usable_tokenizer_nothing_begins(good, tmp_path, spoil):
    folder = shutil.copytree(good / "whole", tmp_path / "model")
    spoil(folder)
    refused(["drop", folder, "--layers", "1", "--output", tmp_path / "out"], tmp_path, "has no usable tokenizer")
    refused(["prune", "--dry-run", "--model", folder], tmp_path, "has no usable tokenizer")


def in_the_cache(folder: Path, place: Path) -> Path:
    """The folder as huggingface_hub lays it out: each file a link to a blob of the same model."""
    repository = place / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, repository / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_the_hugging_face_cache_works_and_no_link_leaves_it(good, tmp_path, kind):
    snapshot = in_the_cache(good / kind, tmp_path)
    assert open_source(ModelConfig(path=str(snapshot))).num_layers == 3
    done = CliRunner().invoke(main, ["drop", str(snapshot), "--layers", "1", "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    in_the_cache(good / "whole", tmp_path / "other")
    (snapshot / "notes.txt").symlink_to("../../../other/models--org--tiny/blobs/blob0")
    refused(["prune", "--dry-run", "--model", snapshot, "--num-drop", "1"], tmp_path, "notes.txt is a link out of")


def in_bf16_but_norms(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config(dtype="bfloat16")(folder)


def without_the_base_models_name(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_masks_that_nothing_loads(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


HARMLESS = {
    "norms finer than the rest": in_bf16_but_norms,
    "another dtype than the config says": config(dtype="float16"),
    "no dtype in the config": lambda folder: edit(
        folder / "config.json", lambda content: content.pop("dtype") and None
    ),
    "the base model's names": without_the_base_models_name,
    "masks that nothing loads": with_masks_that_nothing_loads,
    "a pickle beside": lambda folder: torch.save({"lr": 1}, folder / "training_args.bin"),
    "a link inside": lambda folder: (folder / "copy.json").symlink_to("config.json"),
    "a link to a folder": lambda folder: (folder / "runs").symlink_to("/tmp"),
    "an index that nothing reads": write("model.safetensors.index.json", b'{"weight_map": {"x": "y.safetensors"}}'),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_is_seen_in_good_checkpoints_is_no_fault(good, tmp_path, change):
    folder = shutil.copytree(good / "whole", tmp_path / "model")
    change(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert open_source(ModelConfig(path=str(folder))).num_layers == 3


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DTYPES = st.sampled_from(["F32", "BF16", "F16", "I8", "BOOL", "F8_E4M3", "F64", "X"])
SHAPES = st.lists(st.integers(-1, 4), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {"dtype": DTYPES, "shape": SHAPES, "data_offsets": st.lists(st.integers(-1, 40), max_size=3)}
)
HEADERS = st.dictionaries(st.sampled_from("abc"), ENTRIES | ANY, max_size=3) | ANY


def fitting(sizes: list[int]) -> dict:
    """A header without fault: vectors of bytes, one behind the other."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return {
        f"t{number}": {"dtype": "U8", "shape": [size], "data_offsets": [end - size, end]}
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with a config that says nothing."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_text("{}")
    return folder


def judged(folder: Path) -> dict | None:
    """The tensors that the folder is said to hold; None: refused."""
    try:
        return check_folder(folder).tensors
    except ModelError:
        return None


def loaded(path: Path) -> dict | None:
    """By the library that loads it."""
    try:
        return load_file(path)
    except Exception:  # noqa: BLE001  Of several kinds, and none of them matters here.
        return None


@settings(max_examples=1500)
@given(header=HEADERS | st.lists(st.integers(0, 12), max_size=3).map(fitting), data=st.binary(max_size=36))
def test_a_header_is_taken_just_where_the_file_loads(bare, header, data):
    path = bare / "model.safetensors"
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    tensors, weights = judged(bare), loaded(path)
    assert (tensors is None) == (weights is None)
    if tensors is not None and weights is not None:
        assert {name: tuple(entry["shape"]) for name, entry in tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in weights.items()
        }


@settings(max_examples=500)
@given(content=st.binary(max_size=64) | st.binary(max_size=24).map(lambda rest: struct.pack("<Q", len(rest)) + rest))
def test_any_bytes_for_weights_are_refused_or_load(bare, content):
    (bare / "model.safetensors").write_bytes(content)
    assert (judged(bare) is None) == (loaded(bare / "model.safetensors") is None)


FILES = st.sampled_from(["a.safetensors", "b.safetensors"])
PATHS = st.lists(st.sampled_from(["..", ".", "", "a.safetensors", "b.bin", "~", "\\", "\0"]), max_size=4).map("/".join)
MAPS = st.dictionaries(st.sampled_from(["x", "y", "z"]), FILES | PATHS | st.text(max_size=9) | ANY, max_size=3)


@settings(max_examples=800)
@given(index=st.fixed_dictionaries({"weight_map": MAPS | ANY}) | ANY)
def test_an_index_leads_to_files_in_the_folder_that_hold_what_it_says(tmp_path_factory, index):
    folder = tmp_path_factory.getbasetemp() / "indexed" / "model"
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        for path in (folder / "a.safetensors", folder.parent / "a.safetensors"):
            save_file({"x": torch.zeros(1), "y": torch.zeros(2)}, path)
        save_file({"z": torch.zeros(3)}, folder / "b.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    tensors = judged(folder)
    if tensors is not None:
        files = weight_files(folder)
        assert {path.parent for path in files} == {folder}
        held = {}
        for path in files:
            with safe_open(path, "np") as file:
                held |= dict.fromkeys(file.keys(), path.name)
        assert held == index["weight_map"]
        assert set(tensors) == set(held)


@settings(max_examples=60)
@given(key=st.data())
def test_with_any_value_in_its_config_a_model_is_refused_or_opened(good, tmp_path_factory, key):
    folder = tmp_path_factory.getbasetemp() / "configured"
    if not folder.exists():
        shutil.copytree(good / "whole", folder)
    content = json.loads((good / "whole" / "config.json").read_text())
    content[key.draw(st.sampled_from(sorted(content)))] = key.draw(ANY)
    (folder / "config.json").write_text(json.dumps(content))
    with contextlib.suppress(ModelError):
        assert open_source(ModelConfig(path=str(folder))).num_layers == 3


def test_what_a_terminal_would_obey_does_not_reach_it(good, tmp_path):
    folder = shutil.copytree(good / "sharded", tmp_path / "model")
    name = "\x1b]0;owned\x07\n\u202eerror: "
    index(lambda names: names.update({name: FIRST}))(folder)
    done = CliRunner().invoke(main, ["drop", str(folder), "--layers", "1", "--output", str(tmp_path / "out")])
    [last] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "owned" in last
    assert last.isprintable()
