"""What a sweep asks of the engine: weights as they were, and errors of rank 0 that every rank hears of."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from tests.models import REPOSITORY, bench, corpus_file, engine, job, model_folder, tiny_model, tokens
from tsp.errors import ConfigError, ModelError
from tsp.job import prepare
from tsp.methods.trsp.stage2 import transfer
from tsp.search import prepare_search
from tsp.space import default_space, read_space
from tsp.sweep import prepare_sweep

LAYERS = 4
DOOMED = (1, 2)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_restored_weights_are_bit_identical_after_a_transfer(trainable, stage):
    model = tiny_model(num_layers=LAYERS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = bench(model, tokens(8, 16), job(stage2__trainable=trainable, stage2__lr=0.1, stage2__steps=2), stage)
    with made.engine.mounted(made.decoder.model):
        pass  # As in a job, where the dense model is measured first: under ZeRO-3 it is in shards now.
    with made.engine.restored(made.decoder.model):
        transfer(made, DOOMED, save_dtype=torch.bfloat16)
        changed_inside = not all(torch.equal(tensor, before[name]) for name, tensor in whole(made).items())
    assert changed_inside
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(made).items())
    assert not any(parameter.requires_grad for parameter in made.decoder.model.parameters())


@pytest.fixture
def on_a_disk(tmp_path):
    """The arguments of a job whose weights are offloaded to a disk: its config by settings, and the rest."""
    paths = {
        "model__path": str(model_folder(tmp_path / "tiny", tiny_model(num_layers=LAYERS))),
        "data__source": str(corpus_file(tmp_path / "text.jsonl", tokens(80, 16))),
    }
    ds = REPOSITORY / "ds_configs/zero_infinity.json"
    yield lambda **settings: job(**paths, eval__block_tokens=16, **settings), ds, {"root": tmp_path, "world_size": 1}
    assert not (tmp_path / "mlruns").exists(), "nothing is opened"


def refusal(reason):
    return pytest.raises(ConfigError, match=rf"^--ds: zero_optimization.offload_param.device is nvme, and {reason}$")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prune__max_ppl_ratio": 1.1, "data__tuning_blocks": 2}, "prune.max_ppl_ratio .*give prune.num_drop"),
        ({"prune__method": "laco", "transfer": "merge"}, "prune.method laco .*give another method"),
        ({}, None),
    ],
    ids=["bound", "laco", "nothing to put back"],
)
def test_weights_on_a_disk_are_not_put_back(on_a_disk, settings, reason):
    config_of, ds, rest = on_a_disk
    if reason is None:
        assert prepare(config_of(**settings), ds, None, **rest)
        return
    with refusal(reason) as caught:
        prepare(config_of(**settings), ds, None, **rest)
    assert len(str(caught.value)) <= 200


def test_weights_on_a_disk_are_not_put_back_for_the_next_job(on_a_disk):
    config_of, ds, rest = on_a_disk
    for moves in ("none", "stage2"):
        jobs = [({"seed": seed}, config_of(seed=seed, transfer=moves)) for seed in (0, 1)]
        with nullcontext() if moves == "none" else refusal("a sweep puts weights back.*run one job at a time"):
            assert len(prepare_sweep(jobs, ds, None, **rest)) == 2


def test_weights_on_a_disk_are_not_put_back_for_the_next_trial(on_a_disk, tmp_path):
    config_of, ds, rest = on_a_disk
    config = config_of()
    space = read_space(default_space(config), config)
    limits = {"minutes": 1.0, "max_trials": 2, "best": tmp_path / "tuned.yaml"}
    with refusal("tsp tune puts weights back.*tune another sharding.*"):
        prepare_search(config, space, ds, **limits, differing=lambda config: {}, **rest)


def whole(made) -> dict[str, torch.Tensor]:
    """The state dict, gathered."""
    found = {}
    for name, tensor in made.decoder.model.state_dict(keep_vars=True).items():
        with made.engine.gathered([tensor]):
            found[name] = tensor.detach().clone()
    return found


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pass_for_hidden_states_computes_logits_of_one_position(family, stage):
    made, shapes = bench(tiny_model(family), tokens(4, 16), job(), stage), []
    head = made.decoder.model.get_output_embeddings()
    with made.engine.mounted(made.decoder.model) as model, torch.no_grad():
        with made.decoder.hidden_states() as whole_pass:
            logits = model(made.blocks_NT)
        hook = head.register_forward_hook(lambda _, args, output: shapes.append(output.shape[:2]))
        with made.decoder.hidden_states() as short:
            model.run(made.blocks_NT)
        hook.remove()
    assert logits.shape[:2] == (4, 16)
    assert shapes == [(4, 1)]
    assert all(torch.equal(one, other) for one, other in zip(short, whole_pass, strict=True))


def test_a_pass_for_hidden_states_of_a_model_that_knows_no_such_word():
    model = tiny_model()
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    made = bench(model, tokens(4, 16), job())
    with made.engine.mounted(model) as mounted, torch.no_grad(), made.decoder.hidden_states() as states:
        mounted.run(made.blocks_NT)
    assert len(states) == made.decoder.num_layers + 1


def test_no_seconds_left_trains_nothing():
    made = bench(tiny_model(num_layers=LAYERS), tokens(8, 16), job())
    made.seconds_left = -1.0
    transfer(made, DOOMED, save_dtype=torch.float32)
    dense = made.load_again().model.state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in whole(made).items())
    assert made.transfer_steps == 0


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_second_model_is_gone_when_it_is_not_needed_any_more(stage):
    made = bench(tiny_model(num_layers=LAYERS), tokens(8, 16), job(), stage)
    with made.engine.mounted(made.decoder.model) as student:
        teacher = made.load_again().model
        gone = weakref.ref(teacher)
        with made.engine.mounted(teacher) as second:
            second(made.blocks_NT)
        student(made.blocks_NT)
        del teacher, second
        gc.collect()
        assert gone() is None
        student(made.blocks_NT)


def test_an_error_of_the_first_rank_is_raised():
    own = engine(job())
    assert own.on_first(lambda: 7) == 7
    with pytest.raises(ModelError, match="broken"):
        own.on_first(lambda: (_ for _ in ()).throw(ModelError("broken")))
    with pytest.raises(ZeroDivisionError):
        own.on_first(lambda: 1 / 0)
