"""From what a user states to the jobs of a sweep."""

import pytest

from tsp.cli import launched_prune
from tsp.errors import ConfigError
from tsp.grid import combinations, varied
from tsp.options import configs_from_options


def jobs(*words):
    return configs_from_options(launched_prune.make_context("prune", list(words)).params)


def test_a_list_for_one_value_is_varied_and_a_list_for_a_list_is_not():
    stated = {
        "prune": {"method": ["tsp", "sleb"], "drop": [3, 7]},
        "eval": {"sources": ["a.txt", "b.txt"]},
        "seed": [0, 1],
        "transfer": "none",
    }
    assert varied(stated) == {"prune.method": ["tsp", "sleb"], "seed": [0, 1]}


def test_a_setting_that_is_a_list_is_varied_by_a_list_of_lists():
    assert varied({"prune": {"drop": [[3, 7], [2, 5]]}}) == {"prune.drop": [[3, 7], [2, 5]]}
    assert [config.prune.drop for _, config in jobs("--set", "prune.drop=[[3, 7], [2, 5]]")] == [(3, 7), (2, 5)]


def test_every_combination_once():
    assert list(combinations({"a": [1, 2], "b": ["x", "y"]})) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert list(combinations({})) == [{}]


def test_commas_yaml_and_set_mean_the_same(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("prune: {method: [tsp, sleb], ratio: [0.125, 0.25]}\nseed: [0, 1]\n")
    by_commas = jobs("--method", "tsp,sleb", "--ratio", "0.125,0.25", "--seed", "0,1")
    by_set = jobs("--set", "prune.method=[tsp, sleb]", "--set", "prune.ratio=[0.125, 0.25]", "--set", "seed=[0, 1]")
    by_file = jobs("--config", str(file))
    assert len(by_commas) == 8
    assert by_commas == by_set == by_file


def test_each_job_has_the_preset_of_its_method():
    paper, baseline = (config for _, config in jobs("--method", "trsp,sleb"))
    assert (paper.stage1.placement, paper.transfer, baseline.transfer) == ("output", "stage2", "none")


def test_one_value_is_a_job_and_a_list_of_one_a_sweep():
    assert jobs("--method", "sleb")[0][0] == {}
    assert jobs("--set", "prune.method=[sleb]")[0][0] == {"prune.method": "sleb"}


def test_an_option_wins_over_the_files_list(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("prune: {method: [tsp, sleb], ratio: [0.125, 0.25]}\n")
    assert [config.prune.method for _, config in jobs("--config", str(file), "--method", "ppl")] == ["ppl", "ppl"]


def test_the_dense_floor_is_there_once_whatever_the_ratio():
    found = [
        (config.prune.method, choice["prune.ratio"])
        for choice, config in jobs("--method", "tsp,dense", "--ratio", "0.125,0.25")
    ]
    assert found == [("tsp", 0.125), ("tsp", 0.25), ("dense", 0.125)]


def test_a_sweep_registers_only_if_it_is_asked_to():
    single, many, asked = (
        jobs(*words)[0][1].tracking.register_model
        for words in (["--method", "tsp"], ["--method", "tsp,sleb"], ["--method", "tsp,sleb", "--register", "small"])
    )
    assert (single, many, asked) == (True, False, True)


def test_a_grids_amount_wins_over_another_one_of_the_rest_and_gives_way_to_the_command_line(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("prune: {num_drop: 4}\nsweep: [{prune: {ratio: 0.5}}, {prune: {drop: [3, 7]}}, {seed: 1}]\n")

    def found(*words):
        sections = [config.prune for _, config in jobs("--config", str(file), *words)]
        return [section.drop or section.num_drop or section.ratio for section in sections]

    assert found() == [0.5, (3, 7), 4]
    assert found("--set", "prune.num_drop=2") == [2, 2], "the first two grids are one job then"


def test_several_grids_in_a_file(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "seed: [0, 1]\n"
        "sweep:\n"
        "  - {prune: {method: trsp}}\n"
        "  - {prune: {method: [sleb, ppl]}, transfer: [none, finetune], seed: 0}\n"
    )
    found = jobs("--config", str(file))
    assert [list(choice.values()) for choice, _ in found] == [
        ["trsp", 0], ["trsp", 1], [0, "sleb", "none"], [0, "sleb", "finetune"], [0, "ppl", "none"],
        [0, "ppl", "finetune"],
    ]  # fmt: skip
    assert [(config.prune.method, config.transfer, config.seed) for _, config in found] == [
        ("trsp", "stage2", 0), ("trsp", "stage2", 1), ("sleb", "none", 0), ("sleb", "finetune", 0), ("ppl", "none", 0),
        ("ppl", "finetune", 0),
    ]  # fmt: skip


def test_a_sweep_that_is_no_list_of_grids_is_refused(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("sweep: {method: tsp}\n")
    with pytest.raises(ConfigError, match="sweep must be a list of mappings"):
        jobs("--config", str(file))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--method", "tsp,slep"], "did you mean sleb"),
        (["--set", "prune.ratio=[]"], "prune.ratio is a list without values"),
        (["--ratio", "0.25,1.5"], "prune.ratio: input should be less than 1, got 1.5"),
        (["--ratio", "0.25,0.5", "--num-drop", "3"], "give one of --ratio, --num-drop, --drop"),
        (["--set", "prune.ratios=[1, 2]"], "unknown key prune.ratios, did you mean ratio?"),
        (["--config", "sweep.yaml", "--set", "stage2=3"], "stage2: input should be a valid dictionary .*, got 3"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said(words, reason, tmp_path):
    (tmp_path / "sweep.yaml").write_text("sweep: [{stage2: {steps: 5}}]\n")
    with pytest.raises(ConfigError, match=reason.replace("?", r"\?")):
        jobs(*words)


def test_a_job_of_a_sweep_that_makes_no_sense_is_named():
    with pytest.raises(ConfigError, match=r"\(in the job prune.method laco, transfer stage2\)"):
        jobs("--method", "sleb,laco", "--set", "transfer=[stage2, none]")
