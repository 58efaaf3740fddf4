"""`tsp drop` and `tsp verify` on folders: byte for byte, whole or not at all, and refusals in one line."""

import json
import os
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.models import logits, model_folder, sharded, tiny_model, tokens, without_layers
from tsp.cli import main
from tsp.config import ModelConfig
from tsp.drop import drop_layers, layer_numbers
from tsp.errors import ModelError
from tsp.shards import copy_tensors, read_header
from tsp.source import open_source
from tsp.verify import verify

DROPPED = (1, 3)


@pytest.fixture
def dense(tmp_path):
    return model_folder(tmp_path / "dense", tiny_model())


def source_of(folder):
    return open_source(ModelConfig(path=str(folder)))


def reloaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("num_shards", [1, 3])
def test_what_is_left_is_the_dense_model_without_the_layers(dense, tmp_path, num_shards):
    if num_shards > 1:
        sharded(dense, num_shards)
    drop_layers(source_of(dense), DROPPED, tmp_path / "out")
    smaller = reloaded(tmp_path / "out")
    assert torch.equal(
        logits(smaller, tokens()), logits(without_layers(tiny_model(), DROPPED, "model.layers"), tokens())
    )
    assert layer_numbers(source_of(tmp_path / "out")) == [0, 1, 2]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == num_shards
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_copy_of_bytes_keeps_every_dtype(tmp_path):
    tensors = {
        "a.0.x": torch.randn(3, 5).bfloat16(),
        "a.1.x": torch.arange(7, dtype=torch.int8),
        "a.2.x": torch.randn(4).to(torch.float8_e4m3fn),
        "b": torch.randn(2, 2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt", "note": "kept"})
    copy_tensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors", {"a.2.x": "a.0.x", "b": "b", "a.1.x": "c"})
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == {"a.0.x", "b", "c"}
    for new, old in (("a.0.x", "a.2.x"), ("b", "b"), ("c", "a.1.x")):
        assert found[new].dtype == tensors[old].dtype
        assert torch.equal(found[new].view(torch.uint8), tensors[old].view(torch.uint8))
    assert read_header(tmp_path / "out.safetensors").metadata == {"format": "pt", "note": "kept"}


def test_pickled_weights_are_read_by_the_safe_loader(dense, tmp_path):
    weights = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    torch.save(weights, dense / "pytorch_model.bin")
    drop_layers(source_of(dense), DROPPED, tmp_path / "out")
    expected = logits(without_layers(tiny_model(), DROPPED, "model.layers"), tokens())
    assert torch.equal(logits(reloaded(tmp_path / "out"), tokens()), expected)
    torch.save(weights | {"evil": Evil()}, dense / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read safely"):
        drop_layers(source_of(dense), DROPPED, tmp_path / "out2")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out2").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_layers_beyond_the_stack_are_left_out(dense, tmp_path, caplog):
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.5.eh_proj.weight"] = torch.ones(2, 2)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    drop_layers(source_of(dense), DROPPED, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out/model.safetensors") if "eh_proj" in name]
    assert "layers [5] are beyond the stack of 5" in caplog.text


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def naming_a_missing_shard(folder):
    sharded(folder, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def bringing_code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def encoder_decoder(folder):
    import transformers

    config = transformers.T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("layers", "spoil", "reason"),
    [
        ("7", None, r"distinct, in \[0, 4\] and fewer than 5, got 7"),
        ("1,1", None, "distinct"),
        ("0,1,2,3,4", None, "fewer than 5"),
        ("", None, "--layers must be layer numbers"),
        ("1", truncated, "missing or damaged"),
        ("1", naming_a_missing_shard, "missing or damaged"),
        ("1", bringing_code, "--trust-remote-code"),
        ("1", encoder_decoder, "t5 is an encoder-decoder"),
        ("1", without_tokenizer, "has no usable tokenizer"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(dense, tmp_path, layers, spoil, reason, capsys):
    if spoil:
        spoil(dense)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = CliRunner().invoke(main, ["drop", str(dense), "--layers", layers, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert re.search(reason, done.stderr)
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_in_use_is_refused(dense, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    done = CliRunner().invoke(main, ["drop", str(dense), "--layers", "1", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "must be a new or an empty folder" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("place", ["/proc/out", "file/out"])
def test_a_place_that_cannot_be_written_is_wrong_input(dense, tmp_path, monkeypatch, place):
    """Nobody may write below /proc, nor below a file; not even root, as which tests often run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["drop", str(dense), "--layers", "1", "--output", place])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: --output {place} ")
    assert "cannot be written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "file"]


def test_a_source_that_cannot_be_read_is_not_taken_for_the_output(dense, tmp_path, monkeypatch):
    header = read_header(dense / "model.safetensors")
    monkeypatch.setattr("tsp.shards.read_header", lambda path: truncated(dense) or header)
    done = CliRunner().invoke(main, ["drop", str(dense), "--layers", "1", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "model.safetensors became shorter while it was read" in done.stderr
    assert "output" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_full_disk_leaves_nothing(dense, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tsp.drop.copy_tensors", full)
    done = CliRunner().invoke(main, ["drop", str(dense), "--layers", "1", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


class TestVerify:
    @pytest.fixture
    def pruned(self, dense, tmp_path):
        return drop_layers(source_of(dense), DROPPED, tmp_path / "out")

    def failed(self, folder, dense):
        return {
            row["name"]: row["found"] for row in verify(folder, against=str(dense), dropped=DROPPED) if not row["ok"]
        }

    def test_a_good_one_passes_all(self, pruned, dense):
        rows = {row["name"]: row for row in verify(pruned, against=str(dense), dropped=DROPPED)}
        assert all(row["ok"] for row in rows.values()), rows
        assert "cached generation equals uncached" in rows["round trip"]["found"]

    def test_another_selection_is_seen(self, pruned, dense):
        found = verify(pruned, against=str(dense), dropped=(0, 2))
        assert "a logit differs by" in found[-1]["found"]
        assert not found[-1]["ok"]

    def test_a_stale_count_and_a_missing_tokenizer_are_seen(self, pruned, dense):
        config = json.loads((pruned / "config.json").read_text())
        (pruned / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
        (pruned / "tokenizer.json").unlink()
        (pruned / "tokenizer_config.json").unlink()
        failed = self.failed(pruned, dense)
        assert {"layer numbers", "tokenizer", "round trip"} <= set(failed)
        assert failed["layer numbers"] == "3 layers on disk, 4 in the config"
        assert "missing" in failed["round trip"]

    def test_the_command_says_it_in_its_exit_code(self, pruned, dense):
        words = ["verify", str(pruned), "--against", str(dense), "--json", "--layers"]
        good = CliRunner().invoke(main, [*words, "1,3"])
        assert good.exit_code == 0
        assert all(row["ok"] for row in json.loads(good.stdout))
        assert CliRunner().invoke(main, [*words, "0,2"]).exit_code == 3

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--layers", "1,3"], "give both or neither"),
            (["--against", "dense", "--layers", "1,3,99"], "distinct, in [0, 4]"),
            (["--against", "dense", "--layers", "1,1,3"], "distinct, in [0, 4]"),
        ],
    )
    def test_layers_of_no_model_are_refused(self, pruned, dense, words, reason):
        given = [str(dense) if word == "dense" else word for word in words]
        done = CliRunner().invoke(main, ["verify", str(pruned), *given])
        assert done.exit_code == 2
        assert reason in done.stderr

    def test_numbers_that_do_not_begin_at_0_are_a_fault_that_is_told(self, pruned, dense):
        weights = load_file(pruned / "model.safetensors")
        moved = {re.sub(r"\d+", lambda found: str(int(found[0]) + 1), name): x for name, x in weights.items()}
        save_file(moved, pruned / "model.safetensors", metadata={"format": "pt"})
        failed = self.failed(pruned, dense)
        assert "must name the layers" in failed["layer numbers"]
        assert "missing" in failed["round trip"]

    def test_a_damaged_one_is_told_from_wrong_input(self, pruned, tmp_path):
        truncated(pruned)
        [row] = verify(pruned, against=None, dropped=())
        assert (row["name"], row["ok"]) == ("structure", False)
        shutil.rmtree(pruned)
        assert CliRunner().invoke(main, ["verify", str(pruned)]).exit_code in (2, 3)
