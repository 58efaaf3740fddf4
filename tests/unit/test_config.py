"""The config tree: strict, all faults at once, later layers win, YAML 1.2's scalars, numbers of layers."""

import pytest

from tsp.config import JobConfig, PruneSection, flatten, load_config, nest, number_to_drop, parse_override
from tsp.errors import ConfigError
from tsp.yaml12 import read_yaml


def message_of(*layers):
    with pytest.raises(ConfigError) as caught:
        load_config(layers)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_no_layers_give_the_defaults():
    assert load_config([]) == JobConfig()


def test_unknown_key_is_refused_with_its_path_and_the_nearest_name():
    assert message_of({"stage1": {"step": 3}}) == "unknown key stage1.step, did you mean steps?"
    assert message_of({"stagee1": {"steps": 3}}) == "unknown key stagee1, did you mean stage1?"
    assert "stage2.lora.rnak, did you mean rank?" in message_of(nest("stage2.lora.rnak", 4))


def test_unknown_key_without_a_near_name_gets_the_known_ones():
    message = message_of({"train": {"zzz": 1}})
    assert "unknown key train.zzz; known are batch_size, accumulation, activation_checkpointing" in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("prune.ratio", 1.3, "less than 1"),
        ("prune.ratio", 0, "greater than 0"),
        ("prune.num_drop", 0, "greater than or equal to 1"),
        ("stage1.steps", "many", "integer"),
        ("stage1.steps", 2.5, "integer"),
        ("stage1.placement", "inside", "'residual' or 'output'"),
        ("stage2.gates", True, "'hold', 'anneal' or 'off'"),
        ("model.dtype", "fp16", "'auto', 'bf16' or 'fp32'"),
        ("train", 3, "dictionary"),
        ("seed", -1, "greater than or equal to 0"),
    ],
)
def test_value_out_of_range_is_refused_with_what_is_allowed_and_what_came(key, value, allowed):
    message = message_of(nest(key, value))
    assert message.startswith(f"{key}: ")
    assert allowed in message
    assert message.endswith(f"got {value!r}")


def test_all_faults_stand_in_one_message():
    faults = message_of({"stage1": {"step": 3, "lr": -1}, "prune": {"ratio": 2}, "sed": 1}).split("; ")
    assert [fault.split(",")[0].split(":")[0] for fault in sorted(faults)] == [
        "prune.ratio",
        "stage1.lr",
        "unknown key sed",
        "unknown key stage1.step",
    ]


def test_config_is_frozen():
    config = load_config([])
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 3


def test_later_layers_win_key_by_key():
    config = load_config(
        [{"stage2": {"lr": 1.0, "task": {"lm": 1.0}}}, {"stage2": {"lr": 2.0}}, nest("stage2.task.distill", 0.5)]
    )
    assert (config.stage2.lr, config.stage2.task.lm, config.stage2.task.distill) == (2.0, 1.0, 0.5)
    assert config.stage2.steps == JobConfig().stage2.steps


def test_merging_leaves_the_layers_as_they_were():
    first, second = {"stage2": {"lr": 1.0}}, {"stage2": {"lr": 2.0, "task": {"lm": 3.0}}}
    load_config([{}, first, second, {"stage2": {"task": {"lm": 4.0}}}])
    load_config([second, first, {"stage2": {"task": {"lm": 4.0}}}])
    assert first == {"stage2": {"lr": 1.0}}
    assert second == {"stage2": {"lr": 2.0, "task": {"lm": 3.0}}}


def test_a_value_in_place_of_a_section_is_told_whatever_comes_later():
    assert message_of({"stage2": 3}, {"stage2": {"steps": 5}}) == message_of({"stage2": 3})
    assert message_of({"stage2": {"steps": 5}}, {"stage2": 3}) == message_of({"stage2": 3})
    assert message_of({"stage2": None}, {"stage2": {"steps": 5}}).startswith("stage2: input should be a valid dict")


def test_lists_are_replaced_not_joined():
    config = load_config([{"eval": {"sources": ["a", "b"]}}, {"eval": {"sources": ["c"]}}])
    assert config.eval.sources == ("c",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+2", -250.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("'1e-3'", "1e-3"),
        ("1.2.3", "1.2.3"),
        ("models:/demo@champion", "models:/demo@champion"),
    ],
)
def test_values_are_read_as_yaml_1_2(text, value):
    parsed = parse_override(f"some.key={text}")
    assert parsed == {"some": {"key": value}}
    assert type(parsed["some"]["key"]) is type(value)


def test_override_reaches_fields_that_yaml_1_1_would_spoil():
    config = load_config([parse_override("stage2.gates=off"), parse_override("stage2.lr=1e-4")])
    assert (config.stage2.gates, config.stage2.lr) == ("off", 1e-4)


def test_override_keeps_what_stands_after_the_first_equals_sign():
    assert parse_override("tracking.run_name=a=b") == {"tracking": {"run_name": "a=b"}}


@pytest.mark.parametrize("text", ["stage1.steps", "=3", "", "a.b=[1", "a.b={x: "])
def test_malformed_override_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--set "):
        parse_override(text)


@pytest.mark.parametrize("key", ["prune.", ".prune", "a..b"])
def test_override_with_an_empty_part_is_refused(key):
    with pytest.raises(ConfigError):
        load_config([parse_override(f"{key}=1")])


def test_yaml_file_is_read(tmp_path):
    (tmp_path / "job.yaml").write_text("# what differs\nstage2: {gates: off, lr: 1e-4}\nprune:\n  drop: [3, 7]\n")
    config = load_config([read_yaml(tmp_path / "job.yaml")])
    assert (config.stage2.gates, config.stage2.lr, config.prune.drop) == ("off", 1e-4, (3, 7))


def test_empty_yaml_file_changes_nothing(tmp_path):
    (tmp_path / "job.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "job.yaml") == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1, 2", "no valid YAML"),
        (b"stage1: {3: 4}", "no valid YAML: a key must be a word, got 3"),
        (b"null: 4", "no valid YAML: a key must be a word, got None"),
        (b"- 1\n- 2\n", "must be a mapping, got list"),
        (b"word", "must be a mapping, got str"),
        (b"a: \xff", "no UTF-8"),
        (b"a: !!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_unusable_yaml_file_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_missing_yaml_file_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="--config"):
        read_yaml(tmp_path / name)


def test_flatten_undoes_nest():
    assert flatten(nest("a.b.c", 1) | {"d": 2}) == {"a.b.c": 1, "d": 2}


@pytest.mark.parametrize(
    ("ratio", "num_layers", "num_drop"),
    [(0.25, 16, 4), (0.25, 10, 3), (0.25, 6, 2), (0.2, 32, 6), (0.5, 3, 2), (0.5, 1, None), (0.03, 16, None)]
    + [(0.0313, 16, 1), (0.99, 16, None), (0.96, 16, 15), (0.3, 22, 7), (0.25, 2, 1)],
)
def test_ratio_is_rounded_half_up_and_leaves_something(ratio, num_layers, num_drop):
    config = PruneSection(ratio=ratio)
    if num_drop is None:
        with pytest.raises(ConfigError, match=rf"prune.ratio drops \d+ of {num_layers} layers, got {ratio}"):
            number_to_drop(config, num_layers)
    else:
        assert number_to_drop(config, num_layers) == num_drop


def test_number_wins_over_ratio_and_list_over_number():
    assert number_to_drop(PruneSection(ratio=0.5, num_drop=3), 16) == 3
    assert number_to_drop(PruneSection(ratio=0.5, num_drop=3, drop=(1, 2)), 16) == 2


@pytest.mark.parametrize("num_drop", [4, 5])
def test_all_layers_cannot_go(num_drop):
    assert number_to_drop(PruneSection(num_drop=3), 4) == 3
    with pytest.raises(ConfigError, match=rf"must be in \[1, 3\], got {num_drop}"):
        number_to_drop(PruneSection(num_drop=num_drop), 4)


def test_the_stated_bounds_of_the_ratio_are_the_true_ones():
    with pytest.raises(ConfigError) as caught:
        number_to_drop(PruneSection(ratio=0.01), 16)
    low, high = str(caught.value).partition("allowed is [")[2].rstrip(")").split(", ")
    assert (low, high) == ("0.5/16", "15.5/16")
    assert number_to_drop(PruneSection(ratio=0.5 / 16), 16) == 1
    assert number_to_drop(PruneSection(ratio=15.5 / 16 - 1e-9), 16) == 15
    with pytest.raises(ConfigError):
        number_to_drop(PruneSection(ratio=15.5 / 16), 16)


def test_every_field_says_what_it_is():
    def fields(section, prefix=""):
        for name, field in section.model_fields.items():
            nested = isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
            if nested:
                yield from fields(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field.description

    assert not [name for name, description in fields(JobConfig) if not description]
