"""The pictures, pixel by pixel where that is possible."""

import numpy as np
import pytest
from PIL import Image

from diffusers_scalelong.plots import save_image_grid, save_loss_curve


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_grid_holds_every_image_in_reading_order(tmp_path, channels):
    values = np.arange(5) / 5
    images = np.broadcast_to(values[:, None, None, None], (5, 4, 4, channels))
    save_image_grid(images, tmp_path / "grid.png", padding=1, min_tile=8)
    grid = np.asarray(Image.open(tmp_path / "grid.png")).reshape(2 * 9 + 1, 3 * 9 + 1, channels)
    for index, value in enumerate(values):
        top, left = 1 + index // 3 * 9, 1 + index % 3 * 9
        assert (grid[top : top + 8, left : left + 8] == round(value * 255)).all()
    assert (grid[0] == 255).all()
    assert (grid[10:, 19:] == 255).all()


def test_large_images_keep_their_size(tmp_path):
    save_image_grid(np.zeros((1, 100, 100, 3)), tmp_path / "grid.png", padding=2, min_tile=64)
    assert Image.open(tmp_path / "grid.png").size == (104, 104)


def test_a_loss_curve_shows_the_loss(tmp_path):
    save_loss_curve(range(1, 101), list(1 / np.arange(1, 101)), tmp_path / "falling.png")
    save_loss_curve(range(1, 101), [0.5] * 100, tmp_path / "flat.png")
    falling, flat = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("falling.png", "flat.png"))
    assert falling.shape == flat.shape
    assert (falling != flat).any()
    save_loss_curve([1], [0.5], tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size[0] > 100


def test_steps_without_a_finite_loss_leave_no_trace(tmp_path):
    save_loss_curve([1, 2, 4], [0.5, 0.4, 0.3], tmp_path / "without.png")
    save_loss_curve([1, 2, 3, 4], [0.5, 0.4, float("nan"), 0.3], tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()
    save_loss_curve([1], [float("inf")], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
