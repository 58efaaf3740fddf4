"""What the tests start with `deepspeed` on each rank: run the cases of a plan, write what each gave as JSON.

    deepspeed --num_accelerators 2 tests/multiproc/worker.py PLAN.json RESULTS.json

One start costs many seconds, so it runs many cases. A case is `{"kind", "folder", "blocks", "ds", "settings"}`; ranks
fail together, so an error of one case is its result and the next one goes on.
"""

import itertools
import json
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.models import Recorder, job
from tsp.checkpoint import load
from tsp.config import ModelConfig
from tsp.engine import Engine
from tsp.gates import Gates
from tsp.losses import lm_loss
from tsp.machine import weights_dtype
from tsp.methods import score_verb, transfer_verb
from tsp.methods.base import Bench
from tsp.pipeline import transfer
from tsp.sharding import AdamW, resolve
from tsp.shared import Stopwatch
from tsp.source import open_source
from tsp.training import train


def run(case: dict, world: SimpleNamespace) -> dict:
    """One case on this rank."""
    config = job(**case["settings"])
    dtype = weights_dtype(config, world.device)
    sharding = resolve(case["ds"], config, world_size=world.size, hidden_size=32, dtype=dtype)
    torch.manual_seed(config.seed)
    engine = Engine(world.rank, world.size, world.device, dtype, sharding, config.train)
    source = open_source(ModelConfig(path=case["folder"]))
    decoder = load(source, engine.dtype, engine.loading())
    weights_gib = engine.weights_gib(decoder.model)
    bench = Bench(
        config=config,
        engine=engine,
        decoder=decoder,
        blocks_NT=torch.tensor(case["blocks"]),
        tracker=Recorder(),
        load_again=lambda: load(source, engine.dtype, engine.loading()),
    )
    started = time.perf_counter()
    result = KINDS[case["kind"]](bench, case)
    assert torch.distributed.get_world_size() == world.size
    return result | {"weights_gib": weights_gib, "rows": bench.tracker.rows, "seconds": time.perf_counter() - started}


def select(bench: Bench, case: dict) -> dict:
    """The order of the layers; of stage 1, the gates of every step are in the rows."""
    with bench.engine.mounted(bench.decoder.model) as bench.model:
        before = bench.loss_without((), bench.blocks_NT)
        scores = score_verb(case.get("method", "tsp"))(bench, case["num_drop"])
        after = bench.loss_without((), bench.blocks_NT)
    return {"order": scores.order, "values": scores.values, "unchanged": before == after}


def move(bench: Bench, case: dict) -> dict:
    """Logits of the pruned model before and after, and the trained weights."""
    engine, decoder, ids = bench.engine, bench.decoder, bench.blocks_NT[:4]

    def pruned() -> torch.Tensor:
        with engine.mounted(decoder.model) as model, decoder.bypassing(case["doomed"]), torch.no_grad():
            return model(ids).float()

    before = pruned()
    transfer_verb(case.get("transfer", "stage2"))(bench, case["doomed"], save_dtype=torch.float32)
    after = pruned()
    weights = whole(bench)
    if engine.is_first:
        torch.save({"before": before, "after": after, "weights": weights}, case["tensors"])
    return {}


def spoilt(bench: Bench, case: dict) -> dict:
    """The weights after training in which the last rank's loss of some micro-batches, by number, is NaN."""
    engine, model = bench.engine, bench.decoder.model.requires_grad_(True)
    numbers = itertools.count()
    with engine.mounted(model, AdamW()) as mounted:

        def loss(ids: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
            bad = next(numbers) in case["bad"] and engine.rank == engine.world_size - 1
            return {"total": lm_loss(mounted(ids), ids, share) * (float("nan") if bad else 1.0)}

        done = train(
            engine,
            mounted,
            bench.blocks_NT,
            bench.config.train,
            num_steps=case["num_steps"],
            seed=0,
            loss=loss,
            before_step=lambda step, num_steps: mounted.set_lr(0.01),
        )
        left_out = [stats.left_out for stats in done]
        weights = whole(bench)
    sums = engine.every_rank(sum(float(weight.double().abs().sum()) for weight in weights.values()))
    if engine.is_first:
        torch.save({"weights": weights}, case["tensors"])
    return {"left_out": left_out, "sums": sums}


def whole(bench: Bench) -> dict[str, torch.Tensor]:
    """All weights in fp32, on every rank."""
    weights = {}
    for name, parameter in bench.decoder.model.named_parameters():
        with bench.engine.gathered([parameter]):
            weights[name] = parameter.detach().float().cpu().clone()
    return weights


def gradient(bench: Bench, case: dict) -> dict:
    """Of the gates after one step."""
    gates = Gates(bench.decoder, case["placement"])
    gates.values = torch.tensor(case["gates"], requires_grad=True)
    with bench.engine.mounted(bench.decoder.model) as model, gates.attached():
        stats = train(
            bench.engine,
            model,
            bench.blocks_NT,
            bench.config.train,
            num_steps=1,
            seed=0,
            loss=lambda ids, share: {"total": lm_loss(model(ids), ids, share)},
        )
        [step] = stats
    return {"gradient": bench.engine.mean(gates.values.grad).tolist(), "loss": step.losses["total"]}


def ranks(bench: Bench, case: dict) -> dict:
    """The engine's own sums and broadcasts."""
    engine = bench.engine
    mine = torch.tensor([1.0 + engine.rank])
    return {
        "mean": engine.mean(mine).item(),
        "sum": engine.sum(mine).item(),
        "every_rank": engine.every_rank(10.0 + engine.rank),
        "from_first": engine.from_first({"rank": engine.rank}),
        "peak": engine.peak_memory_gib(),
    }


def clock(bench: Bench, case: dict) -> dict:
    """The steps of a transfer for which, by their own clocks, rank 0 has a second left and the others have none."""
    watch = Stopwatch()
    watch.add("select", 1e3 * bench.engine.rank)
    doing = SimpleNamespace(config=bench.config, source=SimpleNamespace(dtype=torch.float32, other_dtypes={}))
    transfer(doing, bench, tuple(case["doomed"]), watch)
    return {"steps": bench.engine.every_rank(bench.transfer_steps)}


KINDS = {"select": select, "move": move, "gradient": gradient, "ranks": ranks, "spoilt": spoilt, "clock": clock}


def main() -> None:
    plan_path, results_path = (Path(word) for word in sys.argv[1:] if not word.startswith("--"))
    cases = json.loads(plan_path.read_text())
    engine = Engine.start(job(), {"zero_optimization": {"stage": 0}})
    torch.set_num_threads(1)
    world = SimpleNamespace(rank=engine.rank, size=engine.world_size, device=engine.device)
    results = {}
    for name, case in cases.items():
        try:
            results[name] = run(case, world)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
            traceback.print_exc()
        print(name, round(results[name].get("seconds", 0), 1), "s", file=sys.stderr, flush=True)
    if engine.is_first:
        results_path.write_text(json.dumps(results))
    engine.stop()


if __name__ == "__main__":
    main()
