"""int8: weights against a reference of a few lines, the folder in a fresh process, perplexity against a plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.models import logits, model_folder, tiny_model, tokens
from tsp.config import EvalConfig, ModelConfig
from tsp.data import Corpus
from tsp.drop import drop_to
from tsp.errors import ConfigError, ModelError
from tsp.evaluation.predictions import Reference, measure_predictions
from tsp.evaluation.state import Exam, evaluate_state
from tsp.proof import proof
from tsp.quantize import check_quantizable, in_int8, measure, plain_speeds, quantize
from tsp.source import open_source

TOKENS = tokens(2, 12)
ALONE = {"rank": 0, "world_size": 1, "total": lambda values: values, "batch_size": 2, "device": torch.device("cpu")}


def reloaded(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)


def opened(folder):
    return open_source(ModelConfig(path=str(folder)))


def int8(weight):
    """Values and scales `[rows, 1]`: symmetric, each row by its largest weight."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127.5
    return (weight * (1 / scales)).round().clamp(-128, 127), scales


def by_hand(model):
    """The same model with the weights that int8 stands for."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                values, scales = int8(module.weight)
                module.weight.data = values * scales
    return model


@pytest.fixture(scope="module", autouse=True)
def torchs_own_linear():
    """Tests that ran before may have left DeepSpeed's in its place, which can do nothing with int8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", torch._C._nn.linear)
        yield


@pytest.fixture(scope="module", params=["llama", "llama-tied", "opt"])
def made(request, tmp_path_factory):
    """Of a family: the dense folder and that in int8."""
    place = tmp_path_factory.mktemp(request.param)
    dense = model_folder(place / "dense", tiny_model(request.param, 3), torch.bfloat16)
    return opened(dense), quantize(opened(dense), place / "int8", TOKENS)


def exam_on(blocks, positions=4096):
    config = EvalConfig(prompts=2, continuation_tokens=4, speed_runs=1, compare_positions=positions)
    return Exam(config=config, corpora=[Corpus("text", "text", blocks)], max_positions=64, sharing=ALONE)


def test_linear_maps_are_rounded_row_by_row_and_nothing_else_is(made):
    dense, folder = made
    before, after = reloaded(dense.folder, dtype=torch.float32), reloaded(folder.folder, dtype=torch.float32)
    rounded = 0
    for name, held in after.named_parameters():
        weight = before.get_parameter(name)
        if hasattr(held, "qdata"):
            values, scales = int8(weight)
            assert torch.equal(held.qdata.float(), values), name
            assert torch.equal(held.scale, scales), name
            rounded += 1
        else:
            assert torch.equal(held, weight), name
    layers = before.get_submodule(dense.stack)
    assert rounded == sum(isinstance(module, torch.nn.Linear) for module in layers.modules())


def test_a_fresh_process_gives_the_logits_of_the_model_in_memory(made, tmp_path):
    from safetensors.torch import save_file

    dense, folder = made
    here = logits(reloaded(folder.folder, dtype=torch.float32), TOKENS)
    save_file({"tokens": TOKENS, "logits": here}, tmp_path / "probe.safetensors")
    found = proof(str(folder.folder), str(tmp_path / "probe.safetensors"))
    assert found["max_logit_difference"] == 0
    assert found["cached_equals_uncached"]
    assert (found["missing"], found["unexpected"]) == ([], [])
    assert (here - logits(reloaded(dense.folder, dtype=torch.float32), TOKENS)).abs().max() > 1e-2


def test_the_model_is_that_of_the_rounded_weights(tmp_path):
    model = tiny_model(num_layers=3)
    folder = quantize(opened(model_folder(tmp_path / "dense", model)), tmp_path / "int8", TOKENS)
    found = logits(reloaded(folder.folder), TOKENS)
    torch.testing.assert_close(found, logits(by_hand(model), TOKENS), atol=1e-3, rtol=1e-3)


def test_what_is_not_rounded_keeps_the_dtype_of_the_dense_folder(made):
    dense, folder = made
    assert reloaded(folder.folder).get_input_embeddings().weight.dtype == torch.bfloat16
    assert folder.dtype == dense.dtype == torch.bfloat16
    assert (folder.folder / "tokenizer.json").is_file()


def test_it_is_measured_like_any_state(made):
    dense, folder = made
    blocks = tokens(5, 16, seed=3)
    exam = exam_on(blocks)
    whole = reloaded(dense.folder, dtype=torch.float32)
    evaluate_state(exam, lambda ids: logits(whole, ids), "dense")
    found = measure(folder, exam, "quantized", torch.float32)
    model = reloaded(folder.folder, dtype=torch.float32)
    losses = [float(F.cross_entropy(logits(model, row[None])[0, :-1], row[1:])) for row in blocks]
    assert found.perplexity["text"].ppl == pytest.approx(math.exp(sum(losses) / 5), rel=1e-6)
    assert found.fidelity["text"].num_positions == 5 * 15
    assert found.fidelity["text"].kl > 0
    assert len(found.continuations) == 2
    assert found.prompt_tokens_per_s > 0


def test_only_what_is_asked_for_stays(tmp_path):
    dense = model_folder(tmp_path / "dense", tiny_model(num_layers=2))
    options = {"dtype": torch.float32, "probe": TOKENS, "trust": False}
    in_int8(dense, tmp_path / "gone", exam_on(TOKENS), "quantized", keep=False, **options)
    found = in_int8(dense, tmp_path / "kept", exam_on(TOKENS), "pruned_quantized", keep=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "kept"]
    assert found.size_gib == (tmp_path / "kept/model.safetensors").stat().st_size / 2**30
    assert list(plain_speeds({"pruned_quantized": found})) == ["pruned", "pruned_quantized"]
    assert min(plain_speeds({"pruned_quantized": found}).values()) > 0


def test_a_rank_alone_compares_where_it_has_the_dense_logits():
    """Rank 0 of two has measured the first two of four windows."""
    text, dense, state = (
        Corpus("text", "text", tokens(4, 12)),
        tiny_model(num_layers=2),
        tiny_model(num_layers=2, seed=1),
    )
    shared, whole = Reference(text.blocks, 4096), Reference(text.blocks[:2], 4096)
    both = ALONE | {"world_size": 2}
    measure_predictions(lambda ids: logits(dense, ids), text, shared, is_dense=True, **both)
    _, found, _ = measure_predictions(lambda ids: logits(state, ids), text, shared.own(), is_dense=False, **ALONE)
    half = Corpus("text", "text", text.blocks[:2])
    measure_predictions(lambda ids: logits(dense, ids), half, whole, is_dense=True, **ALONE)
    _, wanted, _ = measure_predictions(lambda ids: logits(state, ids), half, whole, is_dense=False, **ALONE)
    assert found.num_positions == wanted.num_positions == 2 * 11
    assert found.kl == pytest.approx(wanted.kl)


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    dense = opened(model_folder(tmp_path / "dense", tiny_model(num_layers=2)))
    check_quantizable(dense)
    monkeypatch.setattr("transformers.utils.is_torchao_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'tsp\[quantize\]'"):
        check_quantizable(dense)


def test_layers_without_linear_maps_are_refused(tmp_path):
    """This family has a class of its own for them."""
    with pytest.raises(ModelError, match="rounds linear maps .* have none"):
        check_quantizable(opened(model_folder(tmp_path / "dense", tiny_model("gpt2", 2))))


def test_a_quantized_folder_is_neither_quantized_again_nor_pruned(made, tmp_path):
    folder = made[1]
    with pytest.raises(ModelError, match="not quantized yet, .* is: torchao"):
        check_quantizable(folder)
    with pytest.raises(ModelError, match="drop layers of the model it was made from"):
        drop_to(str(folder.folder), [1], tmp_path / "smaller", root=tmp_path)


def test_what_goes_wrong_leaves_nothing_behind(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot be quantised: .*Not a directory"):
        quantize(made[0], tmp_path / "file" / "int8", TOKENS)
    with pytest.raises(ModelError, match="cannot be measured"):
        measure(made[1], exam_on(tokens(2, 65)), "quantized", torch.complex64)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
