"""The pictures are written, of a stable size, for few and for many layers, also where gates exceed 1."""

import numpy as np
import PIL.Image
import pytest

from tsp.figures import gate_heatmap, gate_trajectories


def gates(num_steps: int, num_layers: int) -> np.ndarray:
    return 1.0 + np.linspace(0, 0.3, num_steps)[:, None] * np.linspace(-3, 1, num_layers)[None, :]


@pytest.mark.parametrize("num_layers", [2, 16, 130])
@pytest.mark.parametrize("num_steps", [1, 40])
def test_pictures_are_drawn(tmp_path, num_layers, num_steps):
    gates_SL, steps = gates(num_steps, num_layers), list(range(0, 5 * num_steps, 5))
    heatmap = gate_heatmap(tmp_path / "h.png", gates_SL, steps=steps, doomed=[0])
    lines = gate_trajectories(
        tmp_path / "t.png", gates_SL, steps=steps, doomed=[0], stage_boundary=steps[-1], title="demo"
    )
    for path in (heatmap, lines):
        with PIL.Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 600


def test_heatmap_keeps_its_size_while_it_grows(tmp_path):
    sizes = set()
    for num_steps in (1, 7, 50):
        path = gate_heatmap(tmp_path / "h.png", gates(num_steps, 16), steps=list(range(num_steps)), doomed=[])
        with PIL.Image.open(path) as image:
            sizes.add(image.size)
    assert len(sizes) == 1


def test_doomed_layers_change_the_picture(tmp_path):
    pictures = [
        gate_trajectories(
            tmp_path / f"{len(doomed)}.png", gates(5, 8), steps=range(5), doomed=doomed, stage_boundary=None, title="x"
        ).read_bytes()
        for doomed in ([], [0], list(range(8)))
    ]
    assert len(set(pictures)) == 3
