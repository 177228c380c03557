"""The pictures: what is drawn where."""

import numpy as np
from PIL import Image, ImageFont

from fibldm.panels import (
    OUTLINE,
    SHEET_CELL,
    _broken,
    grey,
    overlay,
    write_reconstructions,
    write_samples,
)


def test_grey_maps_the_window_to_bytes():
    assert grey(np.array([[[-1.0, 0.0, 1.0, 9.0]]]))[0, 0, :, 0].tolist() == [0, 128, 255, 255]


def test_overlay_draws_the_border_alone():
    contour = np.zeros((1, 1, 12, 12), np.uint8)
    contour[0, 0, 3:9, 3:9] = 1
    drawn = (overlay(np.zeros((1, 12, 12)), contour)[0] == OUTLINE).all(axis=-1)
    inner = np.zeros((12, 12), bool)
    inner[4:8, 4:8] = True
    assert np.array_equal(drawn, (contour[0, 0] > 0) & ~inner)


def test_grid_shows_contour_sample_and_overlay(tmp_path):
    images, contours = np.full((5, 64, 64), -1.0), np.zeros((5, 1, 64, 64), np.uint8)
    images[4] = 1.0
    contours[4] = 1
    write_samples(tmp_path / "sub" / "grid.png", images, contours)
    picture = np.asarray(Image.open(tmp_path / "sub" / "grid.png"))
    assert picture.shape[1] == 4 * (3 * 128 + 8) - 8  # four items a line, cells enlarged twice
    last = picture[-128:, : 3 * 128]  # the fifth item begins the second line
    assert (last[4:-4, 4:124] == 255).all() and (last[4:-4, 132:252] == 255).all()


def test_grid_has_a_label_below_each_sample(tmp_path):
    images, contours = np.full((5, 64, 64), -1.0), np.zeros((5, 1, 64, 64), np.uint8)
    long = "usual interstitial pneumonia, probable"
    write_samples(tmp_path / "a.png", images, contours, ["normal", "", "", long, "normal"])
    picture = np.asarray(Image.open(tmp_path / "a.png")).max(axis=2)
    cell, gap, line = 128, 8, 18
    header, footer = 6 + line, 4 + 3 * line  # the long caption takes three lines
    assert picture.shape[0] == header + 2 * (cell + footer + gap) - gap
    below = picture[header + cell : header + cell + footer]
    for i, lines in enumerate((1, 0, 0, 3)):
        left = i * (3 * cell + gap)
        assert not below[:, left : left + cell].any()  # below the contour
        sample, overlay = (below[:, left + k * cell : left + (k + 1) * cell] for k in (1, 2))
        assert not overlay.any()  # no caption runs into the next cell
        assert [bool(sample[k * line : (k + 1) * line].any()) for k in range(3)] == [
            k < lines for k in range(3)
        ]
    write_samples(tmp_path / "b.png", images, None)
    assert Image.open(tmp_path / "b.png").height == header + cell


def test_difference_is_four_times_and_grey_at_zero(tmp_path):
    x = np.zeros((1, 128, 128))
    write_reconstructions(tmp_path / "panel.png", x, x + 0.1)
    picture = np.asarray(Image.open(tmp_path / "panel.png"))
    assert picture[-1, -1, 0] == round(1.4 * 127.5) and picture[-1, 0, 0] == 128


def test_a_caption_of_wide_letters_stays_within_its_cell():
    font = ImageFont.load_default(13)
    for caption in ("b6f00a94faf5_37c05a0f01f5c145_fa0237_0000.png: error", "W" * 50, "!"):
        lines = _broken(caption, font)
        assert "".join(lines).replace(" ", "") == caption.replace(" ", "")
        assert all(font.getlength(line) <= SHEET_CELL for line in lines)
