"""`tsp plan`: memory by part, time, traffic, and what makes it fit."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig

from tests.models import REPOSITORY
from tsp.calibrate import probe_of, slack
from tsp.capacity import GIB, Estimate, Fleet
from tsp.cli import main
from tsp.config import ModelConfig, known_gpu, load_config, number_to_drop
from tsp.footprint import shape_of
from tsp.methods import METHODS, is_learned
from tsp.sharding import read_json, resolve

ZERO3 = read_json(REPOSITORY / "ds_configs/zero3.json")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The config of eight layers as wide as those of a Llama of wide billion weights, and nothing else."""
    folder = tmp_path_factory.mktemp("wide")
    LlamaConfig(
        num_hidden_layers=8, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000,
        max_position_embeddings=4096, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return shape_of(ModelConfig(path=str(folder)))


def estimate(shape, nodes=1, gpus=1, gpu="h100-80", sharding=ZERO3, **settings):
    config = load_config([settings])
    return Estimate(config, shape, sharding, Fleet(nodes=nodes, gpus=gpus, gpu=known_gpu(gpu)))


def part(found, phase, name):
    return next(one.memory_gib.get(name, 0.0) for one in found.phases if one.name == phase)


def test_what_a_rank_holds_is_its_share(wide):
    whole = wide.num_parameters * 2 / GIB
    for ranks in (1, 8):
        assert part(estimate(wide, gpus=ranks, transfer="none"), "select", "weights") == pytest.approx(whole / ranks)
    assert part(estimate(wide, gpus=8, transfer="none"), "select", "gathered") == pytest.approx(1e9 * 2 / GIB)
    zero2 = estimate(wide, gpus=8, sharding=read_json(REPOSITORY / "ds_configs/zero2.json"), transfer="none")
    assert part(zero2, "select", "weights") == pytest.approx(whole)
    assert part(zero2, "select", "gathered") == 0


def test_the_optimizer_is_that_of_what_is_trained(wide):
    layer = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    adapters = estimate(wide, gpus=2, prune={"num_drop": 2})
    assert part(adapters, "transfer", "optimizer") == pytest.approx(12 * 6 * layer / 2 / GIB)
    full = estimate(wide, gpus=2, prune={"num_drop": 2}, stage2={"trainable": "full"})
    trained = wide.num_parameters - 2 * wide.layer_parameters[0]
    assert part(full, "transfer", "optimizer") == pytest.approx(12 * trained / 2 / GIB)
    assert part(full, "transfer", "weights") == pytest.approx(2 * part(adapters, "transfer", "weights")), "the teacher"


def test_work_and_traffic_by_the_formulas(wide):
    """4P a token in stage 1 (no gradients of weights); gathers of all weights, forward and backward."""
    found = estimate(wide, nodes=2, gpus=8, train={"batch_size": 16}, stage1={"schedule": "budget", "steps": 10})
    select = next(phase for phase in found.phases if phase.name == "select")
    multiplied = wide.num_parameters - 32000 * 4096
    attention = 8 * 4 * 2048 * 4096
    assert select.tokens == 10 * 16 * 2048
    assert select.flops / select.tokens == pytest.approx(2 * (2 * multiplied + attention), rel=0.05)
    assert select.traffic_gb == pytest.approx(2 * wide.num_parameters * 2 * 15 / 16 / 1e9)
    assert select.seconds(found.fleet) == pytest.approx(10 * select.traffic_gb / 50), "bound by the network"


def test_what_does_not_fit_is_made_to_fit_by_the_smallest_change(wide):
    Path("small.yaml").write_text("{memory_gib: 16, tflops: 100, node_gb_s: 10, network_gb_s: 1}")
    found = estimate(wide, gpu="small.yaml")
    assert not found.fits
    remedy = found.remedy()
    assert remedy.startswith("--set train.accumulation=")
    accumulation = int(remedy.rpartition("=")[2])
    assert estimate(wide, gpu="small.yaml", train={"accumulation": accumulation}).fits
    assert not estimate(wide, gpu="small.yaml", train={"accumulation": accumulation // 2}).fits
    assert estimate(wide, gpu="h200").remedy() is None


@pytest.mark.parametrize(("batch", "gpus"), [(8, 1), (24, 1), (24, 8), (18, 3)])
def test_a_job_takes_whatever_is_proposed(wide, batch, gpus):
    found = estimate(wide, gpus=gpus, train={"batch_size": batch})
    for words, changed in found.changes():
        train, ranks = changed.config.train, changed.fleet.ranks
        resolved = resolve(ZERO3, changed.config, world_size=ranks, hidden_size=64, dtype=torch.bfloat16)
        assert batch <= train.batch_size < batch + ranks, words
    assert resolved["train_micro_batch_size_per_gpu"] == 1


@pytest.mark.parametrize(("device", "held"), [({"device": "none"}, True), (None, True), ({"device": "cpu"}, False)])
def test_what_is_offloaded_is_not_held(wide, device, held):
    zero = ZERO3["zero_optimization"] | {"offload_param": device, "offload_optimizer": device}
    found = estimate(wide, sharding={"zero_optimization": zero})
    assert (part(found, "transfer", "weights") > 0, part(found, "transfer", "optimizer") > 0) == (held, held)


def test_the_command_prints_what_it_reckons_and_exits_by_it(wide, tmp_path):
    folder = tmp_path / "wide"
    wide.config.save_pretrained(folder)
    done = CliRunner().invoke(main, ["plan", "--model", str(folder), "--gpus", "8", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["parameters"] == wide.num_parameters
    assert [phase["name"] for phase in document["phases"]] == ["evaluate", "select", "transfer"]
    for phase in document["phases"]:
        assert phase["total_gib"] == pytest.approx(sum(phase["memory_gib"].values()), abs=0.01)
    assert document["fits"]
    Path("small.yaml").write_text("{memory_gib: 8, tflops: 100, node_gb_s: 10, network_gb_s: 1}")
    done = CliRunner().invoke(main, ["plan", "--model", str(folder), "--gpu", "small.yaml", "--set", "transfer=none"])
    assert done.exit_code == 3
    assert "does not fit" in done.stdout
    assert "it would with --set train.accumulation=" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "h100"], "--gpu must be one of h100-80, a100-80, h200, l40s or a YAML file, got 'h100'"),
        (["--gpu", "missing.yaml"], "missing.yaml"),
        (["--ratio", "0.1,0.2"], "a sweep"),
        (["--gpus", "0"], "--gpus"),
        (
            ["--nodes", "2", "--gpus", "8"],
            "train.batch_size must be a multiple of ranks x accumulation = 16 x 1, got 8",
        ),
    ],
)
def test_wrong_input(words, says):
    done = CliRunner().invoke(main, ["plan", *words])
    assert done.exit_code == 2
    assert says in done.stderr


@pytest.mark.parametrize(
    ("method", "needed", "computed"), [("tsp", 4 + 2 + 2 + 2, 16 * (1 + 1 / 2 + 1 / 4 + 1 / 8)), ("sleb", 32, 32)]
)
def test_ranks_without_a_block_of_their_own_compute_all_the_same(wide, method, needed, computed):
    """32 blocks: the search measures all layers on 4, a half on 4, a quarter on 8, an eighth on 16."""
    settings = {"transfer": "none", "prune": {"method": method, "score_blocks": 32, "verify_blocks": 1}}
    one, many = (estimate(wide, nodes=nodes, gpus=gpus, **settings) for nodes, gpus in ((1, 1), (2, 8)))
    tokens = [next(phase.tokens for phase in found.phases if phase.name == "select") - 2048 for found in (one, many)]
    assert tokens[1] / tokens[0] == pytest.approx(computed / needed, rel=1e-3)


def test_what_an_allocator_keeps_is_in_proportion_to_the_step(wide):
    plain, kept = (
        Estimate(load_config([{}]), wide, ZERO3, Fleet(nodes=1, gpus=1, gpu=gpu), dtype=torch.float32).phases[-1]
        for gpu in (known_gpu("h100-80"), known_gpu("h100-80").model_copy(update={"slack": 1.5}))
    )
    assert kept.memory_gib["step"] == 1.5 * plain.memory_gib["step"]
    assert slack(plain, kept.total_gib) == pytest.approx(1.5)


def test_under_a_bound_one_number_of_layers_is_planned_and_the_best_ones_states_stay(wide):
    quarter = estimate(wide, prune={"num_drop": 2})
    for bound, states in ({"max_ppl_ratio": 1.1}, 2), ({"min_speedup": 1.3, "ratio": 0.02}, 1):
        found = estimate(wide, prune=bound)
        assert found.num_drop == 2, "of eight layers, by the default ratio, with which a search begins"
        assert found.phases == quarter.phases
        adapters = 6 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
        assert found.disk_gib - quarter.disk_gib == pytest.approx((states - 1) * 2 * 12 * adapters / GIB)


def test_a_plan_says_of_what_number_it_is(tmp_path):
    LlamaConfig(num_hidden_layers=8, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path), "--data", "stdlib", "--max-ppl-ratio", "1.1"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "for 2 of 8 layers: how many keep to prune.max_ppl_ratio 1.1 is found by the job" in done.stdout
    document = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert (document["num_drop"], document["bound"]) == (2, "prune.max_ppl_ratio 1.1")


@pytest.mark.parametrize("method", METHODS)
def test_a_probe_learns_gates_whatever_the_method(method):
    """Its speed is that of gate steps, over their number."""
    given = {"method": method, "ratio": 0.05, "max_ppl_ratio": 1.1, "drop": (3,)}
    probe = probe_of(load_config([{"prune": given}]))
    assert is_learned(probe)
    assert number_to_drop(probe.prune, 2) == 1


@pytest.mark.slow
def test_a_probe_finds_this_machine():
    done = CliRunner().invoke(main, ["plan", "--calibrate", "--json", "--set", "train.batch_size=2"])
    assert done.exit_code == 0, done.output
    gpu = json.loads(done.stdout)["gpu"]
    assert 0.001 < gpu["tflops"] * gpu["utilisation"] < 100
    assert 0.2 < gpu["reserved_gib"] < 4
    assert 1 <= gpu["slack"] < 4
    total_kib = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert gpu["memory_gib"] == pytest.approx(int(total_kib) / 2**20, rel=0.02)
