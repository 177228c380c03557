"""HU, the window, and slices and contours read from and written to every file format."""

import json

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from fibldm import ct, export, pictures

WINDOW = (-1000.0, 400.0)
RESCALE = (1.0, -1024.0)


def gradient(height: int = 20, width: int = 20) -> np.ndarray:
    """[-1, 1] float32, another value in each pixel, so that no axis can be turned unseen."""
    return np.linspace(-1, 1, height * width, dtype=np.float32).reshape(height, width)


def noise(height: int = 64, width: int = 64, levels: int = 256) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, levels, (height, width)).astype(np.uint8)


@pytest.mark.parametrize("window", [WINDOW, (-1350.0, 150.0), (0.0, 1.0)])
def test_window_is_exact_at_both_ends_and_the_middle(window):
    low, high = window
    hu = np.array([low - 5000, low, (low + high) / 2, high, high + 5000], np.float64)
    unit = ct.hu_to_unit(hu, window)
    assert unit.dtype == np.float32
    np.testing.assert_array_equal(unit, [-1, -1, 0, 1, 1])
    np.testing.assert_array_equal(ct.unit_to_hu(unit[1:4], window), hu[1:4])


def test_window_is_linear_and_inverted():
    hu = np.arange(-1000, 401, 7, dtype=np.float32)
    unit = ct.hu_to_unit(hu)
    np.testing.assert_allclose(np.diff(unit), 7 / 700, atol=1e-6)
    np.testing.assert_allclose(ct.unit_to_hu(unit), hu, atol=1e-3)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_16_bit_takes_the_scale_of_dataset_json(tmp_path, suffix):
    stored = np.arange(400, dtype=np.uint16).reshape(20, 20) * 7
    path = tmp_path / f"a{suffix}"
    write = {
        ".png": lambda: Image.fromarray(stored).save(path),
        ".tif": lambda: tifffile.imwrite(path, stored),
        ".npy": lambda: np.save(path, stored),
    }
    write[suffix]()
    (tmp_path / "dataset.json").write_text(
        json.dumps({"rescale_slope": 0.5, "rescale_intercept": -1024})
    )
    rescale = ct.read_rescale(tmp_path)
    assert rescale == (0.5, -1024.0)
    np.testing.assert_array_equal(ct.read_hu(path, rescale), stored * 0.5 - 1024)
    with pytest.raises(ValueError, match=rf"a\{suffix}: uint16.*dataset\.json"):
        ct.read_hu(path)


def test_8_bit_without_scale_is_the_window(tmp_path):
    stored = noise()
    stored[0, :3] = 0, 255, 51
    Image.fromarray(stored).save(tmp_path / "a.png")
    hu = ct.read_hu(tmp_path / "a.png")
    np.testing.assert_allclose(hu[0, :3], [-1000, 400, -720], atol=1e-3)
    np.testing.assert_allclose(ct.hu_to_unit(hu), stored / 127.5 - 1, atol=1e-6)
    other = ct.read_hu(tmp_path / "a.png", window=(-100.0, 155.0))
    np.testing.assert_allclose(other, stored - 100.0, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32])
def test_signed_and_float_arrays_are_hu(tmp_path, dtype):
    hu = (ct.unit_to_hu(gradient())).astype(dtype)
    np.save(tmp_path / "a.npy", hu)
    np.testing.assert_allclose(ct.read_hu(tmp_path / "a.npy"), hu, atol=1e-3)


@pytest.mark.parametrize("window", [WINDOW, (-1350.0, 150.0)])
@pytest.mark.parametrize("file_format", ["nifti", "dicom", "npy", "png"])
def test_what_is_written_is_read(tmp_path, file_format, window):
    image = gradient(16, 24)
    path = tmp_path / f"a{export.SUFFIXES[file_format]}"
    export.write_slice(path, image, window, file_format, spacing=1.5)
    rescale = export.png_info(window).rescale if file_format == "png" else None
    np.testing.assert_allclose(
        ct.read_hu(path, rescale),
        ct.unit_to_hu(image, window),
        atol={"npy": 1e-3, "png": 0.02}.get(file_format, 0.51),
    )
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_values_beyond_the_window_are_clipped_when_written(tmp_path):
    for file_format, suffix in export.SUFFIXES.items():
        path = tmp_path / f"a{suffix}"
        export.write_slice(path, np.array([[-3.0, 3.0]] * 2, np.float32), WINDOW, file_format)
        rescale = export.png_info(WINDOW).rescale if file_format == "png" else None
        np.testing.assert_allclose(ct.read_hu(path, rescale)[0], WINDOW, atol=1e-3)


def test_dicom_says_that_it_is_synthetic_and_how_large_a_pixel_is(tmp_path):
    export.write_slice(tmp_path / "a.dcm", gradient(), WINDOW, "dicom", spacing=0.75)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert "SYNTHETIC" in str(dataset.PatientName) and "SYNTHETIC" in dataset.SeriesDescription
    assert dataset.ImageType[0] == "DERIVED"
    assert [float(value) for value in dataset.PixelSpacing] == [0.75, 0.75]
    assert dataset.Modality == "CT"


def test_dicom_takes_its_own_scale_and_not_the_data_sets(tmp_path):
    stored = np.arange(400, dtype=np.int16).reshape(20, 20)
    dataset = export.synthetic_dicom(stored, WINDOW, 1.0, "a.dcm")
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(ct.read_hu(tmp_path / "a.dcm", RESCALE), stored * 2.0 - 1000)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'jpeg'.*png, npy, nifti, dicom"):
        export.write_slice(tmp_path / "a.jpeg", gradient(), WINDOW, "jpeg")


@pytest.mark.parametrize("suffix", [".png", ".npy", ".nii.gz", ".nii", ".dcm", ".tif", ".jpg"])
@pytest.mark.parametrize("content", [b"", b"not an image, but long enough for a header " * 20])
def test_undecodable_files_are_refused_by_name(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\{suffix}: cannot be decoded"):
        ct.read_hu(path)


@pytest.mark.parametrize("file_format", export.FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_truncated_files_are_refused_by_name(tmp_path, file_format, part):
    path = tmp_path / f"bad{export.SUFFIXES[file_format]}"
    image = noise().astype(np.float32) / 127.5 - 1
    export.write_slice(path, image, WINDOW, file_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"bad\..*: cannot be decoded"):
        ct.read_hu(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png: no such file"):
        ct.read_hu(tmp_path / "gone.png")


def test_pickles_in_npy_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy"):
        ct.read_hu(tmp_path / "a.npy")


def test_colour_is_refused_and_grey_in_three_channels_is_read(tmp_path):
    grey = noise()
    Image.fromarray(np.stack([grey] * 3, axis=2)).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([grey, grey, 255 - grey], axis=2)).save(tmp_path / "colour.png")
    Image.fromarray(grey).save(tmp_path / "plain.png")
    np.testing.assert_array_equal(
        ct.read_hu(tmp_path / "grey.png"), ct.read_hu(tmp_path / "plain.png")
    )
    with pytest.raises(ValueError, match=r"colour\.png: a colour image"):
        ct.read_hu(tmp_path / "colour.png")


def test_a_volume_and_values_not_finite_are_refused(tmp_path):
    np.save(tmp_path / "volume.npy", np.zeros((5, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"volume\.npy.*2D.*\(5, 8, 8\)"):
        ct.read_hu(tmp_path / "volume.npy")
    values = np.zeros((3, 3), np.float32)
    values[1, 1], values[2, 1] = np.nan, np.inf
    np.save(tmp_path / "nan.npy", values)
    with pytest.raises(ValueError, match=r"nan\.npy: 2 values"):
        ct.read_hu(tmp_path / "nan.npy")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"rescale_slope": "one", "rescale_intercept": 0}',
     '{"rescale_slope": 0, "rescale_intercept": 0}', '{"rescale_slope": 1}',
     '{"rescale_slope": NaN, "rescale_intercept": 0}'],
)  # fmt: skip
def test_a_bad_dataset_json_is_refused_by_name(tmp_path, text):
    assert ct.read_rescale(tmp_path) is None
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset\.json.*rescale_(slope|intercept)"):
        ct.read_rescale(tmp_path)


@pytest.mark.parametrize(
    "info",
    [ct.DatasetInfo((1.0, -1024.0)), ct.DatasetInfo((0.5, 0.0), 0.75),
     ct.DatasetInfo((1.0, 0.0), None, "outline"), ct.DatasetInfo((1.0, 0.0), 1.5, "filled")],
)  # fmt: skip
def test_dataset_info_is_read_as_written(tmp_path, info):
    assert ct.read_dataset_info(tmp_path) == ct.DatasetInfo()
    ct.write_dataset_info(tmp_path, info)
    assert ct.read_dataset_info(tmp_path) == info
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.json"]


def test_keys_of_no_concern_are_passed_over(tmp_path):
    content = {"rescale_slope": 1, "rescale_intercept": 0, "pixel_spacing": None, "made_by": "x"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert ct.read_dataset_info(tmp_path) == ct.DatasetInfo((1.0, 0.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("pixel_spacing", "1.0"), ("pixel_spacing", 0), ("pixel_spacing", -1), ("pixel_spacing", True),
     ("pixel_spacing", [1, 1]), ("contour_style", "dotted"), ("contour_style", 1)],
)  # fmt: skip
def test_dataset_info_of_a_wrong_type_is_refused_by_name(tmp_path, name, value):
    content = {"rescale_slope": 1, "rescale_intercept": 0, name: value}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"dataset\.json.*{name}"):
        ct.read_dataset_info(tmp_path)


@pytest.mark.parametrize("high", [1, 128, 255])
def test_a_contour_is_what_a_mask_marks(tmp_path, high):
    mask = np.zeros((12, 16), np.uint8)
    mask[2:7, 3:11] = high
    Image.fromarray(mask).save(tmp_path / "c.png")
    contour = ct.read_contour(tmp_path / "c.png")
    assert contour.dtype == bool
    np.testing.assert_array_equal(contour, (mask > 0)[None])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_both_lungs_of_a_label_map_are_lung(dtype):
    labels = np.zeros((12, 16), dtype)
    labels[2:7, 3:6], labels[2:7, 9:13] = 1, 2
    np.testing.assert_array_equal(ct.as_mask(labels), labels > 0)


def test_a_nifti_label_map_keeps_both_lungs(tmp_path):
    labels = np.zeros((12, 16), np.uint8)
    labels[2:7, 3:6], labels[2:7, 9:13] = 1, 2
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(labels.T[:, :, None], affine), tmp_path / "c.nii")
    np.testing.assert_array_equal(ct.read_contour(tmp_path / "c.nii"), (labels > 0)[None])


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_the_soft_edge_of_a_mask_is_cut_at_half(scale):
    y, x = np.mgrid[:128, :128]
    distance = np.hypot(x - 64, y - 64)
    soft = np.clip(40.8 - distance, 0, 1) * scale  # a disc of radius 40.3
    values = np.round(soft).astype(np.uint8) if scale > 1 else soft
    assert len(np.unique(values)) > pictures.LABELS
    np.testing.assert_array_equal(ct.as_mask(values), distance < 40.3)


@pytest.mark.parametrize("count", [17, 18, 40, 117])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_label_maps_of_many_labels_are_all_that_is_not_0(count, dtype):
    y, x = np.mgrid[:256, :256]
    regions = 1 + ((y // 12) * 22 + x // 12) % count
    lungs = np.hypot((x - 128) / 90, (y - 128) / 70) < 1
    labels = np.where(lungs, regions, 0).astype(dtype)
    assert len(np.unique(labels)) > pictures.LABELS
    np.testing.assert_array_equal(ct.as_mask(labels), lungs)
    np.testing.assert_array_equal(ct.as_mask(np.stack([labels, labels[::-1]]))[0], lungs)


def test_probabilities_are_cut_at_a_half_whatever_their_maximum():
    y, x = np.mgrid[:64, :64]
    likely = np.clip(5.3 - np.hypot(x - 32, y - 32) / 4, 0, 1)
    for weight in (1, 0.9, 0.4):
        np.testing.assert_array_equal(ct.as_mask(likely * weight), likely * weight > 0.5)
        stored = np.round(likely * weight * 255).astype(np.uint8)
        np.testing.assert_array_equal(ct.as_mask(stored), stored > 127.5)
    volume = np.stack([likely * 100, likely * 30])  # per cent: by the volume
    np.testing.assert_array_equal(ct.as_mask(volume), volume > 50)


def test_outlines_with_soft_edges_are_cut_at_a_half():
    y, x = np.mgrid[:128, :128]
    line = np.clip(1.5 - abs(np.hypot(x - 64.3, y - 63.8) - 40), 0, 1)
    stored = np.round(line * 255).astype(np.uint8)
    np.testing.assert_array_equal(ct.as_mask(stored), stored > 127)


def test_a_picture_is_no_contour(tmp_path):
    np.save(tmp_path / "c.npy", noise())
    with pytest.raises(ValueError, match=r"c\.npy: a picture rather than a contour: 79%"):
        ct.read_contour(tmp_path / "c.npy")


def test_no_real_slice_passes_for_a_contour_and_every_contour_does(ct_folder):
    for path in sorted((ct_folder / "lungs" / "images").iterdir())[::10]:
        stored = np.asarray(Image.open(path))
        windowed = np.round(ct.hu_to_unit(stored - 1024.0) * 127.5 + 127.5).astype(np.uint8)
        for picture in stored, windowed, windowed / 255:
            with pytest.raises(ValueError, match="a picture rather"):
                ct.as_mask(picture)
        mask = np.asarray(Image.open(path.parents[1] / "contours" / path.name))
        np.testing.assert_array_equal(ct.as_mask(mask), mask > 0)
        ct.as_mask(ct.fit_square(mask, 32, 0))  # the softest edge of all


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_values_that_no_contour_has_are_refused(tmp_path, value):
    mask = np.zeros((8, 8), np.float32)
    mask[2:5], mask[7, 7] = 1, value
    np.save(tmp_path / "c.npy", mask)
    with pytest.raises(ValueError, match=r"c\.npy: .*(not finite|-1\.0.*0 outside)"):
        ct.read_contour(tmp_path / "c.npy")


def test_an_empty_contour_is_empty(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "c.png")
    assert not ct.read_contour(tmp_path / "c.png").any()


def test_a_black_and_white_png_is_a_contour(tmp_path):
    mask = np.zeros((9, 13), bool)
    mask[2:5, 3:7] = True
    Image.fromarray(mask).save(tmp_path / "c.png")
    np.testing.assert_array_equal(ct.read_contour(tmp_path / "c.png"), mask[None])


def test_a_label_map_has_a_channel_for_each_label(tmp_path):
    labels = np.zeros((8, 8), np.uint8)
    labels[1:3], labels[5:7] = 1, 2
    Image.fromarray(labels).save(tmp_path / "c.png")
    contour = ct.read_contour(tmp_path / "c.png", channels=2)
    np.testing.assert_array_equal(contour, np.stack([labels == 1, labels == 2]))
    Image.fromarray(labels // 2 * 3).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png.*labels 0 to 2.*up to 3"):
        ct.read_contour(tmp_path / "c.png", channels=2)


def test_an_image_of_k_channels_has_them(tmp_path):
    masks = np.zeros((8, 8, 3), np.uint8)
    masks[:3, :, 0], masks[:, :2, 1], masks[5:, :, 2] = 255, 1, 9
    Image.fromarray(masks).save(tmp_path / "c.png")
    contour = ct.read_contour(tmp_path / "c.png", channels=3)
    np.testing.assert_array_equal(contour, np.moveaxis(masks > 0, 2, 0))
    np.testing.assert_array_equal(ct.read_contour(tmp_path / "c.png")[0, :3], True)


@pytest.mark.parametrize("size", [20, 40, 60, 80])
def test_padding_keeps_the_aspect(size):
    image = np.full((20, 40), 100.0, np.float32)
    image[5:15, 15:25] = 900  # a square in the middle
    fitted = ct.fit_square(image, size, -1000)
    assert fitted.shape == (size, size)
    bright = fitted > 500
    high, wide = bright.any(axis=1).sum(), bright.any(axis=0).sum()
    assert high == wide == pytest.approx(size / 4, abs=1)
    edge = size // 4 - 2
    assert (fitted[:edge] == -1000).all() and (fitted[-edge:] == -1000).all()
    assert abs(bright.sum(axis=1).argmax() - size / 2) <= size / 8 + 1


def test_halving_takes_the_mean_of_each_block():
    image = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    blocks = image.reshape(2, 4, 2, 4, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(ct.fit_square(image, 4, 0), blocks, atol=1e-6)


@pytest.mark.parametrize("size", [16, 20, 24, 50, 100])
def test_resizing_keeps_the_mean_and_the_range(size):
    fine = np.random.default_rng(0).uniform(-1000, 400, (48, 48)).astype(np.float32)
    fitted = ct.fit_square(fine, size, -1000)
    assert fitted.mean() == pytest.approx(fine.mean(), abs=15)
    assert fitted.min() >= fine.min() and fitted.max() <= fine.max()
    if size < 48:  # interpolation alone would keep the noise, the mean of an area does not
        assert fitted.std() < 1.1 * size / 48 * fine.std()


@pytest.mark.parametrize("side", [256, 300, 512, 768])
def test_contours_survive_resizing(side):
    """A mask keeps its area; an outline of one pixel stays closed, around the same area."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    mask = (x / 0.35) ** 2 + (y / 0.25) ** 2 < 1
    outline = mask & ~ndimage.binary_erosion(mask)
    area = mask.mean()
    assert ct.fit_contour(mask[None], 256).mean() == pytest.approx(area, rel=0.01)
    reduced = ct.fit_contour(outline[None], 256)[0]
    assert reduced.mean() < area / 4
    assert ndimage.binary_fill_holes(reduced).mean() == pytest.approx(area, rel=0.03)


def ellipse(side: int = 64) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side - 0.5
    return ((x / 0.35) ** 2 + (y / 0.25) ** 2 < 1)[None]


@pytest.mark.parametrize("side", [32, 64, 256])
def test_the_style_of_a_contour_is_told(side):
    mask = ellipse(side)
    outline = ct.outline_mask(mask)
    assert ct.contour_style(mask) == "filled"
    assert ct.contour_style(outline) == ct.contour_style(outline.astype(np.uint8)) == "outline"
    thick = mask & ~ndimage.binary_erosion(mask[0], iterations=max(1, side // 32))[None]
    assert ct.contour_style(thick) == "outline"


def test_no_style_is_told_of_what_is_empty_or_small():
    mask = np.zeros((1, 16, 16), bool)
    assert ct.contour_style(mask) is None
    mask[0, 3:6, 3:6] = True
    assert ct.contour_style(ct.outline_mask(mask)) is None


def test_masks_and_outlines_are_made_of_each_other():
    mask = ellipse()
    outline = ct.outline_mask(mask)
    np.testing.assert_array_equal(ct.fill_outline(outline), mask)
    np.testing.assert_array_equal(ct.fit_contour(mask, 64, "outline"), outline)
    np.testing.assert_array_equal(ct.fit_contour(outline, 64, "filled"), mask)
    for style, contour in ("filled", mask), ("outline", outline), (None, mask), (None, outline):
        np.testing.assert_array_equal(ct.fit_contour(contour, 64, style), contour)


@pytest.mark.parametrize("side", [256, 512])
def test_converted_contours_are_as_training_has_them(side):
    """Of the right style, one pixel wide, and around the same area after reduction."""
    mask = ellipse(side)
    outline = ct.fit_contour(mask, 64, "outline")
    assert ct.contour_style(outline) == "outline"
    np.testing.assert_array_equal(outline, ct.outline_mask(ct.fit_contour(mask, 64)))
    filled = ct.fit_contour(ct.outline_mask(mask), 64, "filled")
    np.testing.assert_array_equal(filled, ct.fit_contour(mask, 64))


def test_nothing_around_the_field_of_view_is_air():
    for nothing in (np.nan, -np.inf):
        values = np.zeros((2, 8, 8), np.float32)
        values[:, :, :2] = nothing
        hu = ct.scale_to_hu(values, "x")
        assert (hu[:, :, :2] == ct.AIR).all() and not hu[:, :, 2:].any()
    values[0, 4, 4] = -np.inf
    with pytest.raises(ValueError, match="1 values are not finite"):
        ct.scale_to_hu(values, "x")


def test_labels_that_most_of_the_lungs_have_are_labels():
    y, x = np.mgrid[:128, :128]
    lungs = np.hypot((x - 64) / 50, (y - 64) / 40) < 1
    labels = np.where(lungs, np.where(x < 64, 17, 18), 0)
    labels[60:76, 60:76] = 1 + np.arange(16).reshape(4, 4).repeat(4, 0).repeat(4, 1)
    for scale in (1, 1000):
        np.testing.assert_array_equal(ct.as_mask(labels * scale), lungs)


def test_per_cent_in_whole_numbers_is_cut_by_the_volume():
    y, x = np.mgrid[:64, :64]
    likely = np.clip(5.3 - np.hypot(x - 32, y - 32) / 4, 0, 1)
    for scale in (100, 255, 1000, 4095, 65535):
        volume = np.round(np.stack([likely, likely * 0.3]) * scale)
        np.testing.assert_array_equal(ct.as_mask(volume), volume > scale / 2)


@pytest.mark.parametrize("picture", ["blue", "white"])
def test_a_mask_in_colours_everywhere_is_refused(tmp_path, picture):
    colours = np.full((16, 16, 3), 255, np.uint8)
    if picture == "blue":
        colours[..., :2] = 0
        colours[4:9, 4:9] = (255, 0, 0)
    Image.fromarray(colours).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png: colours everywhere"):
        ct.read_contour(tmp_path / "c.png")
