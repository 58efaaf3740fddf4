"""Training states: what is gone on with is what would have been, and a damaged file is nothing."""

import pytest
import torch
from safetensors import safe_open

from tests.models import bench, job, tiny_model, tokens
from tsp.methods.trsp import stage1
from tsp.methods.trsp.stage2 import transfer
from tsp.settings import StateConfig
from tsp.states import States

LAYERS, STEPS, DOOMED = 4, 6, (1, 2)
STAGE2 = {"stage2__lr": 0.02, "stage2__steps": STEPS, "stage2__lambda2": 0.5}


class CutOff(Exception):  # noqa: N818  No error: it stands for a kill.
    """The job is cut off here."""


def started(folder, settings, stage, *, stop_after=None, job_hash="one"):
    """A bench that keeps a state each other step, cut off behind some step."""
    made = bench(tiny_model(num_layers=LAYERS), tokens(16, 16), job(**settings), stage)
    made.states = States(made.engine, folder, job_hash, StateConfig(every_steps=2))
    seen = []

    def after_step(stage, stats, gates):
        seen.append(stats.step)
        if len(seen) == stop_after:
            raise CutOff

    made.after_step = after_step
    return made, seen


def weights(made):
    """Of what will not be dropped: a closed layer is not kept."""
    found = {}
    going = [f".layers.{index}." for index in DOOMED]
    for name, tensor in made.decoder.model.state_dict(keep_vars=True).items():
        if any(part in name for part in going):
            continue
        with made.engine.gathered([tensor]):
            found[name] = tensor.detach().clone()
    return found


def told(made):
    timeless = [(step, {k: v for k, v in values.items() if not k.startswith("perf/")}) for step, values in made.logged]
    return timeless, made.gate_history, made.global_step, made.trained_tokens, made.transfer_steps


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (0, {}),
        (0, {"model__dtype": "bf16"}),
        (0, {"stage2__trainable": "none", "stage2__gates": "hold"}),
        pytest.param(2, {"stage2__trainable": "full", "stage2__gates": "anneal"}, marks=pytest.mark.slow),
        pytest.param(2, {"model__dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param(3, {"train__accumulation": 2, "stage2__weight_decay": 0.1}, marks=pytest.mark.slow),
        (3, {"stage2__trainable": "full", "stage2__gates": "anneal"}),
        pytest.param(3, {"model__dtype": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_a_transfer_goes_on_to_the_same_weights(tmp_path, stage, kind):
    settings = STAGE2 | kind
    whole, _ = started(tmp_path / "whole", settings, stage)
    transfer(whole, DOOMED, save_dtype=torch.float32)

    cut, seen = started(tmp_path / "cut", settings, stage, stop_after=5)
    with pytest.raises(CutOff):
        transfer(cut, DOOMED, save_dtype=torch.float32)
    assert seen == [0, 1, 2, 3, 4]
    resumed, seen = started(tmp_path / "cut", settings, stage)
    transfer(resumed, DOOMED, save_dtype=torch.float32)
    assert seen == [4, 5], "two states of two steps each are known"
    assert told(resumed) == told(whole)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("schedule", ["budget", "greedy", "one-shot"])
@pytest.mark.parametrize("stop_after", [3, 11])
def test_learned_gates_go_on_to_the_same_gates(tmp_path, schedule, stop_after):
    settings = {"stage1__schedule": schedule, "stage1__steps": 8, "stage1__lr": 0.1, "stage1__lambda1": 0.5}
    if stop_after > 8 and schedule != "greedy":
        pytest.skip("it has one round")

    def scored(made):
        with made.engine.mounted(made.decoder.model) as made.model:
            return stage1.score(made, 2)

    whole, _ = started(tmp_path / "whole", settings, 0)
    cut, _ = started(tmp_path / "cut", settings, 0, stop_after=stop_after)
    resumed, seen = started(tmp_path / "cut", settings, 0)
    expected = scored(whole)
    with pytest.raises(CutOff):
        scored(cut)
    assert scored(resumed) == expected
    assert told(resumed) == told(whole)
    assert seen[0] == (stop_after - 1) % 8 // 2 * 2


def kept(folder):
    return sorted(folder.glob("*.safetensors"))


def test_the_last_two_are_kept_and_hold_nothing_frozen(tmp_path):
    made, _ = started(tmp_path, STAGE2, 0)
    transfer(made, DOOMED, save_dtype=torch.float32)
    assert [path.name.split("-")[:2] for path in kept(tmp_path)] == [["00000004", "stage2"], ["00000006", "stage2"]]
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    with safe_open(kept(tmp_path)[0], "pt") as file:
        names = set(file.keys())
    assert all(".lora_" in name for name in names - {"step"}), names
    made.states.clear()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_has_half_written_goes(tmp_path):
    for name in ("00000003-stage2-0123456789abcdef.tmp", "00000009-stage1-0123456789abcdef.tmp"):
        (tmp_path / name).write_bytes(bytes(9))
    made, _ = started(tmp_path, STAGE2, 0)
    transfer(made, DOOMED, save_dtype=torch.float32)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path):
    (tmp_path / "00000003-stage2-0123456789abcdef.tmp").mkdir()
    made, _ = started(tmp_path, STAGE2, 0)
    transfer(made, DOOMED, save_dtype=torch.float32)
    assert len(kept(tmp_path)) == 2
    made.states.clear()
    assert not kept(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "cut", "empty"])
def test_a_damaged_state_is_passed_over(tmp_path, damage, caplog):
    cut, _ = started(tmp_path, STAGE2, 0, stop_after=5)
    with pytest.raises(CutOff):
        transfer(cut, DOOMED, save_dtype=torch.float32)
    last = kept(tmp_path)[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes({"changed": content, "cut": content[:-5], "empty": b""}[damage])
    resumed, seen = started(tmp_path, STAGE2, 0)
    transfer(resumed, DOOMED, save_dtype=torch.float32)
    assert seen == [2, 3, 4, 5]
    assert f"{last} is damaged" in caplog.text


def test_with_all_states_damaged_new_ones_are_kept(tmp_path):
    whole, _ = started(tmp_path, STAGE2, 0)
    transfer(whole, DOOMED, save_dtype=torch.float32)
    for path in kept(tmp_path):
        path.write_bytes(b"")
    again, _ = started(tmp_path, STAGE2, 0, stop_after=3)
    with pytest.raises(CutOff):
        transfer(again, DOOMED, save_dtype=torch.float32)
    resumed, seen = started(tmp_path, STAGE2, 0)
    transfer(resumed, DOOMED, save_dtype=torch.float32)
    assert seen == [2, 3, 4, 5]


def test_each_question_keeps_its_own_states_whatever_their_step_numbers(tmp_path):
    """As under a bound: the second number of layers that is tried begins where the first began."""
    for doomed in (DOOMED, (0, 1)):
        cut, _ = started(tmp_path, STAGE2, 0, stop_after=5 if doomed == DOOMED else 3)
        with pytest.raises(CutOff):
            transfer(cut, doomed, save_dtype=torch.float32)
    (tmp_path / "00000099-stage2-0123456789abcdef.safetensors").touch()  # As an earlier version named them.
    again, seen = started(tmp_path, STAGE2, 0)
    transfer(again, DOOMED, save_dtype=torch.float32)
    again.states.forget("stage2", {"doomed": list(DOOMED)})
    other, seen_of_other = started(tmp_path, STAGE2, 0)
    transfer(other, (0, 1), save_dtype=torch.float32)
    assert (seen, seen_of_other) == ([4, 5], [2, 3, 4, 5])
    assert [int(path.name[:8]) for path in kept(tmp_path)] == [4, 6, 99]
    other.states.clear()
    assert not list(tmp_path.iterdir())


def test_the_seconds_of_what_is_known_are_told(tmp_path):
    cut, _ = started(tmp_path, STAGE2, 0, stop_after=5)
    seconds, after_step = [], cut.after_step

    def timed(stage, stats, gates):
        seconds.append(stats.seconds)
        after_step(stage, stats, gates)

    cut.after_step = timed
    with pytest.raises(CutOff):
        transfer(cut, DOOMED, save_dtype=torch.float32)
    resumed, _ = started(tmp_path, STAGE2, 0)
    for _ in range(2):
        assert resumed.states.last("stage2", {"doomed": list(DOOMED)}).seconds == pytest.approx(sum(seconds[:4]))
    assert (cut.states.known_s, resumed.states.known_s) == (0, pytest.approx(2 * sum(seconds[:4])))


def test_another_job_and_other_layers_know_nothing_of_it(tmp_path):
    cut, _ = started(tmp_path, STAGE2, 0, stop_after=5)
    with pytest.raises(CutOff):
        transfer(cut, DOOMED, save_dtype=torch.float32)
    for job_hash, doomed in (("two", DOOMED), ("one", (0, 1))):
        other, seen = started(tmp_path, STAGE2, 0, stop_after=1, job_hash=job_hash)
        with pytest.raises(CutOff):
            transfer(other, doomed, save_dtype=torch.float32)
        assert seen == [0]
