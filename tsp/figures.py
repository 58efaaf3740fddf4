"""Pictures of the gates: a heatmap while stage 1 runs, and the trajectories with the layers that went at the end.

    gate_heatmap(Path("heatmap.png"), gates_SL, steps=[0, 10, 20], doomed=[3, 7])

Each function draws into a PNG file and returns its path; where it is shown is not decided here. No global state of
matplotlib is touched, so any thread may draw.

Shapes: S logged steps, L layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

DPI = 110
DOOMED = "#c1121f"
KEPT = "#8d99ae"
INK = "#2b2d42"
MAX_STEP_LABELS = 9
MAX_LINE_LABELS = 10
MAX_LAYER_LABELS = 48
"""Above this many layers only every second, fifth, ... is labelled, and the doomed ones."""


def gate_heatmap(path: Path, gates_SL: "np.ndarray", *, steps: Sequence[int], doomed: Sequence[int]) -> Path:
    """Every gate at every logged step: layers downwards, steps to the right.

    White is 1, the dense model; the bluer, the nearer to 0, bypassed; red is above 1, an amplified layer.

    Args:
        path: PNG file to write.
        gates_SL: gate values [S, L].
        steps: the S logged steps.
        doomed: indices of the layers marked for removal; may be empty.

    Returns:
        `path`.
    """
    import numpy as np

    gates_LS = np.asarray(gates_SL, dtype=float).T
    num_layers, num_steps = gates_LS.shape
    height_in = min(max(2.6, 0.8 + 0.2 * num_layers), 14.0)
    figure, (axes,) = _figure(9.0, height_in)
    image = axes.imshow(gates_LS, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0.0, vmax=2.0)
    shown = np.unique(np.linspace(0, num_steps - 1, min(num_steps, MAX_STEP_LABELS)).round().astype(int))
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    axes.set_xlabel("step")
    _label_layers(axes, num_layers, doomed)
    top = max(1.0, min(2.0, float(gates_LS.max())))
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=5 * height_in)
    bar.ax.set_ylim(0.0, top)
    bar.set_label("gate" if top == 1.0 else "gate (red: above 1)")
    marked = f"doomed: {_listed(doomed)}" if doomed else "no layer is doomed yet"
    axes.set_title(f"Gates up to step {steps[-1]}; {marked}", loc="left", fontsize=11, color=INK)
    return _save(figure, path)


def gate_trajectories(
    path: Path,
    gates_SL: "np.ndarray",
    *,
    steps: Sequence[int],
    doomed: Sequence[int],
    stage_boundary: int | None,
    title: str,
) -> Path:
    """One line a layer over both stages, and below it the layer stack with the layers that went.

    Args:
        path: PNG file to write.
        gates_SL: gate values [S, L].
        steps: the S logged steps.
        doomed: indices of the removed layers.
        stage_boundary: first step of stage 2; None: there was none.
        title: what the picture is of: model, method.

    Returns:
        `path`.
    """
    import numpy as np

    gates_SL = np.asarray(gates_SL, dtype=float)
    num_layers = gates_SL.shape[1]
    figure, (axes, strip) = _figure(9.0, 5.6, height_ratios=(14, 1))
    doomed_set = set(doomed)
    for layer in sorted(range(num_layers), key=lambda i: i in doomed_set):
        gone = layer in doomed_set
        axes.plot(
            steps,
            gates_SL[:, layer],
            color=DOOMED if gone else KEPT,
            linewidth=1.8 if gone else 0.9,
            alpha=1.0 if gone else 0.7,
            drawstyle="steps-post",  # A hard gate is never between 0 and 1.
            marker="o" if len(steps) == 1 else None,
        )
    last = len(steps) - 1 if stage_boundary is None else max(int(np.searchsorted(steps, stage_boundary)) - 1, 0)
    if len(doomed) <= MAX_LINE_LABELS:
        _label_lines(axes, steps[last], gates_SL[last], doomed)
    if stage_boundary is not None:
        axes.axvline(stage_boundary, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        top = axes.get_xaxis_transform()
        axes.text(stage_boundary, 1.02, "stage 1  ", ha="right", fontsize=9, color=INK, transform=top)
        axes.text(stage_boundary, 1.02, "  stage 2", ha="left", fontsize=9, color=INK, transform=top)
    axes.set_ylim(min(-0.03, float(gates_SL.min()) - 0.03), max(1.06, float(gates_SL.max()) * 1.06))
    axes.set_xlabel("step")
    axes.set_ylabel("gate")
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=18)
    _draw_stack(strip, num_layers, doomed)
    return _save(figure, path)


def _figure(width_in: float, height_in: float, height_ratios: Sequence[float] = (1,)) -> tuple[Any, list[Any]]:
    """An empty figure with one plot a height ratio, one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(height_ratios), 1, height_ratios=height_ratios, squeeze=False)[:, 0]
    plots[0].spines[["top", "right"]].set_visible(False)
    return figure, list(plots)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, format="png")
    return Path(path)


def _listed(layers: Sequence[int]) -> str:
    """`3, 7, 9`, cut where it would not fit a title."""
    names = [str(layer) for layer in sorted(layers)]
    return ", ".join(names) if len(names) <= 16 else ", ".join(names[:15]) + f", ... ({len(names)} layers)"


def _label_layers(axes: Any, num_layers: int, doomed: Sequence[int]) -> None:
    """Layer numbers beside the rows; those of the doomed layers are red, with an arrow at the right edge."""
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100) if num_layers / s <= MAX_LAYER_LABELS)
    regular = [layer for layer in range(0, num_layers, stride) if all(abs(layer - d) >= stride for d in doomed)]
    ticks = sorted({*regular, *doomed})
    axes.set_yticks(ticks, [str(layer) for layer in ticks], fontsize=8)
    axes.set_ylabel("layer")
    for tick, label in zip(ticks, axes.get_yticklabels(), strict=True):
        if tick in doomed:
            label.set(color=DOOMED, fontweight="bold")
    axes.plot(
        [1.012] * len(doomed), list(doomed), marker="<", markersize=5, color=DOOMED, linestyle="none",
        transform=axes.get_yaxis_transform(), clip_on=False,
    )  # fmt: skip


def _label_lines(axes: Any, step: int, gates_L: "np.ndarray", doomed: Sequence[int]) -> None:
    """The number of each doomed layer at its gate, left of `step`; numbers that would overlap are moved apart."""
    gap, last = 0.05, -1.0
    for layer in sorted(doomed, key=lambda i: gates_L[i]):
        last = max(float(gates_L[layer]), last + gap)
        axes.annotate(
            str(layer),
            (step, last),
            (-5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            fontweight="bold",
            color=DOOMED,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )


def _draw_stack(axes: Any, num_layers: int, doomed: Sequence[int]) -> None:
    """A strip with one box a layer: the removed ones red and numbered, the kept ones grey."""
    gone = set(doomed)
    turn = 0 if num_layers <= MAX_LAYER_LABELS else 90
    axes.bar(range(num_layers), 1.0, width=0.86, color=[DOOMED if i in gone else KEPT for i in range(num_layers)])
    for layer in range(num_layers):
        if num_layers <= MAX_LAYER_LABELS or layer in gone:
            axes.text(layer, 0.46, str(layer), ha="center", va="center", color="white", fontsize=7, rotation=turn)
    axes.set_xlim(-0.6, num_layers - 0.4)
    axes.axis("off")
    axes.set_title(
        f"{num_layers} layers, without {_listed(doomed) or 'none'}: {num_layers - len(gone)} stay", fontsize=9
    )
