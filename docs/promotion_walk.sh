#!/usr/bin/env bash
# From two pruned candidates to champion, refusal, rollback and audit, in an empty folder; some two minutes on a laptop.
#
#   mkdir /tmp/walk && cd /tmp/walk && bash .../docs/promotion_walk.sh
#
# The jobs are as short as can be: the way is to be seen, and no good model.
set -euo pipefail

say() { printf '\n== %s\n' "$*"; }

# Runs a command that must end with the code $1.
ends_with() {
    local wanted=$1 got=0
    shift
    "$@" || got=$?
    if [ "$got" -ne "$wanted" ]; then
        echo "expected exit code $wanted, got $got: $*" >&2
        exit 1
    fi
    echo "(exit code $got)"
}

short=(--register walk --experiment walk
    --set data.max_blocks=16 --set data.block_tokens=128
    --set eval.max_blocks=8 --set eval.block_tokens=128 --set eval.prompts=4
    --set stage1.steps=2 --set stage2.steps=2)

say "two candidates of the demo model: two layers less, and four"
tsp prune "${short[@]}" --drop 3,9 --run-name careful
tsp prune "${short[@]}" --drop 3,9,12,13 --run-name bold
tsp models list walk

say "what a champion has to keep"
cat > policy.yaml <<'YAML'
champion:
  - ppl_ratio<=1.15
  - vs_champion.ppl_ratio<=1.01    # relative to the version in use: many small losses are a large one
  - round_trip==ok
pilot:
  - ppl_ratio<=1.5
  - round_trip==ok
YAML
cat policy.yaml

say "version 1 keeps it"
tsp promote walk 1 --policy policy.yaml --reason "the first"

say "version 2 does not: refused, recorded, and the alias stays"
ends_with 3 tsp promote walk 2 --policy policy.yaml --reason "faster"

say "it may be tried by some"
tsp promote walk 2 --alias pilot --policy policy.yaml --reason "ten users who asked for it"

say "what nobody has measured is a refusal, too, and says what measures it"
ends_with 3 tsp promote walk 2 --require "worst_slice_ratio<=1.25" --dry-run

say "the bound was set too low for us: version 2 goes into use, in place of version 1 and of no other"
tsp promote walk 2 --require "ppl_ratio<=1.5" --expect-champion 1 --reason "speed counts more, agreed on Monday"

say "it was not what users want: back"
tsp rollback walk --reason "complaints about long answers"

say "all decisions, and whether everything is as decided"
tsp audit walk

say "somebody moves the alias by hand: the audit sees it"
python - <<'PYTHON'
from pathlib import Path

from mlflow import MlflowClient

MlflowClient(f"sqlite:///{Path.cwd()}/mlruns/mlflow.db").set_registered_model_alias("walk", "champion", "2")
PYTHON
ends_with 3 tsp audit walk --no-files

say "decided properly, it is sound again"
tsp promote walk 1 --policy policy.yaml --reason "put right"
tsp audit walk --no-files

say "the champion as a folder for a server that knows nothing of MLflow"
tsp export models:/walk@champion champion
echo "look at all of it with: tsp ui"
