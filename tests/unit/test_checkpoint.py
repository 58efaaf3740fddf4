"""Models on disk: opened with care, saved without layers, loaded by transformers alone; faults are named."""

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.models import logits, model_folder, sample, tiny_model, tokens
from tsp import checkpoint
from tsp.checkpoint import load, prove, round_weights, save_without, whole_or_not_at_all
from tsp.config import ModelConfig
from tsp.errors import ConfigError, ModelError
from tsp.files import require_new
from tsp.fresh import told_fresh
from tsp.proof import proof
from tsp.saving import move_and_round
from tsp.source import load_tokenizer, open_source
from tsp.surgery import renamed

FAMILIES = ["llama", "llama-tied", "opt", "gpt2", "mistral", "qwen2", "gemma2"]
DROPPED = (1, 3)


def whole(parameters, *, modify=False):
    """What `Engine.gathered` is where nothing is sharded."""
    return nullcontext()


def opened(folder, **changes):
    return open_source(ModelConfig(path=str(folder), **changes))


def loaded(folder, dtype=torch.float32):
    source = opened(folder)
    decoder = load(source, dtype, nullcontext())
    decoder.model.eval()
    return source, decoder


def reloaded(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def save(folder, dropped, output, dtype=torch.float32):
    source, decoder = loaded(folder, dtype)
    save_without(decoder, source, dropped, output, gathered=whole, write=True)
    return source, decoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per family, made when it is first asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = model_folder(tmp_path_factory.mktemp(family), tiny_model(family))
        return made[family]

    return folder


@pytest.fixture
def llama(folders, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_tells_the_truth_without_reading_weights(folders, family):
    model, source = tiny_model(family), opened(folders(family))
    assert source.num_layers == 5
    assert source.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    layers = model.get_submodule(source.stack)
    assert source.layer_parameters == tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert (source.dtype, source.max_positions, source.revision) == (torch.float32, 64, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_model_is_the_bypassed_model_bit_for_bit(folders, family, tmp_path):
    output, ids = tmp_path / "pruned", tokens(2, 24)
    source, decoder = save(folders(family), DROPPED, output)
    with decoder.bypassing(DROPPED):
        expected = logits(decoder.model, ids)
    model = reloaded(output)
    assert torch.equal(logits(model, ids), expected)
    assert model.config.get_text_config(decoder=True).num_hidden_layers == 3
    kinds = getattr(source.config, "layer_types", None)
    if kinds:
        assert model.config.layer_types == [kinds[0], kinds[2], kinds[4]]
    assert type(model) is type(decoder.model)
    assert sorted(path.name for path in output.iterdir()) >= ["config.json", "generation_config.json"]
    assert load_tokenizer(opened(output)).get_vocab() == load_tokenizer(source).get_vocab()
    assert opened(output).num_parameters == source.num_parameters - sum(source.layer_parameters[i] for i in DROPPED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_model_generates_alike_with_and_without_cache(folders, family, tmp_path):
    """A stale layer index in the cache shows here."""
    output, prompt = tmp_path / "pruned", tokens(1, 6)
    save(folders(family), DROPPED, output)
    model = reloaded(output)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt", "gemma2"])
def test_tied_embeddings_stay_tied_and_are_stored_once(folders, family, tmp_path):
    from safetensors import safe_open

    save(folders(family), DROPPED, tmp_path / "pruned")
    model = reloaded(tmp_path / "pruned")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with safe_open(tmp_path / "pruned" / "model.safetensors", "pt") as file:
        assert sum("embed_tokens" in name or "wte" in name or "lm_head" in name for name in file.keys()) == 1  # noqa: SIM118


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropping_nothing_is_the_dense_model(folders, family, tmp_path):
    save(folders(family), (), tmp_path / "same")
    assert torch.equal(logits(reloaded(tmp_path / "same"), tokens()), logits(tiny_model(family), tokens()))


def test_weights_are_saved_in_the_dtype_that_they_came_in(tmp_path):
    folder = model_folder(tmp_path / "dense", tiny_model(), torch.bfloat16)
    source, decoder = save(folder, DROPPED, tmp_path / "pruned", dtype=torch.float32)
    assert source.dtype == torch.bfloat16
    model = reloaded(tmp_path / "pruned", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with decoder.bypassing(DROPPED):
        expected = logits(decoder.model, tokens())
    assert torch.equal(logits(model.float(), tokens()), expected), "bf16 -> fp32 -> bf16 loses nothing"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tensor_of_another_dtype_keeps_it_and_the_config_decides_nothing(family, tmp_path):
    """Norms in fp32 beside bf16, and what a config says of weights that were saved in another dtype."""
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path / "dense", tiny_model(family), torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    norms = {name for name in tensors if "norm" in name or "ln_" in name}
    # Some files of GPT-2 leave the name of the base model out.
    short = {name: name.removeprefix("transformer.") for name in tensors}
    exact = {name: value.float() + 1e-4 * torch.randn(value.shape) for name, value in tensors.items() if name in norms}
    save_file({short[n]: x for n, x in (tensors | exact).items()}, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", dtype="float16")
    source, _ = save(folder, (1,), tmp_path / "pruned")
    assert source.dtype == torch.bfloat16
    saved = load_file(tmp_path / "pruned" / "model.safetensors")
    kept = [index for index in range(source.num_layers) if index != 1]
    assert len(saved) < len(tensors)
    for name, value in (tensors | exact).items():
        new = renamed(name, source.stack, kept)
        if new is not None:
            assert saved[new].dtype == (torch.float32 if name in norms else torch.bfloat16)
            assert torch.equal(saved[new], value), name


def test_what_most_numbers_are_in_counts_and_what_is_trained_is_rounded_to_what_it_will_be_saved_in(tmp_path):
    """Of GPT-2's tensors most are biases and norms; whatever the dtypes, evaluated is what is saved."""
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path / "dense", tiny_model("gpt2"), torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    small = {name: value.float() for name, value in tensors.items() if value.ndim == 1}
    assert len(small) > len(tensors) / 2
    save_file(tensors | small, folder / "model.safetensors", {"format": "pt"})
    source, decoder = loaded(folder)
    assert (source.dtype, set(source.other_dtypes.values())) == (torch.bfloat16, {torch.float32})
    coarse = dataclasses.replace(
        source, dtype=torch.float32, other_dtypes={"transformer.h.0.mlp.c_fc.weight": torch.bfloat16}
    )

    def train(bench, doomed, save_dtype):
        for weight in bench.decoder.model.parameters():
            weight.data += 1e-3 * torch.randn(weight.shape)
        round_weights(bench.decoder.model.parameters(), save_dtype, whole)

    made = SimpleNamespace(decoder=decoder, engine=SimpleNamespace(gathered=whole))
    move_and_round(SimpleNamespace(source=coarse), made, train, DROPPED)
    save_without(decoder, coarse, DROPPED, tmp_path / "pruned", gathered=whole, write=True)
    with decoder.bypassing(DROPPED):
        assert torch.equal(logits(reloaded(tmp_path / "pruned"), tokens()), logits(decoder.model, tokens()))


def test_weights_that_are_finer_than_the_config_says_are_saved_as_they_are(tmp_path):
    folder = model_folder(tmp_path / "dense", tiny_model())
    edit(folder / "config.json", dtype="bfloat16")
    source, decoder = save(folder, DROPPED, tmp_path / "pruned")
    assert (source.dtype, source.other_dtypes) == (torch.float32, {})
    with decoder.bypassing(DROPPED):
        assert torch.equal(logits(reloaded(tmp_path / "pruned"), tokens()), logits(decoder.model, tokens()))


def test_rounded_weights_survive_saving(tmp_path):
    weight = torch.nn.Parameter(torch.randn(50, 50), requires_grad=False)
    before = weight.clone()
    round_weights([weight], torch.bfloat16, whole)
    assert not torch.equal(weight, before)
    assert torch.equal(weight, before.bfloat16().float())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_large_model_is_saved_in_shards_that_transformers_loads(folders, family, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_SHARD_BYTES", 20_000)
    output = tmp_path / "pruned"
    _, decoder = save(folders(family), DROPPED, output)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == sorted(set(index["weight_map"].values()))
    with decoder.bypassing(DROPPED):
        expected = logits(decoder.model, tokens())
    assert torch.equal(logits(reloaded(output), tokens()), expected)
    # And it is a source again.
    source, again = loaded(output)
    assert source.num_layers == 3
    assert torch.equal(logits(again.model, tokens()), expected)


def test_a_pruned_model_can_be_pruned_again(folders, tmp_path):
    save(folders("qwen2"), (0,), tmp_path / "once")
    save(tmp_path / "once", (1, 2), tmp_path / "twice")
    save(folders("qwen2"), (0, 2, 3), tmp_path / "at-once")
    twice, at_once = reloaded(tmp_path / "twice"), reloaded(tmp_path / "at-once")
    assert torch.equal(logits(twice, tokens()), logits(at_once, tokens()))
    assert twice.config.layer_types == at_once.config.layer_types == ["full_attention", "sliding_attention"]


def test_off_the_first_rank_nothing_is_written(folders, tmp_path):
    source, decoder = loaded(folders("llama"))
    save_without(decoder, source, DROPPED, tmp_path / "pruned", gathered=whole, write=False)
    assert list(tmp_path.iterdir()) == []


def test_layers_whose_kind_depends_on_their_position_are_refused(tmp_path):
    folder = model_folder(tmp_path / "dense", tiny_model("gpt2", 4, scale_attn_by_inverse_layer_idx=True))
    source, decoder = loaded(folder)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx makes each layer depend on its position"):
        save_without(decoder, source, (1,), tmp_path / "pruned", gathered=whole, write=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("broken", ["save_file", "copy_companions", "mended_config"])
def test_nothing_half_written_is_left_when_saving_fails(folders, tmp_path, monkeypatch, broken):
    import safetensors.torch

    monkeypatch.setattr(checkpoint, "_MAX_SHARD_BYTES", 20_000)
    calls = []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if broken != "save_file" or len(calls) == 3:
            raise OSError("No space left on device")
        return real(*args, **kwargs)

    place = safetensors.torch if broken == "save_file" else checkpoint
    real = getattr(place, broken)
    source, decoder = loaded(folders("llama"))
    monkeypatch.setattr(place, broken, fail_later)
    with pytest.raises(OSError, match="No space"):
        save_without(decoder, source, DROPPED, tmp_path / "pruned", gathered=whole, write=True)
    assert list(tmp_path.iterdir()) == []


def test_the_remains_of_a_killed_save_do_not_get_into_the_result(folders, tmp_path):
    remains, of_the_users = tmp_path / ".pruned.tmp", tmp_path / "pruned.tmp"
    remains.mkdir()
    of_the_users.mkdir()
    (remains / "model-00009-of-00009.safetensors").write_text("stale")
    save(folders("llama"), DROPPED, tmp_path / "pruned")
    assert sorted(path.name for path in (tmp_path / "pruned").glob("*.safetensors")) == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "pruned.tmp"]


def test_a_folder_that_cannot_be_put_in_its_place_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_new(Path("."), at_once=True)
    with whole_or_not_at_all(Path(".")) as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    require_new(tmp_path / "volume")  # A job writes into it.
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for stays in ("volume", "link"):
        with pytest.raises(ConfigError, match="is a link or where a disk is mounted"):
            require_new(tmp_path / stays, at_once=True)


# What is wrong with a folder


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder):
    """Cut the only weight file into two, with an index."""
    from safetensors.torch import load_file, save_file

    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    halves = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for name, half in halves.items():
        save_file(half, folder / name, metadata={"format": "pt"})
    names = {tensor: name for name, half in halves.items() for tensor in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_weight_file_is_named(llama, share):
    truncate(llama / "model.safetensors", share)
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or damaged"):
        opened(llama)


def test_garbage_instead_of_weights_is_named(llama):
    (llama / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(ModelError, match="missing or damaged"):
        opened(llama)


def test_a_missing_or_truncated_shard_is_named(llama):
    shard(llama)
    assert opened(llama).num_layers == 5
    truncate(llama / "b.safetensors")
    with pytest.raises(ModelError, match=r"b\.safetensors is missing or damaged"):
        opened(llama)
    (llama / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors is missing or damaged"):
        opened(llama)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', '{"other": {}}'])
def test_a_damaged_index_is_refused(llama, content):
    shard(llama)
    (llama / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="damaged"):
        opened(llama)


def test_no_weights_are_refused(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        opened(llama)


def test_no_config_is_refused(llama):
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match="has no config.json"):
        opened(llama)


@pytest.mark.parametrize("content", ["", "{", '{"model_type": ', "\x00\x01", "[]", "null", "3"])
def test_a_config_that_is_no_json_object_is_refused(llama, content):
    (llama / "config.json").write_text(content)
    with pytest.raises(ModelError):
        opened(llama)


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "no-such-family"}, {"model_type": "t5"}, {"num_hidden_layers": "five"}, {"hidden_size": 33}],
)
def test_a_config_that_makes_no_causal_model_is_refused(llama, changes):
    edit(llama / "config.json", **changes)
    with pytest.raises(ModelError):
        opened(llama)


@pytest.mark.parametrize("changes", [{"intermediate_size": 40}, {"num_hidden_layers": 6}, {"vocab_size": 100}])
def test_a_config_of_another_shape_than_the_weights_is_refused(llama, changes):
    edit(llama / "config.json", **changes)
    with pytest.raises(ModelError):
        loaded(llama)


def test_no_tokenizer_is_refused(llama):
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        load_tokenizer(opened(llama))


def test_a_damaged_tokenizer_is_refused(llama):
    truncate(llama / "tokenizer.json")
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        load_tokenizer(opened(llama))


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "nowhere", "a/b/c", "~/no-such-model"])
def test_a_folder_that_does_not_exist_is_refused_at_once(path):
    with pytest.raises(ModelError, match="does not exist"):
        opened(path)


def test_code_that_comes_with_a_model_is_not_run_unasked(llama):
    edit(llama / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError, match="--trust-remote-code"):
        opened(llama)


# The proof


def probe(folder, tmp_path, dropped=DROPPED, dtype=torch.float32):
    """Save a pruned model and what it must give, in a file as `prove` makes it."""
    from safetensors.torch import save_file

    _, decoder = save(folder, dropped, tmp_path / "pruned", dtype)
    ids = sample(decoder.model, 2, 16)
    with decoder.bypassing(dropped):
        expected = logits(decoder.model, ids)
    save_file({"tokens": ids, "logits": expected}, tmp_path / "probe.safetensors")
    return ids, expected


def test_the_proof_of_a_right_checkpoint(folders, tmp_path):
    probe(folders("llama"), tmp_path)
    assert proof(str(tmp_path / "pruned"), str(tmp_path / "probe.safetensors")) == {
        "max_logit_difference": 0.0,
        "cached_equals_uncached": True,
        "missing": [],
        "unexpected": [],
    }


def test_the_proof_sees_another_weight_and_a_missing_tensor(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    probe(folders("llama"), tmp_path)
    weights = tmp_path / "pruned" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3] += 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    arguments = str(tmp_path / "pruned"), str(tmp_path / "probe.safetensors")
    assert proof(*arguments)["max_logit_difference"] > 1e-2
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert proof(*arguments)["missing"] == ["model.layers.1.mlp.up_proj.weight"]


def test_prove_runs_in_a_fresh_process_and_says_why_a_folder_does_not_load(folders, tmp_path):
    ids, expected = probe(folders("llama"), tmp_path)
    pruned = open_source(ModelConfig(path=str(tmp_path / "pruned")))
    assert prove(pruned, ids, expected)["max_logit_difference"] == 0
    truncate(tmp_path / "pruned" / "model.safetensors")
    with pytest.raises(ModelError, match=r"does not load: [\w.]+Error: "):
        prove(pruned, ids, expected)


def test_what_a_model_prints_does_not_disturb_what_is_told(tmp_path, monkeypatch):
    (tmp_path / "chatty.py").write_text("print('no flash attention')\nprint('{\"told\": 3}')\n")
    (tmp_path / "failing.py").write_text("print(1)\nraise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert told_fresh("chatty") == {"told": 3}
    with pytest.raises(ChildProcessError, match="exit code 3"):
        told_fresh("failing")
