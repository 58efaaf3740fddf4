"""Requirements: how they are read, where a wrong one is pointed at, and when a value keeps them."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import REPOSITORY
from tsp import evidence
from tsp.errors import ConfigError
from tsp.policy import (
    VS_CHAMPION,
    Requirement,
    check_alias,
    check_model_name,
    default_model_name,
    judge,
    read_policy,
    read_requirement,
    required_of,
)


def hint(name: str) -> str:
    return f"measure {name}"


@pytest.mark.parametrize(
    ("text", "name", "operator", "bound"),
    [
        ("ppl_ratio<=1.10", "ppl_ratio", "<=", 1.1),
        (" ppl/wikitext2 <= 12 ", "ppl/wikitext2", "<=", 12.0),
        ("speedup>1.2", "speedup", ">", 1.2),
        ("zero_shot/piqa_drop<=2e-2", "zero_shot/piqa_drop", "<=", 0.02),
        ("zero_shot/arc-easy_drop>=-1", "zero_shot/arc-easy_drop", ">=", -1.0),
        ("vs_champion.ppl_ratio<=1.01", "vs_champion.ppl_ratio", "<=", 1.01),
        ("slice_ratio/legal text<=1.1", "slice_ratio/legal text", "<=", 1.1),
        ("vs_champion.ppl/my own notes >= 2", "vs_champion.ppl/my own notes", ">=", 2.0),
        ("round_trip==ok", "round_trip", "==", "ok"),
    ],
)
def test_a_requirement_is_read(text, name, operator, bound):
    assert read_requirement(text) == Requirement(name=name, operator=operator, bound=bound)
    assert read_requirement(str(read_requirement(text))) == read_requirement(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", 0),
        ("<=1.1", 0),
        ("ppl_ratio", 9),
        ("ppl_ratio=1.1", 9),
        ("ppl_ratio =< 1.1", 10),
        ("ppl_ratio 1.1", 10),
        ("slice_ratio/legal text", 22),
        ("ppl_ratio<=", 11),
        ("ppl_ratio<=ten", 11),
        ("ppl_ratio<= nan", 12),
        ("ppl_ratio<=inf", 11),
        ("ppl_ratio<=1.1 speedup>=2", 15),
        ("round_trip==not,ok", 12),
    ],
)
def test_a_caret_points_at_what_cannot_be_read(text, place):
    with pytest.raises(ConfigError, match=f"at character {place + 1};") as caught:
        read_requirement(text)
    shown, pointed = caught.value.picture.splitlines()
    assert shown == f"    {text}"
    assert pointed.index("^") == 4 + place


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("ppl_ratio<=1.1", 1.1, True),
        ("ppl_ratio<1.1", 1.1, False),
        ("speedup>=1.2", 1.2, True),
        ("speedup>1.2", 1.2, False),
        ("num==3", 3.0, True),
        ("ppl_ratio<=1.1", math.nan, False),
        ("speedup>=1.2", math.nan, False),
        ("speedup>=1.2", math.inf, False),
        ("num==3", math.nan, False),
        ("round_trip==ok", "ok", True),
        ("round_trip==ok", "failed", False),
        ("round_trip==ok", 1.0, False),
        ("ppl_ratio<=1.1", "ok", False),
    ],
)
def test_a_value_keeps_a_bound_or_not(text, value, holds):
    assert read_requirement(text).holds(value) == holds


def test_what_is_missing_is_not_kept_and_says_what_measures_it():
    asked = [read_requirement(text) for text in ("ppl_ratio<=1.1", "speedup>=1.2", "kl<=1", "vs_champion.ppl_ratio<=1")]
    verdicts = judge(asked, {"ppl_ratio": 1.05, "speedup": 1.1}, first=False, how_to_measure=hint)
    assert [one.verdict for one in verdicts] == ["kept", "broken", "missing", "missing"]
    assert [one.passes for one in verdicts] == [True, False, False, False]
    assert verdicts[2].note == "measure kl"
    assert (verdicts[1].requirement, verdicts[1].name, verdicts[1].measured) == ("speedup>=1.2", "speedup", 1.1)


def test_the_first_champion_is_compared_with_none():
    asked = [read_requirement("vs_champion.ppl_ratio<=1.01"), read_requirement("ppl_ratio<=1.1")]
    verdicts = judge(asked, {}, first=True, how_to_measure=hint)
    assert [(one.verdict, one.passes) for one in verdicts] == [("not needed", True), ("missing", False)]


def test_a_policy_has_requirements_for_each_alias(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("champion: [ppl_ratio<=1.10, round_trip==ok]\nshadow: [ppl_ratio<=1.2]\n")
    two.write_text("# the same\nshadow:\n  - 'ppl_ratio <= 1.20'\nchampion: ['ppl_ratio<=1.1', round_trip == ok]\n")
    policy = read_policy(one)
    assert [str(row) for row in required_of(policy, "champion")] == ["ppl_ratio<=1.1", "round_trip==ok"]
    assert policy.hash == read_policy(two).hash
    two.write_text("shadow: [ppl_ratio<=1.21]\n")
    assert policy.hash != read_policy(two).hash
    with pytest.raises(ConfigError, match=r"nothing of 'champio'; did you mean champion\?"):
        required_of(policy, "champio")


@pytest.mark.parametrize(
    "content", ["", "champion: []", "champion: ppl_ratio<=1", "champion: [1]", "champion: [{a: 1}]", "v1: [kl<=1]"]
)
def test_a_policy_that_asks_for_nothing_is_refused(tmp_path, content):
    path = tmp_path / "policy.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        read_policy(path)


@pytest.mark.parametrize("alias", ["champion", "previous_champion", "eu-west", "A1"])
def test_an_alias_that_mlflow_takes(alias):
    check_alias(alias)


@pytest.mark.parametrize("alias", ["", "1", "v1", "V20", "latest", "a b", "a/b", "a@b", "x" * 256])
def test_an_alias_that_mlflow_does_not_take(alias):
    with pytest.raises(ConfigError, match="an alias must be"):
        check_alias(alias)


NAMES = ["demo-pruned", "Qwen2.5-0.5B-pruned", "a", "my model v2", "x" * 240, "modèle", "a+b_c", "lock"]
NO_NAMES = ["", " ", ".", "..", "../x", "a/b", "a:b", "a@b", "it's", 'a"b', "a%b", "a#b", "-a", "a ", "x" * 241,
            "a.lock", "a\nb", "a\x00b", "models:/a"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_the_registry_takes(name):
    check_model_name(name)


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_refused_before_anything_runs(name):
    with pytest.raises(ConfigError, match="the name of a registered model must be"):
        check_model_name(name)


@given(st.one_of(st.from_regex(r"\w[\w.+ -]{0,250}", fullmatch=True), st.text(max_size=40)))
def test_whatever_is_taken_mlflow_takes_too(name):
    """mlflow's own validation, of the model, of its lock and of the logged model; and a search for it by name."""
    from mlflow.utils.search_utils import SearchModelVersionUtils
    from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

    try:
        check_model_name(name)
    except ConfigError:
        return
    for one in (name, f"{name}.lock"):
        _validate_model_name(one)
        assert len(one) <= 256
    _validate_logged_model_name(re.sub(r"[^\w+ -]", "_", name))
    [found] = SearchModelVersionUtils.parse_search_filter(f"name = '{name}'")
    assert found["value"] == name


@given(st.text(max_size=300))
def test_the_default_name_is_always_one(base_model):
    check_model_name(default_model_name(base_model))


@pytest.mark.parametrize(
    ("base_model", "name"),
    [("org/Name-1.5B", "Name-1.5B-pruned"), ("/a/my model's", "my-model-s-pruned"), ("..", "model-pruned")],
)
def test_the_default_name_is_that_of_the_model(base_model, name):
    assert default_model_name(base_model) == name


def test_the_policy_of_the_docs_asks_for_values_that_are_measured():
    policy = read_policy(REPOSITORY / "docs" / "policy.yaml")
    assert set(policy.requirements) == {"candidate", "shadow", "champion", "monitor"}
    names = {one.name.removeprefix(VS_CHAMPION) for rows in policy.requirements.values() for one in rows}
    assert not [name for name in names if f"`{name}`" not in evidence.__doc__]
