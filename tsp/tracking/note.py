"""The note on an experiment in MLflow's UI (tag `mlflow.note.content`, Markdown): how to read its runs."""

NOTE_TAG = "mlflow.note.content"

NOTE = """\
**One run is one job**: a model that lost some of its layers, and what that did to it. A run with the tag
`tsp.kind` = `sweep` is the parent of many jobs and holds their comparison (artifacts `comparison/`); unfold it to see
its children, or filter with `tags."tsp.kind" = "job"`. `tune` is the parent of a search (`tsp tune`), `trial` one of
its trials, which are not evaluated: look at `tune/loss`.

**Columns to show:** tags `method`, `transfer`, `num_drop`, `base_model`, `dropped`; params `seed`, `stage2.lr`,
`stage2.steps`, `data.source`, `budget_s`; metrics `ppl_ratio`, `ppl_ratio/<corpus>`, `perf/select_s`,
`perf/transfer_s`. Group by `method` and `transfer`: runs that differ in `seed` alone are repetitions.

**Metrics are called the same for every method:**

| metric | what it is |
|---|---|
| `ppl_ratio` | perplexity after / before, the worst corpus: 1 is no loss |
| `eval/<corpus>/ppl_dense`, `.../ppl_bare_drop`, `.../ppl_pruned` | before; only dropped; at the end |
| `eval/<corpus>/ppl_quantized`, `.../ppl_pruned_quantized` | the dense and the pruned model in int8 (`--quantize`) |
| `eval/<corpus>/ppl_ratio_low`, `..._high` | 95 % interval of the ratio |
| `tune/loss` | loss on text set aside for choosing settings; it is never text of a result |
| `stage1/gate/layer_007`, `stage2/gate/layer_007` | gate of a layer by step: 1 is the dense model, 0 is bypassed |
| `stage1/loss/*`, `stage2/loss/*`, `stage2/gap/*` | what was minimised, and its parts |
| `perf/*` | seconds by phase, tokens per second, memory |
| `prune/*` | layers and parameters dropped, tokens trained |

Compare only runs of the same model, the same evaluation texts (their fingerprints are in *Datasets*) and precision, and
either at equal tokens (`budget_s` is None) or at equal seconds. `tsp compare "EXPERIMENT" --report page.html` does so,
averages over seeds and says which differences are more than chance.
"""


_OF_A_MODEL = {
    "/promotions": """\
**One run is one decision about MODEL**: an alias moved to a version, or did not. Its name says which, its artifact
`requirements.json` what was asked, measured and found, `decision.json` all of it.

**Columns to show:** tags `decision` (accepted, refused), `alias`, `version`, `previous`, `reason`, `refusal`, `who`,
`policy`, `evidence` (the runs that measured). Metrics are the measured values under the names that requirements use.
`tsp audit "MODEL"` prints the same as a table, and whether aliases and files are as decided.
""",
    "/monitoring": """\
**One run is one look at MODEL in use** (`tsp monitor`): what it was asked, how far it is from the model it is compared
with. Metrics stand at the number of the look, so that a chart over all runs shows them over time: `kl`, `top1`, `loss`,
`repetition`, and by slice. `requirements.json` has the bounds, `monitoring.json` all of it.
""",
    "/evaluations": """\
**One run is one later measurement of a version of MODEL**, made by `tsp promote --evaluate`: evidence for a decision in
`MODEL/promotions`. The artifact `evaluation.json` has all figures.
""",
}
"""By the end of the experiment's name."""


def note_for(experiment: str) -> str:
    """The note of one experiment."""
    for suffix, note in _OF_A_MODEL.items():
        if experiment.endswith(suffix):
            return note.replace("MODEL", experiment.removesuffix(suffix))
    return NOTE.replace("EXPERIMENT", experiment)
