"""What a search may change: files, their faults, and the space around a job's own values."""

import pytest
import yaml

from tsp.cli import launched_prune
from tsp.config import flatten, load_config, nest
from tsp.errors import ConfigError
from tsp.options import configs_from_options, differing
from tsp.space import default_space, read_space, steps_compare, with_settings
from tsp.yaml12 import parse_yaml


def config(**settings):
    return load_config([nest(key.replace("__", "."), value) for key, value in settings.items()])


def knobs(text, **settings):
    return read_space(parse_yaml(text, "space"), config(**settings))


def test_ranges_choices_and_conditions():
    lr, rank, task, gates, lambda2 = knobs(
        "stage2.lr: {low: 1e-4, high: 1e-2, log: true}\n"
        "stage2.lora.rank: {low: 8, high: 32}\n"
        "stage2.task: [{lm: 0, distill: 1}, {lm: 0.5}]\n"
        "stage2.gates: [off, anneal]\n"
        "stage2.lambda2: {low: 0.01, high: 2, if: {stage2.gates: anneal}}\n"
    )
    assert (lr.low, lr.high, lr.log, lr.whole) == (1e-4, 1e-2, True, False)
    assert (rank.whole, rank.log) == (True, False)
    assert task.choices == ({"lm": 0, "distill": 1}, {"lm": 0.5})
    assert gates.choices == ("off", "anneal")
    assert [lambda2.applies({"stage2.gates": gate}) for gate in ("off", "anneal")] == [False, True]
    assert [lr.holds(value) for value in (1e-5, 1e-3)] == [False, True]
    assert [gates.holds(value) for value in ("hold", "off")] == [False, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the search space names no setting"),
        ("stage2.lrr: {low: 1, high: 2}", "unknown key stage2.lrr, did you mean lr?"),
        ("stage2.lr: {low: -1, high: 2}", "stage2.lr: input should be greater than or equal to 0, got -1"),
        ("stage2.lr: {low: 0, high: 2, log: true}", "low above 0 where log is true"),
        ("stage2.lr: {low: 2, high: 1}", "must have numbers low < high"),
        ("stage2.lr: {low: 1, high: .inf}", "must have numbers low < high"),
        ("stage2.lr: {low: 1}", "must have numbers low < high"),
        ("stage2.lr: {low: 1, hihg: 2}", "stage2.lr must be {low, high, log} or a list of choices"),
        ("stage2: {lr: {low: 1, high: 2}}", "written with dots like stage2.lr"),
        ("stage2.lr: 1e-3", "stage2.lr must be {low, high, log} or a list of choices"),
        ("stage2.lr: []", "stage2.lr is a list without choices"),
        ("stage2.gates: [off, anneel]", "got 'anneel'; did you mean anneal?"),
        ("stage2.lora.rank: {low: 1.5, high: 8}", "stage2.lora.rank: input should be a valid integer"),
        ("stage2.lr: {low: 1, high: 2, if: {stage2.gate: off}}", "names stage2.gate, which is no setting above it"),
        (
            "data.max_blocks: [8, 16]",
            "data.max_blocks cannot be searched: the losses would be of another model or text",
        ),
        ("prune.ratio: [0.1, 0.2]", "whoever drops least would win"),
        ("seed: [0, 1]", "whoever is luckiest would win"),
        ("prune.method: [sleb, ppl]", "compare methods with a sweep"),
    ],
)
def test_what_is_wrong_with_a_space_is_said(text, reason):
    with pytest.raises(ConfigError) as caught:
        read_space(parse_yaml(text, "space") or {}, config())
    assert caught.value.exit_code == 2
    assert reason in str(caught.value)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="trains nothing with stage2.trainable none"):
        knobs("stage2.trainable: [lora, none]", transfer="finetune")


@pytest.mark.parametrize("method", ["tsp", "trsp"])
def test_the_default_space_holds_the_jobs_own_values(method):
    given = configs_from_options(launched_prune.make_context("prune", ["--method", method]).params)[0][1]
    own = flatten(given.model_dump())
    space = read_space(default_space(given), given)
    lr = "stage2.lr_scale" if method == "tsp" else "stage2.lr"
    assert {knob.key for knob in space} >= {lr, "stage2.temperature", "stage2.gates", "stage2.lambda2"}
    apart = [knob.key for knob in space if knob.applies(own) and not knob.holds(own[knob.key])]
    # The paper's lambda2 is far too small.
    assert apart == ([] if method == "tsp" else ["stage2.lambda2"])


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"transfer": "finetune"}, {"stage2.lr_scale"}),
        ({"transfer": "finetune", "stage2__lr": 1e-4}, {"stage2.lr"}),
        ({"transfer": "distill"}, {"stage2.lr_scale", "stage2.temperature"}),
        ({"transfer": "replaceme"}, {"replaceme.ridge"}),
        (
            {"transfer": "stage2", "stage2__task": {"lm": 1, "distill": 0}, "stage2__gates": "hold"},
            {f"stage2.{key}" for key in ("lr_scale", "task.distill", "temperature", "hidden", "gates", "lambda2")},
        ),
        (
            {"transfer": "stage2", "stage2__task": {"lm": 0, "distill": 0}, "stage2__gates": "hold"},
            {f"stage2.{key}" for key in ("lr_scale", "temperature", "hidden", "gates", "lambda2")},
        ),
    ],
)
def test_the_default_space_is_that_of_the_transfer(settings, keys):
    assert set(default_space(config(**settings))) == keys


def test_a_transfer_without_settings_has_no_default_space():
    with pytest.raises(ConfigError, match="transfer none has no setting to search; take one of stage2, distill"):
        default_space(config(transfer="none"))


@pytest.mark.parametrize(
    ("text", "settings", "comparable"),
    [
        ("stage2.lr: [1, 2]", {}, True),
        ("stage2.trainable: [lora, full]", {}, True),
        ("stage2.steps: [10, 20]", {}, False),
        ("train.batch_size: [8, 16]", {}, False),
        ("stage2.lr: [1, 2]", {"budget_s": 60}, False),
    ],
)
def test_only_steps_of_equal_trainings_are_compared(text, settings, comparable):
    assert steps_compare(knobs(text, **settings), config(**settings)) is comparable


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--method", "trsp", "--num-drop", "3", "--seed", "4"],
        ["--model", "folder", "--data", "a.txt", "--eval-data", "b.txt", "--set", "stage2.lora.rank=4"],
        ["--drop", "3,7", "--set", "transfer=distill", "--set", "stage2.clip=null"],
    ],
)
def test_the_file_of_a_job_gives_the_job(words, tmp_path):
    job = configs_from_options(launched_prune.make_context("prune", words).params)[0][1]
    job = with_settings(job, {"stage2.lr": 3.21e-5, "stage2.gates": "off", "data.tuning_blocks": 8})
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(differing(job)))
    again = configs_from_options(launched_prune.make_context("prune", ["--config", str(file)]).params)[0][1]
    assert again.model_dump(exclude={"tracking"}) == job.model_dump(exclude={"tracking"})


def test_the_file_states_what_differs_and_nothing_else():
    [(_, demo)] = configs_from_options(launched_prune.make_context("prune", []).params)
    assert differing(demo) == {}
    assert differing(with_settings(demo, {"stage2.lr": 3.21e-5})) == {"stage2": {"lr": 3.21e-5}}
