"""What `tsp advise` says, on jobs whose numbers are known beforehand."""

import math
import subprocess
import sys

import pytest
import torch

from tests.finished import DENSE, finished
from tsp.advise import advise
from tsp.compare.groups import compare
from tsp.data import token_divergence
from tsp.targets import marked


def said(*jobs):
    texts = {}
    for advice in advise(compare(jobs)):
        texts.setdefault(advice.topic, []).append(advice.text)
    return {topic: " ".join(found) for topic, found in texts.items()}


def test_how_far_one_can_go_within_each_allowance():
    jobs = [
        finished(ppl=10.4, dropped=(2,)),
        finished("tsp", "stage2", ppl=10.9, dropped=(2, 5)),
        finished("sleb", ppl=11.5, dropped=(2, 5)),
        finished(ppl=20, dropped=(2, 4, 5)),
    ]
    text = said(*jobs)["reach"]
    assert "up to 5 % more perplexity: 1 of 8 layers (sleb + finetune, a prompt 1.25 times as fast)" in text
    assert "up to 10 % more perplexity: 2 of 8 layers (tsp + stage2" in text
    assert "up to 25 % more perplexity: 2 of 8 layers" in text
    assert "1: 1.040 times dense (sleb + finetune); 2: 1.090 times dense (tsp + stage2); 3: 2.000 times" in text
    assert "up to 5 % more perplexity: none tried" in said(jobs[3])["reach"]


def part(ratio):
    return {"ppl": {"dense": DENSE, "pruned": DENSE * ratio}}


def test_a_part_that_suffers_more_than_the_rest_is_named():
    uneven = said(finished(ppl=11, slices={"wiki": {"legal": part(1.9), "plain": part(1.05)}}))["parts"]
    assert "legal (wiki) 1.900 times dense, plain (wiki) 1.050 times dense; all the text 1.100" in uneven
    assert "calibrate on more text of that kind" in uneven
    even = said(finished(ppl=11, slices={"wiki": {"legal": part(1.12)}}))["parts"]
    assert "no part suffers much more than the rest" in even
    assert "--slices" in said(finished())["parts"]


@pytest.mark.parametrize(
    ("divergence", "loss", "alike"),
    [(0.12, math.log(DENSE), True), (0.3, math.log(DENSE), False), (0.12, math.log(DENSE) - 0.5, False)],
)
def test_whether_the_calibration_text_is_like_the_evaluation_text(divergence, loss, alike):
    about = {"divergence": {"wiki": divergence}, "divergence_of_halves": 0.1, "loss_dense": loss}
    text = said(finished(calibration=about))["calibration"]
    assert ("is like the evaluation text" in text) is alike
    assert f"{divergence:.3f} bits apart, the dense model's loss {math.log(DENSE) - loss:+.2f} nats" in text
    assert "was not measured" in said(finished())["calibration"]


def of_sequences(count, ppl, **settings):
    return finished(
        ppl=ppl,
        settings={"data.max_blocks": count} | settings,
        calibration={"num_blocks": count, "fingerprint": f"{count:016d}"},
    )


def test_whether_more_text_would_help_is_read_off_the_last_doubling():
    text = said(of_sequences(16, 13.0), of_sequences(32, 12.0), of_sequences(128, 11.0))["more text"]
    per_doubling = 100 * (1 - (11 / 12) ** 0.5)
    assert f"From 32 to 128 sequences perplexity fell by {per_doubling:.1f} % a doubling: more would help" in text
    assert "hardly help" in said(of_sequences(64, 11.01), of_sequences(128, 11.0))["more text"]
    assert '--set "data.max_blocks=[4, 8, 16]"' in said(finished())["more text"]


@pytest.mark.parametrize("other", [{"stage2.lr": 1e-1}, {"budget_s": 60.0}])
def test_whether_more_text_would_help_is_read_off_jobs_that_are_alike_otherwise(other):
    alike = [of_sequences(16, 12.0), of_sequences(32, 11.0)]
    text = said(*alike, of_sequences(32, 15.0, **other))["more text"]
    assert f"From 16 to 32 sequences perplexity fell by {100 / 12:.1f} % a doubling" in text
    assert "Whether more calibration text helps" in said(alike[0], of_sequences(32, 15.0, **other))["more text"]


def test_what_was_not_tried_is_proposed_and_what_was_is_not():
    first = said(finished(ppl=10.2, transfer="none"))["next"]
    for hint in ("--max-ppl-ratio 1.10", "--method tsp", "transfer=finetune", "--seed 0,1,2", "--eval-data"):
        assert hint in first
    jobs = [
        finished(method, transfer, ppl=12, seed=seed, corpora=("wiki", "mine"))
        for method, transfer in (("tsp", "stage2"), ("sleb", "finetune"))
        for seed in (0, 1)
    ]
    assert "next" not in said(*jobs)
    assert "Nothing was dropped" in said(finished("dense", dropped=()))["next"]


def test_divergence_of_tokens_is_that_of_the_formula():
    one, other = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 2, 2, 3]])
    p, q = [0.5, 0.25, 0.25, 0.0], [0.25, 0.0, 0.5, 0.25]
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = sum(
        share * math.log2(share / mean) / 2
        for shares in (p, q)
        for share, mean in zip(shares, middle, strict=True)
        if share
    )
    assert token_divergence(one, other) == pytest.approx(expected)
    assert token_divergence(one, one) == 0
    assert token_divergence(one, one + 10) == pytest.approx(1)
    assert token_divergence(marked(one, one > 1), other) == pytest.approx(expected), "what is only read counts, too"


def test_the_command_wants_an_experiment_that_is_there(tmp_path):
    # In a process of its own: one with ranks ends at once on wrong input.
    words = [sys.executable, "-m", "tsp", "advise", "nothing", "--json"]
    refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.strip().splitlines()[-1].startswith("error: there is no tracking store")
