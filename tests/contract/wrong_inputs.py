"""The table of wrong inputs: a command line, the files that it finds, and the words that its error line has to have.

`{model}`, `{text}`, `{ds}` in a command stand for a good model folder, a good text and a good DeepSpeed JSON. A file's
content is bytes or text; of a model it is a change to the good folder, by file name.
"""

from dataclasses import dataclass, field

PRUNE = "prune --dry-run --model {model} --data {text}"


@dataclass(frozen=True)
class Wrong:
    """One row."""

    words: str
    says: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    model: dict[str, bytes | None] = field(default_factory=dict)
    """Files of `{model}` that are replaced, or with None removed."""
    variables: dict[str, str] = field(default_factory=dict)


def prune(more: str, *says: str, **given) -> Wrong:
    return Wrong(f"{PRUNE} {more}", says, **given)


def of_file(option: str, name: str, content: str | bytes, *says: str) -> Wrong:
    return Wrong(f"{PRUNE} {option} {name}", (name, *says), {name: content})


VALUES = [
    prune("--ratio 0", "ratio", "greater than 0"),
    prune("--ratio 1", "ratio", "less than 1"),
    prune("--ratio -0.5", "ratio", "greater than 0"),
    prune("--ratio nan", "ratio"),
    prune("--ratio inf", "ratio"),
    prune("--ratio many", "--ratio", "many"),
    prune("--ratio 0.01", "ratio"),
    prune("--num-drop 0", "num_drop", "1"),
    prune("--num-drop -3", "num_drop", "1"),
    prune("--num-drop 99", "99", "[1, 2]"),
    prune("--num-drop 1.5", "--num-drop", "1.5"),
    prune("--drop 7", "7"),
    prune("--drop 1,1", "1"),
    prune("--drop -1", "-1"),
    prune("--drop 1;2", "--drop", "3,7,9"),
    prune("--drop 0,1,2", "0"),
    prune("--seed -1", "seed"),
    prune("--seed x", "--seed", "x"),
    prune("--method slebb", "prune.method", "did you mean sleb"),
    prune("--method ''", "prune.method"),
    prune("--max-ppl-ratio 1", "max_ppl_ratio", "greater than 1"),
    prune("--max-ppl-ratio nan", "max_ppl_ratio"),
    prune("--min-speedup 0.9", "min_speedup", "greater than 1"),
    prune("--quantize int3", "quantize", "int8"),
    prune("--register 'a/b'", "a/b"),
    prune("--register ''", "name"),
    prune("--set stage2.lr", "--set", "KEY=VALUE"),
    prune("--set stage2.lr=fast", "stage2.lr", "fast"),
    prune("--set stage2.lr=-1", "stage2.lr"),
    prune("--set stage2.lr=.nan", "stage2.lr"),
    prune("--set stage3.lr=1", "stage3"),
    prune("--set stage2.learning_rate=1", "stage2.learning_rate"),
    prune("--set stage2.lora.rank=0", "stage2.lora.rank"),
    prune("--set stage2.gates=ajar", "stage2.gates", "hold"),
    prune("--set =3", "--set"),
    prune("--set data.block_tokens=1", "data.block_tokens"),
    prune("--set data.block_tokens=100000", "100000"),
    prune("--set eval.block_tokens=100000", "100000"),
    prune("--set train.batch_size=7 --set train.accumulation=2", "train.batch_size", "7"),
    prune("--set state.every_minutes=-1", "state.every_minutes"),
    prune("--set model.dtype=fp8", "model.dtype", "bf16"),
    prune("--set prune.protect_first=99", "protect"),
    Wrong("launched --local_rank x", ("--local_rank", "x")),
    Wrong(f"{PRUNE} --nproc 0", ("--nproc", "1")),
    Wrong(f"{PRUNE} --master-port http", ("--master-port", "http")),
    Wrong("drop {model} --layers two --output out", ("--layers", "3,7,9")),
    Wrong("drop {model} --layers 5 --output out", ("5",)),
    Wrong("drop {model} --layers 0,1,2 --output out", ("layer",)),
    Wrong("verify {model} --for ollama", ("ollama", "vllm")),
    Wrong("demo train --output out --tokens many", ("--tokens", "many")),
    Wrong("compare nothing", ("tracking store", "MLFLOW_TRACKING_URI")),
    Wrong("advise nothing", ("tracking store", "MLFLOW_TRACKING_URI")),
    Wrong("compare demo --price-per-hour -1", ("--price-per-hour",)),
    Wrong("compare demo --price-per-hour 1", ("--price-per-hour", "--report FILE.html")),
    Wrong("compare demo --report .", ("--report", "the folder .")),
    Wrong("serve models:/m@champion --port http", ("--port", "http")),
    Wrong("serve m", ("models:/",)),
    Wrong("export m out", ("models:/",)),
    Wrong("export models:/m@champion out --format onnx", ("--format", "gguf")),
    Wrong("promote m one --require ppl_ratio<=1.1", ("m",)),
    Wrong("promote a/b 1", ("a/b",)),
    Wrong("promote m 1 --require ppl_ratio~1", ("ppl_ratio~1",)),
    Wrong("promote m 1 --require ''", ("requirement",)),
    Wrong("promote m 1 --alias 7", ("7",)),
    Wrong("promote m 1 --expect-champion x", ("--expect-champion", "x")),
    Wrong("rollback a:b", ("a:b",)),
    Wrong("audit m", ("m",)),
    Wrong("models show m", ("tracking store",)),
    Wrong("models diff m", ("B",)),
    Wrong("server --host nowhere.invalid --port 5999", ("--host", "nowhere.invalid")),
    Wrong("server --host .. --port 5999", ("--host ..", "no address")),
    Wrong("server --port 99999", ("--port", "99999")),
    Wrong("server --store mysql://u@h/d", ("--store", "postgresql")),
    Wrong("ui --port 99999", ("--port", "99999")),
    Wrong("tune --model {model} --data {text} --minutes 0", ("--minutes",)),
    Wrong("tune --model {model} --data {text} --minutes nan", ("--minutes",)),
    Wrong("pruen", ("pruen",)),
    Wrong("prune --rattio 0.5", ("--rattio",)),
    Wrong("prune extra", ("extra",)),
    Wrong("evaluate --eval-data {text}", ("--model",)),
]

CONTRADICTIONS = [
    prune("--num-drop 1 --ratio 0.5", "--ratio", "--num-drop"),
    prune("--num-drop 1 --drop 1", "--num-drop", "--drop"),
    prune("--register x --no-register", "--register", "--no-register"),
    prune("--method laco --set transfer=stage2", "laco", "transfer"),
    prune("--set transfer=distill --set stage2.trainable=none", "distill", "stage2.trainable"),
    prune("--set stage2.trainable=none --set transfer=stage2", "stage2.trainable", "stage2.lr"),
    prune("--quantize int8 --set save=false", "quantize", "save"),
    prune("--max-ppl-ratio 1.1 --set budget_s=10", "budget_s", "max_ppl_ratio"),
    prune("--min-speedup 1.1 --set eval.speed_runs=0", "min_speedup", "eval.speed_runs"),
    Wrong("launched --model {model} --data {text} --method tsp,sleb --resume abc", ("--resume",)),
]

GOOD_JSON = '{"zero_optimization": {"stage": 3}}'
FILES = [
    prune("--ds missing.json", "missing.json", "No such file"),
    prune("--ds {model}", "--ds"),
    of_file("--ds", "ds.json", ""),
    of_file("--ds", "ds.json", "{", "JSON"),
    of_file("--ds", "ds.json", b"\xff\xfe\x00", "JSON"),
    of_file("--ds", "ds.json", "[]", "object"),
    of_file("--ds", "ds.json", "[" * 100_000, "JSON"),
    prune("--ds ds.json", "zero_optimization.stage", files={"ds.json": "{}"}),
    prune("--ds ds.json", "zero_optimization.stage", files={"ds.json": '{"zero_optimization": {"stage": 4}}'}),
    prune("--ds ds.json", "optimizer", files={"ds.json": '{"optimizer": {}, "zero_optimization": {"stage": 3}}'}),
    prune("--ds ds.json", "zero_optimization", files={"ds.json": '{"zero_optimization": 3}'}),
    prune("--config missing.yaml", "missing.yaml"),
    prune("--config {model}", "--config"),
    of_file("--config", "c.yaml", "a: [", "YAML"),
    of_file("--config", "c.yaml", b"\xff\xfe\x00\x01", "c.yaml"),
    of_file("--config", "c.yaml", "- a\n- b", "mapping"),
    of_file("--config", "c.yaml", "seed: 1\nseed: 2", "seed"),
    of_file("--config", "c.yaml", "[" * 5000, "c.yaml"),
    of_file("--config", "c.yaml", "a: &a [*a]", "Circular"),
    of_file("--config", "c.yaml", "sweep: [&a {stage1: *a}]", "Circular"),
    of_file("--config", "c.yaml", "a: !!python/object/apply:os.getcwd []"),
    prune("--config c.yaml", "stage9", files={"c.yaml": "stage9: {}"}),
    prune("--config c.yaml", "seed", files={"c.yaml": "seed: [a, b]"}),
    prune("--slices missing.yaml", "missing.yaml"),
    of_file("--slices", "s.yaml", "a: {regex: '['}", "a"),
    of_file("--slices", "s.yaml", "a: {shape: round}", "a"),
    of_file("--slices", "s.yaml", "{}"),
    of_file("--slices", "s.yaml", ""),
    prune("--tasks no_such_task", "no_such_task"),
    Wrong("prune --dry-run --model {model} --data missing.txt", ("missing.txt",)),
    Wrong("prune --dry-run --model {model} --data empty.txt", ("empty.txt",), {"empty.txt": ""}),
    Wrong("prune --dry-run --model {model} --data t.jsonl", ("t.jsonl",), {"t.jsonl": '{"text": "a"}\n{"te'}),
    Wrong("prune --dry-run --model {model} --data t.jsonl", ("t.jsonl",), {"t.jsonl": '{"words": "a"}\n'}),
    Wrong("prune --dry-run --model {model} --data t.parquet", ("t.parquet",), {"t.parquet": b"PAR1 no"}),
    Wrong("prune --dry-run --model {model} --data t.csv", ("t.csv",), {"t.csv": "a,b"}),
    Wrong("prune --dry-run --model {model} --data t.txt", ("t.txt",), {"t.txt": b"\xff\xfe\xfa" * 99}),
    Wrong("prune --dry-run --model missing/folder --data {text}", ("missing/folder",)),
    Wrong("prune --dry-run --model {text} --data {text}", ("tiny-text",)),
    Wrong("prune --dry-run --model models:/m@champion", ("tracking store",)),
    Wrong("prune --dry-run --model models:/m", ("models:/",)),
    prune("", "config.json", model={"config.json": None}),
    prune("", "config.json", model={"config.json": b""}),
    prune("", "config.json", model={"config.json": b"{"}),
    prune("", "config.json", model={"config.json": b"[]"}),
    prune("", "no causal language model", model={"config.json": b'{"model_type": "no-such-thing"}'}),
    prune("", "weight", model={"model.safetensors": None}),
    prune("", "model.safetensors", model={"model.safetensors": b""}),
    prune("", "model.safetensors", model={"model.safetensors": b"\xff" * 64}),
    prune("", "model.safetensors", model={"model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00[]"}),
    prune("", "model.safetensors.index.json", model={"model.safetensors.index.json": b"{", "model.safetensors": None}),
    prune("", "tokenizer", model={"tokenizer.json": b"{", "tokenizer_config.json": b"{"}),
    prune("--output {model}", "--output"),
    prune("--output taken/out", "taken", files={"taken": "a file, no folder"}),
    Wrong("drop {model} --layers 1 --output taken/out", ("--output",), {"taken": "a file, no folder"}),
    Wrong("drop {model} --layers 1 --output {model}", ("--output",)),
    Wrong("drop missing --layers 1 --output out", ("missing",)),
    Wrong(f"drop {{model}} --layers 1 --output {'x' * 300}", ("--output xxx",)),
    Wrong("verify missing", ("missing",)),
    Wrong("promote m 1 --policy missing.yaml", ("missing.yaml",)),
    Wrong("promote m 1 --policy p.yaml", ("p.yaml",), {"p.yaml": "champion: 3"}),
    Wrong("promote m 1 --policy p.yaml", ("p.yaml",), {"p.yaml": "champion: [ppl_ratio]"}),
    Wrong("promote m 1 --policy p.yaml", ("p.yaml", "champion"), {"p.yaml": "candidate: [round_trip==ok]"}),
    Wrong("monitor models:/m@champion --against {model} --requests missing.jsonl", ("missing.jsonl",)),
    Wrong(
        "monitor models:/m@champion --against {model} --requests {text} --set eval.sources=[a.txt]",
        ("--set eval.sources",),
    ),
    Wrong(
        "monitor models:/m@champion --against {model} --requests {text} --set model.path=other", ("--set model.path",)
    ),
    Wrong("plan --gpu h100", ("--gpu", "h100-80")),
    Wrong("plan --gpu g.yaml", ("g.yaml", "tflops"), {"g.yaml": "{memory_gib: 80}"}),
    Wrong("plan --model missing", ("missing",)),
    Wrong("runs reap", ("tracking store",)),
    Wrong("runs reap --hours 0", ("--hours", "0.1")),
    Wrong("server --admin-password-file missing --auth", ("missing",)),
    Wrong("tune --model {model} --data {text} --config missing.yaml", ("missing.yaml",)),
    Wrong("audit m", ("MLFLOW_TRACKING_URI", "ftp"), variables={"MLFLOW_TRACKING_URI": "ftp://host"}),
    Wrong("compare demo", ("MLFLOW_TRACKING_URI", "./mlruns"), variables={"MLFLOW_TRACKING_URI": "./mlruns"}),
]
ON_RANKS = [
    Wrong("launched --model {model} --data {text} --num-drop 1 --resume nothing", ("--resume", "nothing")),
    Wrong("launched --model {model} --data {text} --num-drop 1", ("MLFLOW_TAGS",), variables={"MLFLOW_TAGS": "[1"}),
]
"""Seen only when the ranks have met, which takes seconds."""
TABLE = [*VALUES, *CONTRADICTIONS, *FILES]
