"""A DeepSpeed JSON: its `auto` values are filled from the config, and all that contradicts it is refused at once."""

import json

import pytest
import torch

from tsp.config import load_config, nest
from tsp.errors import ConfigError
from tsp.sharding import AdamW, read_json, resolve, with_optimizer

ZERO3_AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def resolved(content, *overrides, world_size=1, dtype=torch.float32):
    config = load_config([nest(key, value) for key, value in overrides])
    return resolve(content, config, world_size=world_size, hidden_size=64, dtype=dtype)


def message_of(content, *overrides, **given):
    with pytest.raises(ConfigError) as caught:
        resolved(content, *overrides, **given)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_auto_is_filled_from_the_config():
    filled = resolved(
        ZERO3_AUTO,
        ("train.batch_size", 16),
        ("train.accumulation", 2),
        ("stage2.clip", 0.5),
        world_size=4,
        dtype=torch.bfloat16,
    )
    assert filled == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 4096,
            "stage3_prefetch_bucket_size": 3686,
            "stage3_param_persistence_threshold": 640,
        },
    }


def test_what_is_not_said_is_filled_too_and_the_rest_is_kept():
    filled = resolved({"zero_optimization": {"stage": 2}, "aio": {"queue_depth": 8}, "steps_per_print": 5})
    assert filled["train_batch_size"] == 8
    assert filled["bf16"] == {"enabled": False}
    assert filled["aio"] == {"queue_depth": 8}
    assert filled["steps_per_print"] == 5


def test_no_clipping_is_deepspeeds_zero():
    assert resolved(ZERO3_AUTO, ("stage2.clip", None))["gradient_clipping"] == 0.0


def test_content_is_left_as_it_was():
    before = json.dumps(ZERO3_AUTO)
    resolved(ZERO3_AUTO)
    assert json.dumps(ZERO3_AUTO) == before


def test_values_that_agree_are_accepted():
    content = {"train_batch_size": 8, "bf16": {"enabled": False}, "gradient_clipping": 1.0}
    assert resolved({**content, "zero_optimization": {"stage": 0}})["train_batch_size"] == 8


def test_all_contradictions_stand_in_one_message():
    message = message_of(
        {
            "train_batch_size": 32,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 3.0,
            "bf16": {"enabled": True},
            "fp16": {"enabled": True},
            "optimizer": {"type": "Adam", "params": {"lr": "auto"}},
            "scheduler": {"type": "WarmupLR"},
            "zero_optimization": {"stage": 7, "sub_group_size": "auto"},
        }
    )
    assert message.startswith("--ds: ")
    for part in (
        "train_batch_size is 32, the job has 8",
        "gradient_accumulation_steps is 4, the job has 1",
        "gradient_clipping is 3.0, stage2.clip is 1.0",
        "bf16.enabled is True, the job has False",
        "fp16.enabled is True, the job has False",
        "optimizer belongs in the config",
        "scheduler belongs in the config",
        "zero_optimization.sub_group_size cannot be 'auto'",
        "zero_optimization.stage must be 0, 1, 2 or 3",
    ):
        assert part in message
    assert "\n" not in message


def test_stage_must_be_said():
    assert "zero_optimization.stage must be" in message_of({})


@pytest.mark.parametrize("section", [3, "three", None, [3]])
def test_zero_optimization_must_be_an_object(section):
    assert "zero_optimization must be an object" in message_of({"zero_optimization": section})


def test_dtype_sections_must_be_objects():
    message = message_of({"zero_optimization": {"stage": 3}, "bf16": True, "fp16": False})
    assert message == "--ds: bf16 must be an object; fp16 must be an object"


@pytest.mark.parametrize(("batch", "ranks", "accumulation"), [(8, 3, 1), (8, 2, 3), (8, 16, 1), (1, 2, 1)])
def test_batch_must_be_whole_on_every_rank(batch, ranks, accumulation):
    message = message_of(
        ZERO3_AUTO, ("train.batch_size", batch), ("train.accumulation", accumulation), world_size=ranks
    )
    assert f"train.batch_size must be a multiple of ranks x accumulation = {ranks} x {accumulation}" in message
    assert message.endswith(f"got {batch}")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_global_batch_is_the_same_on_any_number_of_ranks(ranks):
    filled = resolved(ZERO3_AUTO, world_size=ranks)
    micro, accumulation = filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]
    assert micro * accumulation * ranks == filled["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("offload", "compiled"),
    [(None, False), ({}, False), ({"device": "none"}, False), ({"device": "cpu"}, True), ({"device": "nvme"}, True)],
)
def test_only_an_offloaded_optimizer_has_to_be_compiled(offload, compiled):
    sharding = resolved({"zero_optimization": {"stage": 2, "offload_optimizer": offload}})
    optimizer = with_optimizer(sharding, AdamW(), world_size=1)["optimizer"]
    assert ("torch_adam" not in optimizer["params"]) == compiled


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "no valid JSON"), (b"[1]", "must be an object, got list"), (b"\xff\xfe{}", "no valid JSON")],
)
def test_unusable_json_is_refused(tmp_path, content, reason):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_missing_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_json(tmp_path / "none.json")
