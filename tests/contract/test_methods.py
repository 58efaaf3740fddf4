"""One suite that every method passes; a new one gets these tests by being listed in `tsp.methods.METHODS`."""

import functools

import pytest
import torch

from tests.models import bench, job, sample, tiny_model
from tsp.config import load_config, nest
from tsp.methods import METHODS, TRANSFERS, preset, score_verb, transfer_verb
from tsp.selection import cut
from tsp.targets import marked

LAYERS = 5
FEW = {"stage1.steps": 3, "stage2.steps": 3, "train.batch_size": 8}


@functools.cache
def text() -> torch.Tensor:
    return sample(tiny_model(num_layers=LAYERS), 16, 12)


def config(method: str, **changes):
    few = FEW | {"prune.method": method} | {key.replace("__", "."): value for key, value in changes.items()}
    return load_config([preset(method), *(nest(key, value) for key, value in few.items())])


def replies() -> torch.Tensor:
    """The same tokens, of which one in three is to be learned."""
    return marked(text(), torch.arange(12).expand(16, 12) % 3 == 0)


def scored(method: str, num_drop: int, protected=(), tokens=None, **changes):
    blocks = text() if tokens is None else tokens
    made = bench(tiny_model(num_layers=LAYERS), blocks, config(method, **changes), protected=protected)
    with made.engine.mounted(made.decoder.model) as made.model:
        return score_verb(method)(made, num_drop), made


@pytest.mark.parametrize("method", METHODS)
class TestMethod:
    @pytest.mark.parametrize("num_drop", [1, 2, LAYERS - 1])
    def test_order_and_scores(self, method, num_drop):
        if method == "dense":
            num_drop = 0
        scores, _ = scored(method, num_drop)
        assert len(scores.values) == LAYERS
        assert all(isinstance(value, float) for value in scores.values)
        assert len(set(scores.order)) == len(scores.order) >= num_drop
        assert set(scores.order) <= set(range(LAYERS))
        assert len(cut(scores.order, num_drop)) == num_drop
        assert scores.method

    def test_enough_layers_remain_to_choose_from_when_some_are_protected(self, method):
        num_drop = 0 if method == "dense" else 2
        scores, _ = scored(method, num_drop, protected=(0, LAYERS - 1))
        assert len(cut(scores.order, num_drop, (0, LAYERS - 1))) == num_drop

    def test_the_same_seed_gives_the_same(self, method):
        assert scored(method, 2)[0] == scored(method, 2)[0]

    def test_the_model_is_left_as_it_was(self, method):
        before = tiny_model(num_layers=LAYERS).state_dict()
        _, made = scored(method, 2)
        after = made.decoder.model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert made.decoder.bypassed == frozenset()
        assert not any(layer._forward_hooks for layer in made.decoder.layers)
        assert not any(parameter.requires_grad for parameter in made.decoder.model.parameters())

    def test_the_preset_is_valid_and_the_summary_is_one_line(self, method):
        assert config(method).prune.method == method
        summary = METHODS[method].summary
        assert summary
        assert "\n" not in summary

    def test_of_conversations_it_reads_all_and_looks_at_the_loss_of_replies(self, method):
        num_drop = 0 if method == "dense" else 2
        plain, of_replies = (scored(method, num_drop, tokens=blocks)[0].values for blocks in (text(), replies()))
        by_loss = ("tsp", "trsp", "ppl", "sleb", "taylor")
        assert (of_replies != plain) == (method in by_loss)

    @pytest.mark.parametrize("transfer", TRANSFERS)
    def test_it_goes_with_every_transfer(self, method, transfer):
        # Some put doomed layers into the layer before them, and layer 0 has none.
        protected = (0,) if TRANSFERS[transfer].folds else ()
        scores, made = scored(method, 2, protected, transfer=transfer)
        doomed, verb = cut(scores.order, min(2, len(scores.order)), protected), transfer_verb(transfer)
        made.model = None
        if verb is None:
            return
        verb(made, doomed, save_dtype=torch.float32)
        assert (made.transfer_steps > 0) == TRANSFERS[transfer].trains
        assert made.decoder.num_layers == LAYERS
        assert made.decoder.bypassed == frozenset()
        assert not any(parameter.requires_grad for parameter in made.decoder.model.parameters())
        assert list(made.decoder.model.state_dict()) == list(tiny_model(num_layers=LAYERS).state_dict())


@pytest.mark.parametrize("transfer", [name for name in TRANSFERS if TRANSFERS[name].verb])
def test_a_transfer_looks_at_the_loss_of_replies_if_it_has_one(transfer):
    weights = []
    for blocks in (text(), replies()):
        made = bench(tiny_model(num_layers=LAYERS), blocks, config("tsp", stage2__lr=1e-2))
        transfer_verb(transfer)(made, (2,), save_dtype=torch.float32)
        weights.append(torch.cat([tensor.flatten() for tensor in made.decoder.model.state_dict().values()]))
    assert torch.equal(*weights) != TRANSFERS[transfer].trains


def test_every_transfer_of_the_config_is_listed():
    assert {job(transfer=name).transfer for name in TRANSFERS} == set(TRANSFERS)
