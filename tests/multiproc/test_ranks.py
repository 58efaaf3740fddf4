"""Really several processes: the same gates, losses and weights on any number of ranks and under any sharding."""

import copy
import json
from pathlib import Path

import pytest
import torch

from tests.models import REPOSITORY, distillation_loss, logits, make_identity, model_folder, sample, tiny_model
from tests.multiproc.cases import (
    DOOMED,
    DTYPES,
    FOLDS,
    LAYERS,
    LORA,
    SELECTIONS,
    SOME,
    STAGES,
    START_GATES,
    case,
    plan,
    shipped,
)
from tsp.decoder import find_decoder
from tsp.gates import Gates
from tsp.losses import lm_loss
from tsp.targets import IGNORED, marked
from tsp.training import step_indices

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def models():
    plain, identities = tiny_model(num_layers=LAYERS), tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(identities), *DOOMED)
    return {"plain": plain, "identities": identities}


@pytest.fixture(scope="module")
def text(models):
    found = {name: sample(model, 16, 16) for name, model in models.items()}
    # Tokens that count: more in each sequence than in the one before.
    counts = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.1, 0.9, 16)[:, None]
    return found | {"replies": marked(found["plain"], counts)}


@pytest.fixture(scope="module")
def run(models, text, launch, tmp_path_factory):
    """Runs a plan on ranks; what each case gave, by its name."""
    place = tmp_path_factory.mktemp("ranks")
    folders = {name: str(model_folder(place / name, model)) for name, model in models.items()}

    def start(name: str, cases: dict[str, dict], num_ranks: int, timeout_s: float) -> dict[str, dict]:
        for key, content in cases.items():
            model = content["model"]
            content |= {"folder": folders[model], "blocks": text[content.get("text", model)].tolist()}
            content["tensors"] = str(place / f"{name}-{key}.pt")
        planned, output = place / f"plan-{name}.json", place / f"results-{name}.json"
        planned.write_text(json.dumps(cases))
        worker = REPOSITORY / "tests/multiproc/worker.py"
        done = launch(worker, planned, output, num_ranks=num_ranks, cwd=place, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        found = json.loads(output.read_text())
        for key, content in cases.items():
            if Path(content["tensors"]).exists():
                found[key] |= torch.load(content["tensors"])
        return found

    return start


@pytest.fixture(scope="module")
def results(run):
    """By number of ranks."""
    return {num_ranks: run(f"ranks-{num_ranks}", plan(num_ranks), num_ranks, 800) for num_ranks in (1, 2)}


@pytest.fixture(scope="module")
def of(results):
    """The result of a case; an error of its own fails the test that asks for it."""

    def ask(name: str, num_ranks: int = 2) -> dict:
        result = results[num_ranks][name]
        assert "error" not in result, result["error"]
        return result

    return ask


def gates(result: dict, stage: str = "stage1") -> torch.Tensor:
    """`[steps, L]`."""
    return torch.tensor([[row[f"{stage}/gate/layer_{i:03d}"] for i in range(LAYERS)] for _, row in result["rows"]])


def series(result: dict, key: str) -> list[float]:
    return [row[key] for _, row in result["rows"]]


def differing(one: dict, two: dict, tolerance: float = 1e-3) -> float:
    """Share of the kept weights that differ by more; where a gradient is rounding noise, Adam may step either way.

    The doomed layers do not count: once their gates are closed they get no gradient, and what AdamW then does with its
    momentum differs between ZeRO-2 and ZeRO-3. They are dropped.
    """
    different = count = 0
    assert list(one["weights"]) == list(two["weights"])
    doomed = tuple(f"model.layers.{index}." for index in DOOMED)
    for name, weight in one["weights"].items():
        if name.startswith(doomed):
            continue
        assert weight.shape == two["weights"][name].shape
        different += ((weight - two["weights"][name]).abs() > tolerance).sum().item()
        count += weight.numel()
    return different / count


def test_sums_and_broadcasts(of):
    two = of("ranks")
    assert (two["mean"], two["sum"], two["every_rank"], two["from_first"]) == (1.5, 3, [10, 11], {"rank": 0})
    assert len(two["peak"]) == 2
    assert of("ranks", 1)["every_rank"] == [10]


@pytest.mark.parametrize("name", ["falling-zero3-fp32", "budget-zero2-fp32"])
def test_one_rank_is_two_ranks_in_stage_1(of, name):
    """Tolerance: fp32 sums in another order, 1e-4 of a gate after 16 steps."""
    one, two = of(name, 1), of(name, 2)
    assert torch.allclose(gates(one), gates(two), atol=1e-4)
    for loss in ("total", "lm"):
        assert series(one, f"stage1/loss/{loss}") == pytest.approx(series(two, f"stage1/loss/{loss}"), rel=1e-4)
    assert one["order"][:2] == two["order"][:2]


@pytest.mark.parametrize("name", ["lora-zero3-fp32", "full-zero2-fp32"])
def test_one_rank_is_two_ranks_in_stage_2(of, name):
    one, two = of(name, 1), of(name, 2)
    for loss in ("total", "distill", "hidden", "gap"):
        ours, theirs = (series(result, f"stage2/loss/{loss}") for result in (one, two))
        assert ours == pytest.approx(theirs, rel=5e-3, abs=1e-5), loss
    assert series(one, "stage2/gap/layer_001") == pytest.approx(series(two, "stage2/gap/layer_001"), rel=1e-3)
    assert gates(one, "stage2").tolist() == gates(two, "stage2").tolist()
    assert differing(one, two) < 0.01


@pytest.mark.parametrize(("reduction", "tolerance"), [("token-sum", 1e-4), ("frobenius", 0.02)])
def test_the_gap_penalty_is_as_large_on_any_number_of_ranks(of, reduction, tolerance):
    one, two = of(f"gap-{reduction}", 1), of(f"gap-{reduction}")
    assert series(two, "stage2/loss/gap") == pytest.approx(series(one, "stage2/loss/gap"), rel=tolerance)


def test_whether_seconds_are_left_is_said_by_rank_0(of):
    steps = of("clock")["steps"]
    assert steps[0] == steps[1] > 0


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_learning_rate_is_found_alike_on_any_number_of_ranks(of, trainable, stage):
    one, two = of(f"peak-{trainable}-zero2", 1), of(f"peak-{trainable}-zero{stage}")
    assert series(two, "stage2/peak_lr") == pytest.approx(series(one, "stage2/peak_lr"), rel=1e-3)


@pytest.mark.parametrize("method", SELECTIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_selections_score_alike_on_any_number_of_ranks(of, method, stage):
    """13 sequences in batches of 3: in the last batch the second of two ranks has none of its own."""
    one, two = of(f"{method}-zero2", 1), of(f"{method}-zero{stage}")
    assert two["order"][:2] == one["order"][:2]
    assert two["values"] == pytest.approx(one["values"], rel=1e-5)
    assert two["unchanged"]


@pytest.mark.parametrize("transfer", FOLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_folds_write_the_same_weights_on_any_number_of_ranks(of, models, transfer, stage):
    one, two = of(f"{transfer}-zero2", 1), of(f"{transfer}-zero{stage}")
    changed = set()
    for name, weight in one["weights"].items():
        assert torch.allclose(two["weights"][name], weight, rtol=1e-4, atol=1e-5), name
        if not torch.equal(weight, models["plain"].state_dict()[name]):
            changed.add(name.split(".")[2])
    assert changed == {"0"}, "the layer before the doomed ones, and no other"
    assert torch.allclose(two["after"], one["after"], atol=1e-3)
    assert not torch.allclose(two["after"], two["before"], atol=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_on_all(of, results, models, text, stage):
    whole, half, none = (of(f"spoilt-{name}-zero{stage}") for name in ("whole", "half", "none"))
    assert [found["left_out"] for found in (whole, half, none)] == [[0], [1], [0, 2]]
    for found in (whole, half, none):
        assert found["sums"][0] == found["sums"][1], "the ranks hold the same weights"
    for name, weight in none["weights"].items():
        assert torch.equal(weight, whole["weights"][name]), "a step without a finite loss changes nothing"
    assert (
        "NumbersError: the loss was not finite in 3 steps in a row, the last is 3"
        in (results[2][f"spoilt-row-zero{stage}"]["error"])
    )
    # By hand: AdamW on the first micro-batches of both ranks.
    model = copy.deepcopy(models["plain"]).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    ids = text["plain"][step_indices(16, 8, 0, 0)[[0, 1, 4, 5]]]
    lm_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
    optimizer.step()
    changed = sum((half["weights"][name] - weight).abs().gt(1e-4).sum() for name, weight in model.named_parameters())
    assert changed < 0.01 * sum(weight.numel() for weight in model.parameters())
    assert not torch.allclose(half["weights"]["model.norm.weight"], whole["weights"]["model.norm.weight"], atol=1e-5)


def test_zero_2_is_zero_3(of):
    for name in ("falling", "budget"):
        two, three = (of(f"{name}-zero{stage}-fp32") for stage in STAGES)
        assert torch.allclose(gates(two), gates(three), atol=1e-4)
        assert series(two, "stage1/loss/lm") == pytest.approx(series(three, "stage1/loss/lm"), rel=1e-4)
        assert two["order"][:2] == three["order"][:2]
    for name in ("lora", "full"):
        two, three = (of(f"{name}-zero{stage}-fp32") for stage in STAGES)
        assert series(two, "stage2/loss/total") == pytest.approx(series(three, "stage2/loss/total"), rel=5e-3, abs=1e-5)
        assert differing(two, three) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_gate_moves_and_the_loss_follows_it(of, models, text, stage, dtype):
    """The four traps of facts.md: the loss that was logged is that of a plain model with the gates logged before it."""
    result = of(f"falling-zero{stage}-{dtype}")
    trace, losses = gates(result), series(result, "stage1/loss/lm")
    assert len(trace) == 6
    assert (trace[-1] < 0.6).all(), "every gate moved"
    model = type(models["plain"])(models["plain"].config)
    model.load_state_dict(models["plain"].state_dict())
    decoder, replay = find_decoder(model.to(DTYPES[dtype]).eval()), []
    for values in [torch.ones(LAYERS), *trace[:-1]]:
        plain = Gates(decoder)
        plain.values = values
        with plain.attached():
            replay.append(lm_loss(logits(decoder.model, text["plain"]), text["plain"]).item())
    tolerance = 1e-4 if dtype == "fp32" else 2e-3
    assert losses == pytest.approx(replay, rel=tolerance)
    assert abs(losses[-1] - losses[0]) > 5 * tolerance * losses[0], "and it moved by more than the tolerance"


@pytest.mark.parametrize(("stage", "dtype"), SOME)
def test_stage_1_dooms_the_two_identities(of, stage, dtype):
    assert tuple(sorted(of(f"budget-zero{stage}-{dtype}")["order"][:2])) == DOOMED


TRANSFERS = [("lora", stage, dtype) for stage in STAGES for dtype in DTYPES] + [("full", *kind) for kind in SOME]


@pytest.mark.parametrize(("trainable", "stage", "dtype"), TRANSFERS)
def test_stage_2_brings_the_pruned_model_nearer_to_the_dense_one(of, models, text, trainable, stage, dtype):
    result = of(f"{trainable}-zero{stage}-{dtype}")
    dense = logits(models["plain"], text["plain"][:4])
    before, after = (distillation_loss(result[when], dense).item() for when in ("before", "after"))
    assert after < 0.9 * before
    if trainable == "full":  # gates off, so the loss is the pruned model's from the start
        losses = series(result, "stage2/loss/distill")
        assert losses[-1] < 0.85 * losses[0]
    else:
        assert gates(result, "stage2")[0].tolist() == [1] * LAYERS
        assert gates(result, "stage2")[-1].tolist() == [float(index not in DOOMED) for index in range(LAYERS)]
    assert not any("lora" in name for name in result["weights"])


@pytest.mark.parametrize(("trainable", "stage", "dtype"), TRANSFERS)
def test_the_weights_that_are_returned_are_those_that_were_measured(of, models, text, trainable, stage, dtype):
    """Adapters merged into shards: a plain model with the gathered weights gives the engine's logits."""
    result = of(f"{trainable}-zero{stage}-{dtype}")
    model = type(models["plain"])(models["plain"].config).to(DTYPES[dtype]).eval()
    model.load_state_dict(result["weights"])
    with find_decoder(model).bypassing(DOOMED):
        plain = logits(model, text["plain"][:4]).float()
    assert torch.allclose(plain, result["after"], atol=1e-4 if dtype == "fp32" else 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_zero_3_each_rank_holds_about_half(of, models, dtype):
    whole = sum(parameter.numel() for parameter in models["plain"].parameters()) * DTYPES[dtype].itemsize / 2**30
    three, two = (of(f"falling-zero{stage}-{dtype}")["weights_gib"] for stage in (3, 2))
    assert len(three) == len(two) == 2
    assert two == pytest.approx([whole, whole], abs=2e-6)
    for held in three:
        assert 0.49 * whole < held < 0.56 * whole


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", ["residual", "output", "replies"])
def test_the_gates_gradient_is_that_of_plain_autograd(of, models, text, case, num_ranks):
    result = of(f"gradient-{case}", num_ranks)
    decoder, ids = find_decoder(models["plain"]), text["plain"]
    labels = torch.where(text["replies"] < 0, IGNORED, ids) if case == "replies" else ids
    values = torch.tensor(START_GATES, requires_grad=True)

    def emit(index):
        def hook(module, args, out):
            return values[index] * out if case == "output" else args[0] + values[index] * (out - args[0])

        return hook

    hooks = [layer.register_forward_hook(emit(index)) for index, layer in enumerate(decoder.layers)]
    loss = decoder.model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result["gradient"] == pytest.approx(values.grad.tolist(), rel=1e-3, abs=1e-5)
    assert values.grad.abs().max() > 1e-2


def test_activation_checkpointing_changes_nothing(of):
    assert torch.allclose(gates(of("again-falling")), gates(of("falling-zero3-fp32")), atol=1e-4)
    again, once = of("again-lora"), of("lora-zero3-fp32")
    assert series(again, "stage2/loss/total") == pytest.approx(series(once, "stage2/loss/total"), rel=5e-3, abs=1e-5)
    assert series(again, "stage2/gap/layer_002") == pytest.approx(series(once, "stage2/gap/layer_002"), rel=1e-3)
    assert differing(again, once) < 0.01


def test_accumulation_changes_nothing_on_two_ranks(of):
    split, once = of("split-lora"), of("lora-zero3-fp32")
    assert series(split, "stage2/loss/total") == pytest.approx(series(once, "stage2/loss/total"), rel=5e-3, abs=1e-5)
    assert differing(split, once) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3_offload", "zero_infinity"])
def test_offloading_trains_or_says_why_it_cannot_here(run, models, text, tmp_path, name):
    """The first time, DeepSpeed compiles its optimizer for the CPU: minutes on two cores."""
    cases = {name: case("move", "plain", shipped(name, tmp_path), LORA, doomed=DOOMED)}
    [result] = run(name, cases, 1, 900).values()
    if "error" in result:
        pytest.skip(f"{name}: {result['error']}")
    dense = logits(models["plain"], text["plain"][:4])
    before, after = (distillation_loss(result[when], dense).item() for when in ("before", "after"))
    assert after < 0.85 * before


@pytest.mark.slow
def test_ranks_wait_for_rank_0_longer_than_for_each_other_at_the_start(launch, tmp_path, monkeypatch):
    """It measures, saves and publishes alone, for a large model longer than DeepSpeed's 10 minutes; here 1."""
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1")
    done = launch(REPOSITORY / "tests/multiproc/waiting.py", 75, num_ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("heard done") == 2
