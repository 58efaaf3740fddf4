"""The command line: quick help, wrong input is one `error:` line and exit code 2, and what `tsp prune` hands on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tsp import cli
from tsp.cli import launched_prune, main
from tsp.errors import TspError
from tsp.options import configs_from_options, sharding_path

REPOSITORY = Path(__file__).resolve().parents[2]
HELP_S = 2.0
"""Loose: 0.2 s on an idle machine, and the tests may share theirs. `import torch` alone takes longer."""


def run(*words, launcher=None, **variables):
    command = [str(REPOSITORY / "launchers" / launcher)] if launcher else ["-m", "tsp"]
    return subprocess.run(
        [sys.executable, *command, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_wrong_input(done, reason):
    """Exit code 2; the last line of stderr says why, and is the only one that begins with `error:`."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert reason in lines[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not Path("mlruns").exists()


def options_of(*words):
    """What click makes of a command line of the launcher."""
    return launched_prune.make_context("prune", list(words)).params


def config_from_options(options):
    """The one job's config."""
    [(varied, config)] = configs_from_options(options)
    assert varied == {}
    return config


@pytest.fixture
def started(monkeypatch):
    """Instead of starting `deepspeed`, keep its command line."""
    # What only starts it needs no torch, which takes seconds to import.
    monkeypatch.setitem(sys.modules, "torch", None)
    commands = []
    monkeypatch.setattr(cli, "run_passing_signals", lambda command: commands.append(command) or 7)
    return commands


def test_help_answers_at_once():
    fastest = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        fastest.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert "prune" in done.stdout
    assert min(fastest) < HELP_S


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself_and_its_options(name):
    done = CliRunner().invoke(main, [name, "--help"])
    assert done.exit_code == 0
    command = main.commands[name]
    assert command.help
    undocumented = [
        parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option)
        and not parameter.hidden
        and not parameter.help
        and parameter.metavar is None
    ]
    assert not undocumented


@pytest.mark.parametrize("launcher", sorted(path.name for path in (REPOSITORY / "launchers").glob("*.py")))
def test_every_launcher_takes_what_deepspeed_adds(launcher):
    done = run("--local_rank=0", "--help", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "--local_rank" not in done.stdout


def test_prune_and_its_launcher_take_the_same_options():
    of_command = {parameter.name for parameter in main.commands["prune"].params}
    of_launcher = {parameter.name for parameter in launched_prune.params}
    assert of_command - of_launcher == {"nproc", "hostfile", "include", "master_port"}
    assert of_launcher - of_command == {"local_rank"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--ratio", "1.3"], "prune.ratio: input should be less than 1, got 1.3"),
        (["--ratio", "0.5", "--num-drop", "3"], "give one of --ratio, --num-drop, --drop, --max-ppl-ratio"),
        (["--ratio", "0.5", "--max-ppl-ratio", "1.1"], "--min-speedup, got --ratio and --max-ppl-ratio"),
        (["--max-ppl-ratio", "1.1", "--min-speedup", "1.3"], "got --max-ppl-ratio and --min-speedup"),
        (["--max-ppl-ratio", "0.9"], "prune.max_ppl_ratio: input should be greater than 1, got 0.9"),
        (["--min-speedup", "1"], "prune.min_speedup: input should be greater than 1, got 1.0"),
        (["--min-speedup", "2", "--set", "prune.num_drop=3"], "each of prune.num_drop and prune.min_speedup says"),
        (["--drop", "3,7", "--set", "prune.num_drop=4"], "each of prune.drop and prune.num_drop says how many layers"),
        (["--num-drop", "4", "--set", "prune.ratio=0.5"], "each of prune.ratio and prune.num_drop says how many"),
        (["--max-ppl-ratio", "2", "--set", "budget_s=60"], "give stage2.steps instead of budget_s, got budget_s 60"),
        (["--max-ppl-ratio", "2", "--set", "data.tuning_blocks=0"], "measured on data.tuning_blocks sequences, got 0"),
        (["--min-speedup", "2", "--set", "eval.speed_runs=0"], "measured in eval.speed_runs passes, got 0"),
        (["--drop", "3,x"], "--drop must be layer numbers joined by commas, like 3,7,9, got '3,x'"),
        (["--ratio", "0.25,0.5", "--resume", "0" * 32], "a sweep goes on when the same command is repeated"),
        (["--register", "a", "--no-register"], "give one of --register and --no-register"),
        (["--register", "models:/a"], "not end in a space or .lock; got 'models:/a'"),
        (["--register", ""], "not end in a space or .lock; got ''"),
        (["--set", "tracking.register_as=demo.lock"], "not end in a space or .lock; got 'demo.lock'"),
        (["--set", "stage1.step=3"], "unknown key stage1.step, did you mean steps?"),
        (["--set", "stage1.steps"], "--set must be KEY=VALUE"),
        (["--config", "none.yaml"], "--config none.yaml: No such file"),
        (["--method", "magic"], "prune.method must be one of tsp, trsp"),
        (["--set", "transfer=replaceMe"], "got 'replaceMe'; did you mean replaceme?"),
        (["--method", "laco", "--set", "transfer=stage2"], "prune.method laco chooses layers to merge into others"),
        (["--set", "transfer=finetune", "--set", "stage2.trainable=none"], "transfer finetune trains nothing"),
        (["--set", "stage2.task={lm: 0, distill: 0}"], "found by the loss of stage2.task, got lm 0 and distill 0"),
        (["--quantize", "int4"], "quantize: input should be 'int8', got 'int4'"),
        (["--quantize", "int8", "--set", "save=false"], "starts from the pruned checkpoint, got save false"),
        (["--quantize", "int8", "--method", "dense"], "the pruned checkpoint, and prune.method dense writes none"),
        (["--ratio", "half"], "'half' is not a valid float"),
        (["--no-such-option"], "No such option"),
        (["surplus"], "surplus"),
    ],
)
@pytest.mark.parametrize("launcher", [None, "prune.py"])
def test_wrong_option_is_one_error_line(words, reason, launcher):
    # The same with and without `deepspeed`.
    done = run(*words, launcher=launcher) if launcher else run("prune", *words)
    assert_wrong_input(done, reason)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model", "./none"], "./none"),
        (["--ds", "none.json"], "--ds none.json: No such file"),
        (["--ds", "clash.json"], "train_batch_size is 5, the job has 8; fp16.enabled is True, the job has False"),
        (["--data", "none.txt"], "corpus none.txt: No such file"),
        (["--data", "empty.txt"], "less than one block"),
        (["--num-drop", "16"], "prune.num_drop must be in [1, 15], got 16"),
        (["--num-drop", "0"], "prune.num_drop: input should be greater than or equal to 1, got 0"),
        (["--ratio", "0"], "prune.ratio: input should be greater than 0, got 0"),
        (["--drop", "3,16"], "16"),
        (["--drop", ""], "--drop must be"),
        (["--drop", "0,1,4", "--set", "transfer=merge"], "merge folds dropped layers into the layer before them"),
        (["--drop", "0,1,4", "--set", "transfer=replaceme"], "layers 0,1 have none; protect the first layer"),
        (["--drop", "3,,7"], "--drop must be"),
        (["--config", "bad.yaml"], "unknown key stage2.gate, did you mean gates?"),
        (["--output", "."], "--output . must be a new or an empty folder"),
        (["--set", "train.batch_size=3", "--set", "train.accumulation=2"], "train.batch_size must be a multiple"),
        (["--slices", "none.yaml"], "--slices none.yaml: No such file"),
        (["--slices", "lost.yaml"], "--slices lost.yaml: lost match nothing in the windows of stdlib"),
        (["--tasks", "no-such-task"], "lm-evaluation-harness knows no task no-such-task"),
        (
            ["--set", "eval.generation_runs=1", "--set", "eval.generation_new_tokens=449"],
            "eval.generation_new_tokens must be at most the model's 512 positions, got 513",
        ),
    ],
)
def test_wrong_input_is_found_before_anything_is_opened(words, reason, tmp_path):
    from tsp.job import prepare

    (tmp_path / "clash.json").write_text(
        json.dumps({"train_batch_size": 5, "fp16": {"enabled": True}, "zero_optimization": {"stage": 3}})
    )
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "lost.yaml").write_text("lost: {file: nowhere/*}")
    (tmp_path / "bad.yaml").write_text("stage2: {gate: off}")
    before = sorted(tmp_path.iterdir())
    options = options_of(*words)
    with pytest.raises(TspError) as caught:
        prepare(config_from_options(options), sharding_path(options), options["output"], root=tmp_path, world_size=1)
    assert caught.value.exit_code == 2
    assert reason in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["evaluate", "--model", "./none", "--eval-data", "a.txt", "--json"], "./none"),
        (["evaluate", "--eval-data", "a.txt"], "--model"),
        (
            ["evaluate", "--model", "x", "--eval-data", "a.txt", "--set", "evil.x=1"],
            "unknown key evil, did you mean eval?",
        ),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_wrong_input_of_other_commands(words, reason):
    assert_wrong_input(run(*words), reason)


def test_tasks_are_given_by_commas_or_one_by_one():
    for words in (["--tasks", "a,b", "--tasks", "c"], ["--tasks", "a", "--tasks", "b,c"]):
        assert config_from_options(options_of(*words)).eval.tasks == ("a", "b", "c")


def test_a_dense_model_of_other_tokens_is_refused(tmp_path):
    from tests.models import model_folder, tiny_model
    from tsp.config import ModelConfig, load_config
    from tsp.demo import CHECKPOINT
    from tsp.evaluate import evaluate_model

    tiny = model_folder(tmp_path / "tiny", tiny_model(num_layers=2))
    config = load_config([{"model": {"path": str(tiny)}, "eval": {"sources": ["stdlib"]}}])
    with pytest.raises(TspError, match="must have the same tokenizer") as caught:
        evaluate_model(config, None, root=tmp_path, world_size=1, against=ModelConfig(path=str(CHECKPOINT)))
    assert caught.value.exit_code == 2


def test_debug_shows_the_traceback_and_keeps_the_last_line():
    done = run("prune", "--ratio", "2", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: prune.ratio")


def test_prune_hands_a_sweep_on(started):
    words = ["--method", "tsp,sleb", "--ratio", "0.125,0.25", "--seed", "0,1", "--set", "transfer=[none, finetune]"]
    CliRunner().invoke(main, ["prune", *words])
    (command,) = started
    assert sorted(command[4:]) == sorted(words)
    assert len(configs_from_options(options_of(*command[4:]))) == 16


def test_prune_starts_the_launcher_with_the_same_options(started):
    words = ["--ratio", "0.5", "--eval-data", "a.txt", "--eval-data", "b c.txt", "--set", "stage1.steps=3"]
    words += ["--slices", "parts.yaml", "--tasks", "piqa,sciq"]
    words += ["--set", "stage2.lr=1e-4", "--no-register", "--seed", "3", "--run-name", "x y", "--output", "out"]
    done = CliRunner().invoke(main, ["prune", *words])
    assert done.exit_code == 7
    (command,) = started
    assert command[:4] == [
        str(Path(sys.executable).with_name("deepspeed")),
        "--log_level",
        "critical",
        str(REPOSITORY / "launchers" / "prune.py"),
    ]
    handed, given = options_of(*command[4:]), options_of(*words)
    assert handed == given
    assert config_from_options(handed) == config_from_options(given)


def test_a_hostfile_that_is_not_there_is_refused(started):
    """deepspeed would use this node alone."""
    done = CliRunner().invoke(main, ["prune", "--hostfile", "nowhere"])
    assert done.exit_code == 2
    assert "nowhere" in done.stderr
    assert not started


def test_prune_passes_the_launchers_own_options_on(started, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\n")
    words = ["--nproc", "2", "--hostfile", str(hosts), "--include", "a:0,1"]
    words += ["--master-port", "29501", "--num-drop", "3"]
    CliRunner().invoke(main, ["prune", *words])
    (command,) = started
    script = command.index(str(REPOSITORY / "launchers" / "prune.py"))
    before = dict(zip(command[1:script:2], command[2:script:2], strict=True))
    assert before == {
        "--log_level": "critical",
        "--num_accelerators": "2",
        "--hostfile": str(hosts),
        "--include": "a:0,1",
        "--master_port": "29501",
    }
    assert options_of(*command[script + 1 :])["num_drop"] == 3


def test_without_words_the_help_is_shown():
    done = run()
    assert done.returncode == 2
    assert "Usage: " in done.stderr
    assert "doctor" in done.stderr


def test_a_zero_wins_over_the_file(tmp_path):
    (tmp_path / "job.yaml").write_text("seed: 5")
    assert config_from_options(options_of("--config", "job.yaml", "--seed", "0")).seed == 0


def test_a_zero_is_handed_on(started):
    CliRunner().invoke(main, ["prune", "--seed", "0"])
    (command,) = started
    assert command[4:] == ["--seed", "0"]


def test_prune_starts_nothing_on_wrong_input(started):
    done = CliRunner().invoke(main, ["prune", "--ratio", "7"])
    assert done.exit_code == 2
    assert not started


def test_options_win_over_the_file_and_set_wins_over_options(tmp_path):
    (tmp_path / "job.yaml").write_text("prune: {ratio: 0.1}\nseed: 5\nstage1: {steps: 11}\n")
    words = ["--config", "job.yaml", "--ratio", "0.5", "--set", "seed=9"]
    config = config_from_options(options_of(*words))
    assert (config.prune.ratio, config.seed, config.stage1.steps) == (0.5, 9, 11)


@pytest.mark.parametrize(
    "amount", ["num_drop: 3", "drop: [1, 2]", "max_ppl_ratio: 1.2", "min_speedup: 1.5", "ratio: 0.1"]
)
def test_an_amount_wins_over_another_one_of_the_file(tmp_path, amount):
    (tmp_path / "job.yaml").write_text(f"prune: {{{amount}}}\n")
    of_the_file, wanted = (
        config_from_options(options_of("--ratio", "0.5", *words)).prune for words in (["--config", "job.yaml"], [])
    )
    assert of_the_file == wanted
    several = config_from_options(options_of("--config", "job.yaml", "--num-drop", "2")).prune
    assert (several.num_drop, several.drop, several.max_ppl_ratio) == (2, None, None)


@pytest.mark.parametrize("amount", ["num_drop: 3", "drop: [1, 2]", "min_speedup: 1.5"])
def test_an_amount_by_its_key_wins_over_another_one_of_the_file_too(tmp_path, amount):
    (tmp_path / "job.yaml").write_text(f"prune: {{{amount}}}\n")
    for words in (["--set", "prune.ratio=0.5"], ["--set", "prune={max_ppl_ratio: 1.1}"]):
        of_the_file, wanted = (
            config_from_options(options_of(*words, *more)).prune for more in (["--config", "job.yaml"], [])
        )
        assert of_the_file == wanted


def test_a_ratio_by_its_key_is_where_the_search_under_the_files_bound_begins(tmp_path):
    (tmp_path / "job.yaml").write_text("prune: {max_ppl_ratio: 1.2}\n")
    config = config_from_options(options_of("--config", "job.yaml", "--set", "prune.ratio=0.5"))
    assert (config.prune.max_ppl_ratio, config.prune.ratio) == (1.2, 0.5)


def test_two_amounts_in_a_file_are_refused(tmp_path):
    (tmp_path / "job.yaml").write_text("prune: {drop: [3, 7, 9], num_drop: 4}\n")
    with pytest.raises(TspError, match=r"each of prune.drop and prune.num_drop says how many layers go; give one"):
        config_from_options(options_of("--config", "job.yaml"))


def test_preset_gives_way_to_what_is_asked_for():
    paper = config_from_options(options_of("--method", "trsp"))
    assert (paper.stage1.placement, paper.stage2.gates) == ("output", "hold")
    changed = config_from_options(options_of("--method", "trsp", "--set", "stage1.placement=residual"))
    assert (changed.stage1.placement, changed.stage2.gates) == ("residual", "hold")


def test_the_demos_settings_are_for_the_demo_only():
    demo, own = (config_from_options(options_of(*words)) for words in ([], ["--model", "folder"]))
    assert demo.tracking.register_as == "demo-pruned"
    assert own.tracking.register_as is None
    assert own.stage1.steps != demo.stage1.steps


@pytest.mark.parametrize("words", [["--drop", "3,7,9"], ["--drop", "9, 7,3"]])
def test_layers_to_drop_are_read(words):
    assert sorted(config_from_options(options_of(*words)).prune.drop) == [3, 7, 9]


def test_a_bound_sets_tuning_text_aside_unless_told_how_much():
    bounded = ["--max-ppl-ratio", "1.1"]
    assert config_from_options(options_of(*bounded)).data.tuning_blocks == 32
    assert config_from_options(options_of(*bounded, "--set", "data.tuning_blocks=5")).data.tuning_blocks == 5
    assert config_from_options(options_of("--min-speedup", "1.1")).data.tuning_blocks == 0


def test_bounds_of_a_sweep_and_the_floor_that_has_none():
    jobs = configs_from_options(options_of("--method", "tsp,dense", "--max-ppl-ratio", "1.1,1.2"))
    assert [(config.prune.method, config.prune.max_ppl_ratio) for _, config in jobs] == [
        ("tsp", 1.1),
        ("tsp", 1.2),
        ("dense", None),
    ]
    assert {config.data.tuning_blocks for _, config in jobs} == {32}, "all are trained on the same text"


def test_dry_run_says_that_the_number_is_found_later():
    import yaml

    done = run("prune", "--dry-run", "--max-ppl-ratio", "1.1")
    assert done.returncode == 0, done.stderr
    plan = yaml.safe_load(done.stdout)["plan"]
    assert (plan["num_drop"], plan["bound"], plan["stage2_steps"]) == (None, "prune.max_ppl_ratio 1.1", 24)


@pytest.mark.parametrize(("method", "steps"), [("tsp", 100), ("shortgpt", 0)])
def test_only_gates_that_are_learned_take_steps_of_stage_1(method, steps, tmp_path):
    from tsp.job import prepare

    options = options_of("--method", method, "--set", "stage1={schedule: budget, steps: 100}")
    job = prepare(config_from_options(options), sharding_path(options), None, root=tmp_path, world_size=1)
    assert job.plan.stage1_steps == steps


def test_dry_run_prints_the_config_and_the_plan_and_makes_nothing():
    import yaml

    done = run("prune", "--dry-run", "--num-drop", "3", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert printed["plan"]["num_drop"] == 3
    assert printed["plan"]["ranks"] == 2
    assert printed["config"]["prune"]["num_drop"] == 3
    assert printed["deepspeed"]["train_micro_batch_size_per_gpu"] == 4
    assert "auto" not in str(printed["deepspeed"])
    assert list(Path.cwd().iterdir()) == []


def test_doctor_prints_one_json_document_and_nothing_else():
    done = run("doctor", "--json")
    checks = json.loads(done.stdout)
    assert done.returncode == (0 if all(check["ok"] for check in checks) else 1)
    assert {"Python", "torch", "tracking store"} <= {check["name"] for check in checks}
    assert list(Path.cwd().iterdir()) == []


def test_ui_without_a_store_fails_in_one_line():
    done = run("ui")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no tracking store")
    assert len(done.stderr.strip().splitlines()) == 1
