"""Which jobs stand in which row, what is averaged and chosen, what is more than chance, and who won: all by hand."""

import dataclasses
import math
import random

import pytest

from tests.finished import BASE, DENSE, WINDOWS, finished
from tsp.compare.groups import compare
from tsp.compare.measures import columns, measures, over_seeds
from tsp.compare.rows import make_rows
from tsp.compare.significance import difference, window_losses
from tsp.errors import ConfigError

METHOD_TRANSFER = ("method", "transfer")


def only_table(jobs, by=METHOD_TRANSFER):
    [group] = compare(jobs, by).groups
    [table] = group.tables
    return table


def by_label(rows):
    return {row.label: row for row in rows}


def test_seeds_are_averaged_with_the_sample_deviation():
    jobs = [finished(seed=seed, ppl=ppl) for seed, ppl in enumerate((12.0, 13.0, 17.0))]
    [row] = only_table([*jobs, finished("tail", ppl=30.0)]).rows[:1]
    stat = row.stats["ppl/wiki"]
    assert (stat.mean, stat.n) == (pytest.approx(14.0), 3)
    assert stat.spread == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert [job.result["seed"] for job in row.jobs] == [0, 1, 2]


def test_one_job_has_no_spread():
    [row] = only_table([finished()]).rows
    assert row.stats["ppl/wiki"].spread is None
    assert not row.best, "a row without rivals is not the best of anything"


def test_rows_are_ordered_by_layers_and_perplexity_and_compete_only_with_as_many_layers():
    jobs = [
        finished("tail", ppl=20.0),
        finished("sleb", ppl=15.0),
        finished("sleb", ppl=30.0, dropped=(1, 2, 3)),
        finished("tail", ppl=40.0, dropped=(1, 2, 3)),
    ]
    rows = only_table(jobs).rows
    assert [(row.method, row.num_drop) for row in rows] == [("sleb", 2), ("tail", 2), ("sleb", 3), ("tail", 3)]
    assert [("ppl/wiki" in row.best) for row in rows] == [True, False, True, False]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another/model"},
        {"fingerprint": "f" * 16},
        {"corpora": ("wiki", "code")},
        {"settings": {"model.dtype": "bf16"}},
        {"settings": {"model.revision": "v2"}},
        {"dtype": "bf16"},
        {"parameters": {"dense": 2000, "pruned": 1800}},
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_grouped_apart(other):
    comparison = compare([finished("tail", ppl=20.0), finished("sleb", ppl=15.0, **other)], METHOD_TRANSFER)
    assert [[row.method for table in group.tables for row in table.rows] for group in comparison.groups] == [
        ["tail"],
        ["sleb"],
    ]
    assert [(sentence.group, sentence.best) for sentence in comparison.verdict][::1][0] == (0, "tail + finetune")
    assert comparison.groups[0].heading.startswith("tiny/model, 8 layers")


def test_equal_tokens_and_equal_seconds_are_two_tables():
    jobs = [finished(ppl=15.0), finished(ppl=14.0, settings={"budget_s": 60.0})]
    [group] = compare(jobs, METHOD_TRANSFER).groups
    assert [(table.budget_s, len(table.rows)) for table in group.tables] == [(None, 1), (60.0, 1)]
    assert "equal tokens" in group.tables[0].heading
    assert "60 s" in group.tables[1].heading
    assert len(group.jobs) == 2


def test_of_the_same_job_the_newest_counts():
    jobs = [finished(ppl=15.0, started_ms=2), finished(ppl=11.0, started_ms=3), finished(ppl=19.0, started_ms=1)]
    [row] = only_table(jobs).rows
    assert (row.stats["ppl/wiki"].n, row.stats["ppl/wiki"].mean) == (1, pytest.approx(11.0))


def test_names_and_measuring_do_not_make_another_job():
    jobs = [
        finished(
            ppl=15.0, started_ms=1, settings={"tracking.run_name": "a", "eval.speed_runs": 5, "prune.ratio": 0.25}
        ),
        finished(
            ppl=16.0, started_ms=2, settings={"tracking.run_name": "b", "eval.speed_runs": 0, "prune.num_drop": 2}
        ),
    ]
    [row] = only_table(jobs).rows
    assert row.stats["ppl/wiki"].mean == pytest.approx(16.0)


def grid(tuning):
    """A learning-rate grid whose perplexity is least where the tuning loss is not."""
    return [
        finished(settings={"stage2.lr": lr}, ppl=ppl, seed=seed, tuning_loss=tuning and tuning[lr])
        for lr, ppl in ((1e-3, 12.0), (3e-3, 13.0))
        for seed in (0, 1)
    ]


def test_a_setting_is_chosen_by_the_tuning_loss_and_not_by_the_result():
    [row] = only_table(grid({1e-3: 2.6, 3e-3: 2.5})).rows
    assert row.chosen == {"stage2.lr": 3e-3}
    assert (row.stats["ppl/wiki"].mean, row.stats["ppl/wiki"].n) == (pytest.approx(13.0), 2)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_setting_that_diverged_on_the_tuning_text_is_not_chosen(value):
    jobs = [
        finished(settings={"stage2.lr": lr}, ppl=ppl, seed=seed, tuning_loss=loss)
        for lr, seed, ppl, loss in (
            (1e-3, 0, 12.0, 2.6), (1e-3, 1, 12.0, 2.6), (1.0, 0, 12.0, 2.5), (1.0, 1, 1e6, value),
        )
    ]  # fmt: skip
    [row] = only_table(jobs).rows
    assert row.chosen == {"stage2.lr": 1e-3}
    [row] = only_table([*jobs, finished(settings={"stage2.lr": 9.0}, ppl=1e6, tuning_loss=value)]).rows
    assert row.chosen == {"stage2.lr": 1e-3}
    [row] = only_table(grid({1e-3: value, 3e-3: value})).rows
    assert row.stats["tuning_loss"].mean == math.inf


def test_without_a_tuning_text_the_settings_are_rows_and_the_verdict_says_so():
    comparison = compare(grid(None), METHOD_TRANSFER)
    rows = comparison.groups[0].tables[0].rows
    assert [(row.differs, row.chosen) for row in rows] == [({"stage2.lr": 1e-3}, {}), ({"stage2.lr": 3e-3}, {})]
    assert rows[0].label == "sleb + finetune lr=0.001"
    assert comparison.verdict[0].chosen_on_result == ["sleb + finetune"]
    assert "several settings were run without a tuning text" in comparison.verdict[0].text


def test_a_loss_on_another_tuning_text_chooses_nothing():
    jobs = [
        finished(
            ppl=11.0,
            tuning_loss=2.0,
            settings={"data.max_blocks": 8},
            calibration={"fingerprint": "a", "num_blocks": 8},
        ),
        finished(tuning_loss=2.5, settings={"data.max_blocks": 32}, calibration={"fingerprint": "b", "num_blocks": 32}),
    ]
    assert [row.differs for row in only_table(jobs).rows] == [{"data.max_blocks": 8}, {"data.max_blocks": 32}]


def test_settings_that_differ_by_a_key_of_the_table_are_rows_of_their_own():
    rows = only_table(grid({1e-3: 2.6, 3e-3: 2.5}), by=("method", "stage2.lr")).rows
    assert [row.keys for row in rows] == [{"method": "sleb", "stage2.lr": 1e-3}, {"method": "sleb", "stage2.lr": 3e-3}]


@pytest.mark.parametrize("transfer", ["none", "replaceme"])
def test_settings_of_a_training_that_does_not_happen_make_no_difference(transfer):
    jobs = [finished(transfer=transfer, settings={"stage2.lr": lr}, started_ms=n) for n, lr in enumerate((1e-3, 3e-3))]
    [row] = only_table(jobs).rows
    assert len(row.jobs) == 1


def test_rows_may_be_ratios():
    rows = only_table([finished(), finished(dropped=(1, 2, 3, 4))], by=("ratio",)).rows
    assert [row.keys["ratio"] for row in rows] == [0.25, 0.5]


@pytest.mark.parametrize(("key", "near"), [("metod", "method"), ("stage2.lrr", "stage2.lr"), ("ratios", "ratio")])
def test_an_unknown_key_is_an_error_with_the_nearest(key, near):
    with pytest.raises(ConfigError, match=f"got '{key}'; did you mean {near}"):
        compare([finished()], ("method", key))


def test_the_floor_stands_apart_and_is_never_the_best():
    table = only_table([finished(ppl=15.0), finished("tail", ppl=16.0), finished("dense", ppl=9.5, dropped=())])
    assert [row.method for row in table.rows] == ["sleb", "tail"]
    assert [row.method for row in table.floor] == ["dense"]
    assert "ppl/wiki" in table.rows[0].best


def reference_interval(mine, theirs, seed=1):
    """A paired percentile bootstrap in plain Python."""
    draw = random.Random(seed)
    ratios = []
    for _ in range(4000):
        picked = [draw.randrange(len(mine)) for _ in mine]
        ratios.append(math.exp(sum(mine[i] - theirs[i] for i in picked) / len(mine)))
    ratios.sort()
    return ratios[round(0.025 * 4000)], ratios[round(0.975 * 4000)]


def test_the_interval_is_that_of_a_bootstrap_written_down_again():
    jobs = [finished("sleb", ppl=12.0, seed=s, noise=0.1) for s in (0, 1)] + [finished("tail", ppl=12.3, noise=0.1)]
    rows = by_label(make_rows(jobs, METHOD_TRANSFER))
    row, other = rows["tail + finetune"], rows["sleb + finetune"]
    found = difference(row, other, "wiki")
    wanted = reference_interval(window_losses(row, "wiki"), window_losses(other, "wiki"))
    assert found.interval_percent == pytest.approx([100 * (bound - 1) for bound in wanted], abs=0.25)
    assert found.percent == pytest.approx(2.5, abs=0.01)


def test_losses_of_a_window_are_averaged_over_the_seeds():
    jobs = [finished(ppl=ppl, seed=seed, noise=0.1) for seed, ppl in enumerate((12.0, 15.0))]
    [row] = make_rows(jobs, METHOD_TRANSFER)
    expected = [(a + b) / 2 for a, b in zip(*(job.window_losses["wiki"] for job in jobs), strict=True)]
    assert window_losses(row, "wiki") == pytest.approx(expected)


@pytest.mark.parametrize(("noise", "tied"), [(0.2, True), (0.001, False)])
def test_what_cannot_be_told_from_the_best_is_marked(noise, tied):
    rows = only_table([finished("sleb", ppl=12.0, noise=noise), finished("tail", ppl=12.1, noise=noise)]).rows
    assert "ppl/wiki" in rows[0].best
    assert (rows[1].tied == {"wiki"}) is tied
    assert not rows[0].tied


def test_a_row_cannot_be_told_from_itself():
    [row] = only_table([finished()]).rows
    found = difference(row, row, "wiki")
    assert (found.outcome, found.percent, found.interval_percent) == ("ties", 0.0, (0.0, 0.0))


def test_without_the_windows_the_means_decide_and_it_is_said():
    jobs = [finished("tsp", "stage2", ppl=11.0, keep_losses=False), finished("sleb", ppl=12.0, keep_losses=False)]
    [sentence] = compare(jobs).verdict
    [duel] = sentence.duels
    assert (duel.difference.outcome, duel.difference.interval_percent) == ("wins", None)
    assert "not tested" in sentence.text


def sweep(**ppls):
    """Jobs by `method_transfer=ppl`."""
    return [finished(*name.split("_"), ppl=ppl, noise=0.005) for name, ppl in ppls.items()]


def test_the_verdict_says_who_wins_ties_and_loses():
    jobs = sweep(
        sleb_finetune=12.0, tail_none=20.0, trsp_stage2=13.2, trsp_finetune=13.2, tsp_stage2=11.4, tsp_finetune=11.8
    )
    [sentence] = compare([*jobs, finished("dense", ppl=9.9, dropped=())]).verdict
    assert (sentence.best, sentence.ppl, sentence.ppl_ratio) == (
        "tsp + stage2",
        pytest.approx(11.4),
        pytest.approx(1.14),
    )
    found = {(duel.method, duel.against): (duel.rival, duel.difference.outcome) for duel in sentence.duels}
    assert found == {
        ("trsp", "baseline"): ("sleb + finetune", "loses"),
        ("trsp", "control"): ("trsp + finetune", "ties"),
        ("tsp", "baseline"): ("sleb + finetune", "wins"),
        ("tsp", "control"): ("tsp + finetune", "wins"),
    }
    assert sentence.floor_ppl == pytest.approx(9.9)
    for words in (
        "2 of 8 layers dropped (25 %), at equal tokens: tsp + stage2 has the least perplexity on wiki, 11.4 (1.140",
        "The paper's method (trsp + stage2) loses to the best baseline, sleb + finetune, by 10.0 %",
        "cannot be told from its plain control, trsp + finetune, +0.0 %",
        "The project's preset (tsp + stage2) wins against the best baseline, sleb + finetune, by 5.0 %",
        "The dense model with the same training has 9.9.",
    ):
        assert words in sentence.text
    assert not sentence.missing


def test_the_verdict_turns_with_the_numbers():
    [sentence] = compare(sweep(sleb_finetune=12.0, tsp_stage2=13.0)).verdict
    assert sentence.best == "sleb + finetune"
    assert [duel.difference.outcome for duel in sentence.duels] == ["loses"]
    assert "Not run: the paper's method (trsp + stage2)." in sentence.text
    assert "Not run: a control for tsp (tsp + finetune)." in sentence.text


def test_another_selection_with_stage_2_is_no_baseline():
    [sentence] = compare(sweep(sleb_stage2=10.5, sleb_finetune=12.0, tsp_stage2=11.0)).verdict
    assert [duel.rival for duel in sentence.duels] == ["sleb + finetune"]
    assert sentence.best == "sleb + stage2"


def test_the_verdict_is_per_corpus_number_of_layers_budget_and_calibration_text():
    jobs = [
        finished(corpora=("wiki", "code"), **changes)
        for changes in (
            {},
            {"dropped": (1, 2, 3)},
            {"settings": {"budget_s": 9.0}},
            {"calibration": {"fingerprint": "d" * 16, "num_blocks": 4}},
        )
    ]
    verdict = compare(jobs).verdict
    found = {(s.corpus, s.num_drop, s.budget_s, s.calibration) for s in verdict}
    c, d = "c" * 16, "d" * 16
    frames = {(2, None, c), (3, None, c), (2, 9.0, None), (2, None, d)}
    assert found == {(corpus, *frame) for corpus in ("wiki", "code") for frame in frames}
    assert len(verdict) == 8


def test_a_difference_within_the_spread_of_the_seeds_is_called_so():
    jobs = [finished("tsp", "stage2", ppl=p, seed=s, noise=0.001) for s, p in enumerate((11.0, 13.0))]
    jobs += [finished("sleb", ppl=p, seed=s, noise=0.001) for s, p in enumerate((11.5, 13.5))]
    [sentence] = compare(jobs).verdict
    assert sentence.duels[0].difference.outcome == "wins"
    assert sentence.duels[0].difference.within_spread
    assert "less than the spread over the seeds" in sentence.text


def test_the_numbers_of_a_result():
    result = finished(
        ppl=12.0,
        speed={
            "prompt_tokens_per_s": {"dense": 100.0, "pruned": 125.0},
            "generation_tokens_per_s": {"dense": 10.0, "pruned": 12.5},
        },
        tasks={
            "piqa": {"pruned": {"acc": 0.6, "acc_norm": 0.7}, "dense": {"acc": 0.8}},
            "sciq": {"pruned": {"acc": 0.5}},
        },
        fidelity={"wiki": {"bare_drop": {"kl": 1.0, "top1": 0.3}, "pruned": {"kl": 0.25, "top1": 0.75}}},
        worst_slice={"corpus": "wiki", "slice": "code", "ratio": 1.9},
        generation={"dense": {"repetition": 0.1, "agreement": 1.0}, "pruned": {"repetition": 0.3, "agreement": 0.4}},
    ).result
    found = measures(result)
    expected = {
        "ppl/wiki": 12.0,
        "ppl_ratio/wiki": 1.2,
        "tasks": 0.6,
        "task/piqa": 0.7,
        "kl/wiki": 0.25,
        "top1/wiki": 0.75,
        "worst_slice": 1.9,
        "repetition": 0.3,
        "agreement": 0.4,
        "prompt_speedup": 1.25,
        "generation_speedup": 1.25,
        "seconds": 90.0,
        "device_hours": 2 * 90 / 3600,
        "served_s": 1e6 / 12.5,
        "served_device_hours": 2 * 1e6 / 12.5 / 3600,
        "peak_memory_gib": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "tuning_loss" not in found


def test_means_over_different_tasks_do_not_stand_beside_each_other():
    piqa, both = {"piqa": {"pruned": {"acc": 0.6}}}, {name: {"pruned": {"acc": 0.8}} for name in ("piqa", "boolq")}
    older = dataclasses.replace(finished("sleb", tasks=both), started_ms=0)
    of_floor = only_table([finished("sleb", tasks=piqa), finished("dense", transfer="finetune", tasks=both)])
    assert not any("tasks" in row.stats for row in (*of_floor.rows, *of_floor.floor))
    repeated = only_table([older, dataclasses.replace(finished("sleb", tasks=piqa), started_ms=1)])
    assert ["tasks" in row.stats for row in repeated.rows] == [True], "the older one stands in no row"
    for other, shown in ((piqa, True), (both, False), ({}, True)):
        rows = only_table([finished("sleb", tasks=piqa), finished("ppl", tasks=other)]).rows
        assert [("tasks" in row.stats) for row in rows if "task/piqa" in row.stats] == [shown] * (1 + bool(other))


def test_the_mean_over_tasks_is_over_those_that_were_asked_for():
    rows = {"mmlu": {"acc": 0.4}, "mmlu_law": {"acc": 0.1}, "mmlu_art": {"acc": 0.7}, "piqa": {"acc_norm": 0.8}}
    rows["gsm8k"] = {"exact_match.strict-match": 0.3, "exact_match.flexible-extract": 0.5}
    asked = {"settings": {"eval.tasks": ["mmlu", "piqa", "gsm8k"]}}
    found = measures(finished(**asked, tasks={task: {"pruned": row} for task, row in rows.items()}).result)
    assert found["tasks"] == pytest.approx((0.4 + 0.8 + 0.3) / 3)
    assert (found["task/gsm8k"], found["task/mmlu_law"]) == (0.3, 0.1)


def test_a_result_of_an_earlier_release_has_fewer_numbers_and_a_place():
    job = finished(ppl=12.0)
    late = {"calibration", "tuning_loss", "speed", "seconds", "trained_tokens", "peak_memory_gib", "weights_gib"}
    old = dataclasses.replace(job, result={key: value for key, value in job.result.items() if key not in late})
    rows = by_label(only_table([old, finished("tail", ppl=15.0)]).rows)
    assert set(rows["sleb + finetune"].stats) == {"ppl/wiki", "ppl_ratio/wiki", "ppl_bare_drop/wiki", "parameters"}
    assert "served_s" in rows["tail + finetune"].stats


def test_what_is_not_finite_was_not_measured():
    diverged = {"fidelity": {"wiki": {"pruned": {"kl": math.inf, "top1": 0.5}}}}
    found = over_seeds([finished(ppl=12.0).result, finished(ppl=12.0, **diverged).result])
    assert "kl/wiki" not in found
    assert (found["top1/wiki"].n, found["ppl/wiki"].n) == (1, 2)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_model_that_diverged_is_last_and_loses(value):
    ppl = {"wiki": {"dense": DENSE, "bare_drop": 20.0, "pruned": value}}
    diverged = finished("tsp", "stage2", perplexity=ppl, seed=1)
    diverged = dataclasses.replace(diverged, window_losses={"wiki": (math.nan,) * WINDOWS})
    comparison = compare([finished("tsp", "stage2", ppl=11.0), diverged, finished("sleb", ppl=90.0)], METHOD_TRANSFER)
    rows = comparison.groups[0].tables[0].rows
    assert [row.method for row in rows] == ["sleb", "tsp"]
    assert rows[1].stats["ppl/wiki"].mean == math.inf
    assert not rows[1].tied
    assert [duel.difference.outcome for duel in comparison.verdict[0].duels] == ["loses"]
    assert "The project's preset (tsp + stage2) loses to the best baseline, sleb + finetune: it diverged" in str(
        comparison.verdict[0].text
    )


def test_columns_come_in_one_order_and_only_where_something_was_measured():
    names = [column.name for column in columns(["seconds", "ppl/b", "ppl/a", "ppl_bare_drop/a"])]
    assert names == ["ppl_bare_drop/a", "ppl/b", "ppl/a", "seconds"]


def test_the_helper_makes_what_it_says():
    job = finished(ppl=12.0, noise=0.3)
    assert math.exp(math.fsum(job.window_losses["wiki"]) / WINDOWS) == pytest.approx(12.0)
    assert math.exp(math.fsum(BASE) / WINDOWS) == pytest.approx(DENSE)
