"""The registry on the embedded store: a checkpoint goes in without copies, and comes out in every form."""

import json
from pathlib import Path

import pytest

from tsp.errors import ModelError
from tsp.tracking.fetch import checkpoint_path
from tsp.tracking.manifest import MANIFEST_TAG, file_faults
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.run import start_run
from tsp.tracking.store import resolve_uri


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def make_checkpoint(folder: Path) -> Path:
    """A random Llama of two layers with a BPE tokenizer of 300 words."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["def f(x):", "    return x + 1", "class A: pass"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A registered checkpoint: root, checkpoint folder, run id, and the arguments to register it again."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
            patch.delenv(name, raising=False)
        root = tmp_path_factory.mktemp("registry")
        checkpoint = make_checkpoint(root / "out" / "model")
        tracker = start_run(root, experiment=None, run_name=None, tags={}, params={})
        wanted = {
            "run_id": tracker.run_id,
            "tags": {"base_model": "demo", "dropped": "[1]"},
            "description": "pruned",
            "metadata": {"dropped": [1]},
        }
        assert register_checkpoint(tracker.uri, checkpoint, "pruned", **wanted) == ("pruned", "1")
        tracker.finish("FINISHED")
    return root, checkpoint, wanted


def test_version_carries_its_lineage_and_no_copy_of_the_weights(registered):
    from mlflow import MlflowClient

    root, checkpoint, wanted = registered
    client = MlflowClient(resolve_uri(root))
    version = client.get_model_version("pruned", "1")
    assert {key: value for key, value in version.tags.items() if key != MANIFEST_TAG} == wanted["tags"]
    assert version.description == "pruned"
    assert version.run_id == wanted["run_id"]
    (output,) = client.get_run(wanted["run_id"]).outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"
    assert client.get_logged_model(output.model_id).status == "READY"
    folder = checkpoint_path("models:/pruned/1", root)
    for path in checkpoint.iterdir():
        copy = folder / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert copy.samefile(path) == (path.suffix == ".safetensors")
    requirements = (folder.parent / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["torch", "transformers", "mlflow", "accelerate"]
    assert all("+" not in line and "==" in line for line in requirements)


def test_a_changed_file_is_found_by_its_recorded_hash(registered):
    import hashlib

    from mlflow import MlflowClient

    root, _, _ = registered
    client = MlflowClient(resolve_uri(root))
    version = client.get_model_version("pruned", "1")
    folder = checkpoint_path("models:/pruned/1", root).parent
    listed = json.loads((folder / "manifest.json").read_text())
    assert set(listed) == {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert file_faults(client, version) == []
    config, content = folder / "model" / "config.json", (folder / "model" / "config.json").read_text()
    config.write_text(content + " ")
    assert file_faults(client, version) == ["model/config.json changed"]
    config.unlink()
    assert file_faults(client, version) == ["model/config.json is gone"]
    config.write_text(content)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace("MLmodel", "MLmodem"))
    assert file_faults(client, version) == ["manifest.json changed"]
    (folder / "manifest.json").write_text(manifest)
    assert file_faults(client, version) == []


def test_same_run_again_gives_the_same_version(registered):
    from mlflow import MlflowClient

    root, checkpoint, wanted = registered
    uri = resolve_uri(root)
    assert register_checkpoint(uri, checkpoint, "pruned", **wanted) == ("pruned", "1")
    client = MlflowClient(uri)
    assert len(client.search_model_versions("name = 'pruned'")) == 1
    other = client.create_run("0").info.run_id
    assert register_checkpoint(uri, checkpoint, "pruned", **{**wanted, "run_id": other}) == ("pruned", "2")


def test_a_version_whose_answer_was_lost_is_not_made_again(registered, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    create = MlflowClient.create_model_version

    def answer_lost(*args, **kwargs):
        create(*args, **kwargs)
        raise MlflowException("502")

    monkeypatch.setattr(MlflowClient, "create_model_version", answer_lost)
    root, checkpoint, _ = registered
    tracker = start_run(root, experiment=None, run_name=None, tags={}, params={})
    tracker.finish("FINISHED")
    about = {"run_id": tracker.run_id, "tags": {}, "description": "", "metadata": {}}
    made = register_checkpoint(tracker.uri, checkpoint, "lost-answer", **about)
    assert made == ("lost-answer", "1")
    [version] = MlflowClient(tracker.uri).search_model_versions("name = 'lost-answer'")
    assert version.run_id == tracker.run_id


def test_version_loads_as_pipeline_and_pyfunc(registered, monkeypatch):
    import mlflow
    import torch
    import transformers
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    root, checkpoint, _ = registered
    with _use_tracking_uri(resolve_uri(root)):
        pipeline = mlflow.transformers.load_model("models:/pruned/1")
        answer = mlflow.pyfunc.load_model("models:/pruned/1").predict(["def f(x):"])
        metadata = mlflow.models.get_model_info("models:/pruned/1").metadata
    assert metadata == {"dropped": [1]}
    assert len(answer) == 1
    assert answer[0].startswith("def f(x):")
    assert len(answer[0]) > len("def f(x):")
    ids = pipeline.tokenizer("def f(x):", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits
        assert torch.equal(pipeline.model(ids).logits, expected)


def test_a_model_with_a_dot_in_its_name_is_registered_too(registered):
    root, checkpoint, wanted = registered
    name = "demo-0.5B-pruned"
    assert register_checkpoint(resolve_uri(root), checkpoint, name, **wanted) == (name, "1")
    assert (checkpoint_path(f"models:/{name}/1", root) / "config.json").is_file()


def test_alias_leads_to_the_checkpoint(registered):
    from mlflow import MlflowClient

    root, _, _ = registered
    MlflowClient(resolve_uri(root)).set_registered_model_alias("pruned", "champion", "1")
    assert checkpoint_path("models:/pruned@champion", root) == checkpoint_path("models:/pruned/1", root)


@pytest.mark.parametrize("uri", ["models:/pruned", "models:/pruned/latest", "models:/pruned/9", "models:/none@x"])
def test_unknown_version_is_wrong_input(registered, uri):
    with pytest.raises(ModelError) as caught:
        checkpoint_path(uri, registered[0])
    assert uri in str(caught.value)
    assert caught.value.exit_code == 2


def test_folder_without_a_config_is_wrong_input(registered, tmp_path):
    (tmp_path / "notes.json").write_text(json.dumps({}))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        register_checkpoint("sqlite:////nowhere.db", tmp_path, "x", **registered[2])
