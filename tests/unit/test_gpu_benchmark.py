"""`benchmarks/gpu.py` runs without a GPU, and its formula counts what torch counts."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.models import REPOSITORY
from tsp.config import ModelConfig
from tsp.footprint import Pass, shape_of

POSITIONS, NUM_DOOMED = 32, 1


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.mark.parametrize("label", ["stage1", "stage1_24gb", "stage2_lora"])
def test_the_formula_counts_what_torch_counts(label, gpu, tmp_path):
    gpu.llama_config("135m", POSITIONS).save_pretrained(tmp_path)
    shape, case = shape_of(ModelConfig(path=str(tmp_path))), gpu.CASES[label]
    found = gpu.operations_of(shape, case, tokens_a_row=POSITIONS, num_doomed=NUM_DOOMED)
    one = Pass(
        batch=gpu.SEQUENCES,
        block_tokens=POSITIONS,
        learns="gates" if case.stage == 1 else "transfer",
        num_doomed=NUM_DOOMED if case.stage == 2 else 0,
        checkpointing=case.checkpointing,
    )
    counted = shape.cost(one, torch.bfloat16).flops
    # Adapters are not in the formula; the first layer needs no gradient of what it is given.
    assert found.hardware == pytest.approx(counted, rel=0.15)
    assert (found.hardware > found.model) == case.checkpointing


def test_it_runs_without_a_gpu():
    command = [sys.executable, "benchmarks/gpu.py", "--positions", "16", "--steps", "1", "--json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    for label in ("stage1", "stage1_24gb", "stage2_lora", "pruned, prompt", "pruned, generation"):
        assert label in done.stderr
