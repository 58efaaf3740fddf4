"""The demo: its corpus's sides, the shipped checkpoint, and the training script from scratch in a tiny setting."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsp.demo import CHECKPOINT
from tsp.demo.corpus import SPLITS, stdlib_documents, stdlib_split
from tsp.demo.muon import Muon
from tsp.demo.train import TINY, _save_state, train_demo


def test_every_module_is_on_one_side():
    names = {split: {name for name, _ in stdlib_documents(split)} for split in SPLITS}
    for split, found in names.items():
        assert found, split
        assert {stdlib_split(name) for name in found} == {split}
    assert not names["train"] & names["held-out"]


@pytest.mark.parametrize(
    ("module", "split"),
    [("argparse", "train"), ("shutil", "calibration"), ("pickletools", "calibration"), ("_pyio", "held-out")],
)
def test_sides_never_move(module, split):
    """The shipped model was trained on these sides; moving a module would leak it."""
    assert stdlib_split(module) == split


def test_tests_and_tables_are_left_out():
    names = {name for split in SPLITS for name, _ in stdlib_documents(split)}
    assert not [name for name in names if "test" in name.split(".") or name.startswith(("encodings.", "test."))]
    assert "pydoc_data.topics" not in names


def test_shipped_checkpoint_is_small_bf16_and_deep():
    weights = CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    with safe_open(weights, framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((CHECKPOINT / "config.json").read_text())["num_hidden_layers"] >= 16


def test_model_card_states_the_training():
    record = json.loads((CHECKPOINT / "training.json").read_text())
    card = (CHECKPOINT / "README.md").read_text()
    assert f"{record['tokens']:,}" in card
    assert str(record["held_out_ppl"]) in card


def test_muon_is_torchs_muon():
    """Tolerance: torch multiplies in bf16, three digits, in each of five iterations."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (8, 24))]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)]
    for _ in range(4):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, two, before in zip(ours, theirs, start, strict=True):
        moved = (one - before).norm()
        assert moved > 0.01
        assert (one - two).norm() < 0.02 * moved


def test_training_from_scratch_learns_and_reloads(tmp_path):
    record = train_demo(TINY, tmp_path / "demo", eval_every_steps=10)
    curve = json.loads((tmp_path / "demo" / "training.json").read_text())["curve"]
    assert curve[-1]["held_out_ppl"] < curve[0]["held_out_ppl"] < TINY.vocab_size
    assert record["tokens"] == TINY.total_tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo")
    assert model.config.num_hidden_layers == TINY.num_layers
    text = "def f(self):\n    return 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_stopped_training_goes_on_where_it_was(tmp_path):
    whole = train_demo(TINY, tmp_path / "whole", eval_every_steps=10)
    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsp.demo.train._save_state", _save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_demo(TINY, parts, eval_every_steps=10)
    assert torch.load(parts / "state.pt", weights_only=True)["progress"]["step"] == 10
    assert train_demo(TINY, parts, eval_every_steps=10)["held_out_ppl"] == whole["held_out_ppl"]


def _save_and_stop(*args):
    _save_state(*args)
    raise KeyboardInterrupt
