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


def note_for(experiment: str) -> str:
    """The note of one experiment."""
    return NOTE.replace("EXPERIMENT", experiment)
