"""What a result says, by the names of requirements: small numbers that can be checked by hand."""

import math

import pytest

from tests.finished import DENSE, finished
from tsp.compare.measures import measures
from tsp.evidence import how_to_measure, measured_of, relative_to

FIDELITY = {"kl": 0.1, "top1": 0.8}


def result(ppl: float = 12.0, **changes) -> dict:
    return finished(ppl=ppl, corpora=("wiki", "code"), **changes).result


def test_perplexity_is_relative_to_the_dense_model_and_the_worst_corpus_counts():
    job = result()
    job["perplexity"]["code"]["pruned"] = 13.0
    measured = measured_of(job)
    assert measured["ppl/wiki"] == 12.0
    assert measured["ppl_ratio/wiki"] == pytest.approx(12 / DENSE)
    assert measured["ppl_ratio"] == measured["ppl_ratio/code"] == pytest.approx(1.3)


def test_all_that_a_job_may_measure_has_a_name():
    job = result(
        fidelity={
            "wiki": {"bare_drop": FIDELITY, "pruned": FIDELITY},
            "code": {"bare_drop": FIDELITY, "pruned": {"kl": 0.3, "top1": 0.6}},
        },
        slices={"wiki": {"rare": {"ppl": {"dense": 4.0, "bare_drop": 9.0, "pruned": 6.0}}}},
        worst_slice={"corpus": "wiki", "slice": "rare", "ratio": 1.5},
        tasks={
            "piqa": {"dense": {"acc": 0.7, "acc_norm": 0.72}, "pruned": {"acc": 0.66, "acc_norm": 0.7}},
            "boolq": {"dense": {"acc": 0.6}, "pruned": {"acc": 0.61}},
            "story": {"dense": {"perplexity": 5.0}, "pruned": {"perplexity": 6.0}},
        },
        size_gib={"dense": 2.0, "pruned": 1.5},
        kv_cache_bytes_per_token={"dense": 100.0, "pruned": 75.0},
        generation={"dense": {"repetition": 0.1, "agreement": None}, "pruned": {"repetition": 0.2, "agreement": 0.9}},
        speed={
            "prompt_tokens_per_s": {"dense": 100.0, "bare_drop": 130.0, "pruned": 125.0},
            "generation_tokens_per_s": {"dense": 10.0, "pruned": 11.0},
        },
        checkpoint="out/model",
    )
    measured = measured_of(job)
    expected = {
        "kl/wiki": 0.1, "kl/code": 0.3, "kl": 0.3, "top1/code": 0.6, "top1": 0.6,
        "slice_ratio/rare": 1.5, "worst_slice_ratio": 1.5,
        "zero_shot/piqa": 0.7, "zero_shot/piqa_drop": 0.02, "zero_shot/boolq_drop": -0.01, "zero_shot_drop": 0.02,
        "size_gib": 1.5, "size_ratio": 0.75, "kv_cache_ratio": 0.75, "parameters_ratio": 0.8,
        "speedup": 1.25, "generation_speedup": 1.1, "repetition": 0.2, "agreement": 0.9,
    }  # fmt: skip
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value), name
    assert measured["round_trip"] == "ok"
    assert not any("story" in name for name in measured)


@pytest.mark.parametrize(
    ("asked", "worst"), [(["mmlu", "wikitext"], 0.03), (["mmlu", "a_tag"], 0.2), (["bare_group"], 0.2), ([], 0.2)]
)
def test_the_largest_drop_is_of_the_tasks_asked_for_as_far_as_they_have_numbers(asked, worst):
    drops = {"mmlu": 0.03, "mmlu_law": 0.2}
    tasks = {task: {"dense": {"acc": 0.5}, "pruned": {"acc": 0.5 - drop}} for task, drop in drops.items()}
    tasks |= {"bare_group": {"dense": {}, "pruned": {}}, "wikitext": {"dense": {"ppl": 9.0}, "pruned": {"ppl": 9.5}}}
    for said in ({"settings": {"eval.tasks": asked}}, {"asked_tasks": asked}):
        measured = measured_of(result(tasks=tasks, **said))
        assert measured["zero_shot_drop"] == pytest.approx(worst)
        assert measured["zero_shot/mmlu_law_drop"] == pytest.approx(0.2)


def test_tables_and_promotions_mean_the_same_accuracy():
    for metrics in ({"acc": 0.6, "acc_norm": 0.7}, {"exact_match.strict-match": 0.3}, {"acc": 0.5}):
        job = result(tasks={"one": {"dense": metrics, "pruned": metrics}})
        assert measured_of(job)["zero_shot/one"] == measures(job)["task/one"]


def test_what_was_not_measured_has_no_value():
    job = result(speed={"prompt_tokens_per_s": {"dense": None, "bare_drop": None, "pruned": None}})
    names = measured_of(job)
    assert not {"speedup", "generation_speedup", "kl", "worst_slice_ratio", "round_trip", "size_gib"} & set(names)


def test_an_evaluation_says_the_same_as_a_job():
    job = result(fidelity={corpus: {"bare_drop": FIDELITY, "pruned": FIDELITY} for corpus in ("wiki", "code")})
    document = {
        "corpora": job["corpora"],
        "perplexity": {corpus: {"ppl": 12.0, "num_windows": 40, "block_tokens": 32} for corpus in ("wiki", "code")},
        "ppl": {corpus: {"dense": DENSE, "model": 12.0} for corpus in ("wiki", "code")},
        "fidelity": {corpus: {"model": FIDELITY} for corpus in ("wiki", "code")},
        "parameters": {"dense": 1000, "model": 800},
        "speed": {"prompt_tokens_per_s": {"dense": 100.0, "model": 125.0}},
    }
    assert measured_of(document) == measured_of(job)


def test_relative_to_the_champion():
    champion, candidate = result(ppl=11.0), result(ppl=12.0)
    champion["perplexity"]["code"]["pruned"] = 13.0
    champion["speed"]["prompt_tokens_per_s"]["pruned"] = 110.0
    tasks = [{"piqa": {"dense": {"acc": 0.7}, "pruned": {"acc": acc}}} for acc in (0.69, 0.66)]
    relative = relative_to(champion | {"tasks": tasks[0]}, candidate | {"tasks": tasks[1]})
    assert relative["vs_champion.ppl/wiki"] == pytest.approx(12 / 11)
    # Of the largest ratios the quotient would be 1.2 / 1.3, as if nothing had become worse.
    assert relative["vs_champion.ppl_ratio"] == pytest.approx(12 / 11)
    assert relative["vs_champion.speedup"] == pytest.approx(1.25 / 1.1)
    assert relative["vs_champion.zero_shot/piqa_drop"] == pytest.approx(0.03)


def test_where_neither_repeats_itself_they_are_the_same():
    champion, silent, repeating = (
        result(generation={"pruned": {"repetition": share, "agreement": None}}) for share in (0.0, 0.0, 0.1)
    )
    assert relative_to(champion, silent)["vs_champion.repetition"] == 1.0
    assert math.isnan(relative_to(champion, repeating)["vs_champion.repetition"])


def test_on_other_text_perplexity_is_not_compared_but_speed_is():
    relative = relative_to(result(fingerprint="f" * 16), result())
    assert not any("ppl" in name for name in relative)
    assert relative["vs_champion.speedup"] == 1.0


def test_other_tasks_and_other_parts_of_the_text_are_not_compared():
    def tasks(**drops):
        return {"tasks": {task: {"dense": {"acc": 0.7}, "pruned": {"acc": 0.7 - drop}} for task, drop in drops.items()}}

    relative = relative_to(result(**tasks(piqa=0.02, gsm8k=0.3)), result(**tasks(piqa=0.05)))
    assert relative["vs_champion.zero_shot/piqa_drop"] == pytest.approx(0.03)
    assert "vs_champion.zero_shot_drop" not in relative
    alike = relative_to(result(**tasks(piqa=0.02, gsm8k=0.3)), result(**tasks(piqa=0.05, gsm8k=0.1)))
    assert alike["vs_champion.zero_shot_drop"] == pytest.approx(0.1 - 0.3)

    def slices(ratio, **tokens):
        rows = {name: {"num_tokens": n, "ppl": {"dense": 4.0, "pruned": 4.0 * ratio}} for name, n in tokens.items()}
        return {"slices": {"wiki": rows}, "worst_slice": {"corpus": "wiki", "slice": "x", "ratio": ratio}}

    champion = result(**slices(1.8, rare=100, easy=900))
    names = {"vs_champion.slice_ratio/rare", "vs_champion.worst_slice_ratio"}
    assert names <= set(relative_to(champion, result(**slices(1.2, rare=100, easy=900))))
    for other in ({"rare": 100}, {"rare": 101, "easy": 900}):
        found = relative_to(champion, result(**slices(1.2, **other)))
        assert not any("slice" in name for name in found)
        assert "vs_champion.ppl/wiki" in found


def test_a_champion_without_speed_gives_no_number():
    champion = result(speed={"prompt_tokens_per_s": {"dense": 100.0, "pruned": None}})
    assert "vs_champion.speedup" not in relative_to(champion, result())
    assert math.isnan(
        relative_to(result(parameters={"dense": 1, "pruned": 0}), result())["vs_champion.parameters_ratio"]
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero_shot/piqa_drop", "--tasks piqa`"),
        ("vs_champion.zero_shot/piqa_drop", "--tasks piqa`"),
        ("worst_slice_ratio", "--slices FILE.yaml"),
        ("generation_speedup", "eval.generation_runs=10"),
        ("ppl/news", "--eval-data"),
        ("vs_champion.ppl_ratio", "the champion was measured on other text"),
        ("round_trip", "tsp verify"),
        ("parameter_ratio", "did you mean parameters_ratio?"),
        ("zzz", "nothing measures it"),
    ],
)
def test_what_is_missing_comes_with_what_measures_it(name, words):
    assert words in how_to_measure(name, measured_of(result()), "tsp promote pruned 2")
