"""Sizes, alignment to a twentieth of a pixel, masks, and what bad pictures get."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.filters import gaussian
from skimage.registration import phase_cross_correlation

from qwen_edit import geometry as geo
from qwen_edit.resample import resize, to_rgb

# width × height of sources; odd, prime, tiny, huge, wide and tall
SIZES = [
    (1365, 2048),
    (2048, 1365),
    (1000, 707),
    (333, 517),
    (511, 511),
    (640, 480),
    (97, 61),
    (1, 1),
    (1, 900),
    (2400, 60),
    (20000, 1),
    (20000, 12000),
    (7, 4000),
]


def photo(name: str, width: int, height: int) -> torch.Tensor:
    """A real photograph at the wanted size: a crop, or an enlargement where it is too small."""
    picture = torch.from_numpy(np.asarray(getattr(data, name)(), dtype=np.float32) / 255.0)[None]
    scale = max(width / picture.shape[2], height / picture.shape[1], 0.5)
    picture = resize(picture, math.ceil(picture.shape[2] * scale), math.ceil(picture.shape[1] * scale))
    return picture[:, :height, :width].contiguous()


def prepare(image: torch.Tensor, target: tuple[int, int] | None = None, fit: str = "pad") -> geo.Geometry:
    height, width = image.shape[1:3]
    target = target or geo.target_by_area(width, height)
    return dataclasses.replace(geo.plan(width, height, target, fit), source=image)


def shift(reference: torch.Tensor, moved: torch.Tensor, corner: tuple[slice, slice]) -> float:
    """The largest offset in px between two pictures in one part of them, to a hundredth."""
    views = [gaussian(picture[0].mean(dim=-1)[corner].numpy(), 2) for picture in (reference, moved)]
    window = np.outer(np.hanning(views[0].shape[0]), np.hanning(views[0].shape[1]))
    views = [(view - view.mean()) * window for view in views]
    offset, _, _ = phase_cross_correlation(*views, upsample_factor=100, normalization=None)
    return float(np.abs(offset).max())


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(torch.mean((a - b) ** 2)))


# Sizes


@pytest.mark.parametrize("area", [384 * 384, 1024 * 1024, 256 * 256, 777_777])
def test_dimensions_are_those_of_diffusers(area):
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    ratios = [width / height for width in range(1, 60) for height in range(1, 60)] + [40, 1 / 40, 1e-3]
    for ratio in ratios:
        assert geo.calculate_dimensions(area, ratio) == pipeline.calculate_dimensions(area, ratio)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_dimensions_refuse_what_is_no_size(value):
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] area"):
        geo.calculate_dimensions(value, 1.0)
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] ratio"):
        geo.calculate_dimensions(1024, value)


@pytest.mark.parametrize(
    ("source", "area", "expected"),
    [
        ((1024, 1024), 2**20, (1024, 1024)),
        ((1365, 2048), 2**20, (832, 1248)),
        ((1920, 1080), 2**20, (1376, 768)),
        ((300, 200), 2**20, (1248, 832)),
        ((512, 512), 256**2, (256, 256)),
        ((4000, 100), 2**20, (2048, 64)),
        ((20000, 1), 2**20, (2048, 32)),
        ((1, 20000), 2**20, (32, 2048)),
        ((3000, 2000), 4 * 2**20, (2048, 1376)),
        ((1, 1), 2**20, (1024, 1024)),
        ((40, 1), 32**2, (192, 32)),
    ],
)
def test_target_by_area(source, area, expected):
    assert geo.target_by_area(*source, area) == expected


@pytest.mark.parametrize(
    ("source", "side", "expected"),
    [
        ((1365, 2048), 1024, (672, 1024)),
        ((2048, 1365), 1024, (1024, 672)),
        ((500, 500), 1000, (992, 992)),
        ((4000, 100), 1024, (1024, 32)),
        ((20000, 12000), 2048, (2048, 1216)),
        ((5, 5), 32, (32, 32)),
    ],
)
def test_target_by_longest_side(source, side, expected):
    assert geo.target_by_longest_side(*source, side) == expected


@pytest.mark.parametrize("value", [0, -5, math.nan, math.inf, -math.inf, 1e9])
def test_targets_name_the_value_they_refuse(value):
    with pytest.raises(ValueError, match=rf"\[QE_INPUT\] area: got {re.escape(str(value))}"):
        geo.target_by_area(100, 100, value)
    with pytest.raises(ValueError, match=rf"\[QE_INPUT\] longest_side: got {re.escape(str(value))}"):
        geo.target_by_longest_side(100, 100, value)


@pytest.mark.parametrize("fit", geo.FITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("area", [2**20, 2**16, 4 * 2**20])
def test_plan_holds_its_rules(size, fit, area):
    target = geo.target_by_area(*size, area)
    geometry = geo.plan(*size, target, fit)
    for side in target:
        assert side % 32 == 0
        assert 32 <= side <= 2048
    for box, outer in ((geometry.source_box, size), (geometry.content_box, target)):
        assert 0 <= box.x <= box.x + box.width <= outer[0]
        assert 0 <= box.y <= box.y + box.height <= outer[1]
        assert box.width >= 1
        assert box.height >= 1
    if fit != "crop":
        assert geometry.source_box == (0, 0, *size)
    if fit != "pad":
        assert geometry.content_box == (0, 0, *target)
    # whole pixels: the two scales differ by at most half a pixel over the rounded side
    rounded = geometry.content_box if fit == "pad" else geometry.source_box
    if fit != "stretch" and min(rounded.width, rounded.height) > 1:
        x, y = geometry.scale
        assert abs(x / y - 1) <= 0.5 / min(rounded.width, rounded.height) + 1e-9


@pytest.mark.parametrize("target", [(1000, 1024), (0, 32), (32, 4096), (-32, 32)])
def test_plan_refuses_targets_off_the_grid(target):
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] target size"):
        geo.plan(100, 100, target)


def test_plan_refuses_an_unknown_fit_and_an_empty_source():
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] fit: got 'zoom'"):
        geo.plan(100, 100, (32, 32), "zoom")
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] image: got 0×100"):
        geo.plan(0, 100, (32, 32))


def test_description_says_scale_and_margins():
    assert geo.plan(1365, 2048, (832, 1248)).describe() == "1365×2048 → 832×1248, scale 0.61, no padding"
    assert "scale 1.22, 4 px padding" in geo.plan(1000, 707, (1216, 864)).describe()
    assert "source px cut off" in geo.plan(1000, 707, (1216, 864), "crop").describe()
    assert "scale 10.2×0.512" in geo.plan(100, 2000, (1024, 1024), "stretch").describe()
    assert "reduced (over 2048 px)" in geo.plan(4000, 3000, (1184, 896)).describe()


# Alignment


@pytest.mark.parametrize("fit", geo.FITS)
@pytest.mark.parametrize(
    ("name", "width", "height", "area"),
    [
        ("astronaut", 511, 509, 2**20),
        ("chelsea", 451, 300, 2**20),
        ("coffee", 599, 397, 2**20),
        ("rocket", 640, 427, 2**17),
        ("astronaut", 1365, 2047, 2**20),
        ("coffee", 2501, 1003, 2**20),
        ("chelsea", 333, 517, 2**16),
    ],
)
def test_identity_edit_returns_without_shift_or_zoom(name, width, height, area, fit):
    image = photo(name, width, height)
    geometry = prepare(image, geo.target_by_area(width, height, area), fit)
    restored = geo.restore(geometry, geo.apply(geometry, image))
    assert restored.shape == image.shape
    part = min(width, height) // 2
    first, last = slice(0, part), slice(-part, None)
    whole = slice(None)
    for corner in ((whole, whole), (first, first), (first, last), (last, first), (last, last)):
        assert shift(image, restored, corner) < 0.05
    assert psnr(image, restored) > (38 if min(geometry.scale) >= 1 else 24)


def test_a_shift_of_a_tenth_of_a_pixel_would_be_seen():
    image = photo("astronaut", 511, 509)
    moved = resize(image, 510, 509, (0.1, 0.0, 510.1, 509.0))
    assert 0.08 < shift(image[:, :, :510], moved, (slice(None), slice(None))) < 0.12


@pytest.mark.parametrize("fit", geo.FITS)
def test_a_source_already_of_target_size_comes_back_exactly(fit):
    image = photo("coffee", 416, 288)
    geometry = prepare(image, (416, 288), fit)
    picture = geo.apply(geometry, image)
    assert torch.equal(picture, image)
    assert picture.data_ptr() != image.data_ptr()
    restored = geo.restore(geometry, picture)
    assert torch.equal(restored, image)
    assert restored.data_ptr() != picture.data_ptr()


@pytest.mark.parametrize("fit", geo.FITS)
@pytest.mark.parametrize("size", [size for size in SIZES if size[0] * size[1] < 3e6])
def test_round_trip_of_any_size(size, fit):
    image = torch.rand((1, size[1], size[0], 3), generator=torch.Generator().manual_seed(1))
    geometry = prepare(image, fit=fit)
    picture = geo.apply(geometry, image)
    assert picture.shape == (1, geometry.target_height, geometry.target_width, 3)
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    assert geo.restore(geometry, picture).shape == image.shape


def test_padding_mirrors_the_picture():
    image = photo("coffee", 300, 100)
    geometry = prepare(image, (320, 192))
    picture, content = geo.apply(geometry, image), geometry.content_box
    assert content.y > 0
    inside = picture[:, content.y : content.y + content.height]
    assert torch.equal(picture[:, : content.y], inside[:, : content.y].flip(1))


def test_upscaled_edits_of_the_same_shape_are_taken_at_their_size():
    image = photo("chelsea", 451, 300)
    geometry = prepare(image, (256, 160))
    picture = geo.apply(geometry, image)
    restored = geo.restore(geometry, resize(picture, 1024, 640))
    everything = (slice(None), slice(None))
    assert shift(image, restored, everything) < 0.05
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] edited image: got 256×192, expected 256×160"):
        geo.restore(geometry, torch.zeros(1, 192, 256, 3))


def test_a_large_side_is_reduced_in_bounded_size():
    image = torch.rand((1, 300, 20000, 1), generator=torch.Generator().manual_seed(2))
    geometry = prepare(image)
    assert geometry.reduced_first
    assert geo.apply(geometry, image).shape == (1, 32, 2048, 3)


def test_block_reduction_is_close_to_filtering_alone():
    image = photo("astronaut", 4096, 4096)
    channel = Image.fromarray(image[0, :, :, 0].contiguous().numpy())
    exact = np.asarray(channel.resize((256, 256), Image.Resampling.LANCZOS))
    assert psnr(resize(image, 256, 256)[0, :, :, 0], torch.tensor(exact)) > 50


# Cropping, masks and batches


def test_what_a_crop_cuts_off_comes_from_the_source():
    image = photo("coffee", 599, 397)
    geometry = prepare(image, (256, 256), "crop")
    box = geometry.source_box
    restored = geo.restore(geometry, torch.zeros(1, 256, 256, 3))
    inside = torch.zeros(397, 599, dtype=torch.bool)
    inside[box.y : box.y + box.height, box.x : box.x + box.width] = True
    assert torch.equal(restored[0][~inside], image[0][~inside])
    assert not restored[0][inside].any()


@pytest.mark.parametrize("feather", [0, 1, 16, 64])
@pytest.mark.parametrize("fit", geo.FITS)
def test_outside_the_mask_is_the_source_bit_for_bit(fit, feather):
    image = photo("rocket", 401, 299)
    geometry = prepare(image, (256, 192), fit)
    mask = torch.zeros(1, 299, 401)
    mask[:, 60:200, 130:300] = 1
    edited = 1 - geo.apply(geometry, image)
    restored = geo.restore(geometry, edited, mask, feather)
    outside = mask[0] == 0
    assert torch.equal(restored[0][outside], image[0][outside])
    without = geo.restore(geometry, edited)
    if feather <= 64:
        assert torch.equal(restored[0, 130, 215], without[0, 130, 215])
    changed = (restored[0] != image[0]).any(dim=-1)
    assert (changed & ~outside).float().sum() > 0.95 * (~outside).sum()


def test_feather_rises_inside_the_mask_only():
    mask = torch.zeros(1, 60, 60)
    mask[:, 10:50, 10:50] = 1
    weight = geo.feather_inside(mask, 8)
    assert not weight[mask == 0].any()
    profile = weight[0, 30, 10:31]
    assert torch.all(profile[1:] >= profile[:-1])
    assert 0 < float(profile[0]) < 0.2
    assert float(profile[8]) == 1
    assert torch.equal(weight, weight.flip(2))


def test_feather_leaves_thin_parts_and_the_picture_border_edited():
    mask = torch.zeros(1, 80, 80)
    mask[:, 40:43, 5:75] = 1
    mask[:, :, :3] = 1
    weight = geo.feather_inside(mask, 16)
    assert float(weight[0, 41, 40]) == 1
    assert float(weight[0, 70, 0]) == 1
    assert torch.equal(geo.feather_inside(torch.ones(1, 9, 9), 4), torch.ones(1, 9, 9))
    assert not geo.feather_inside(torch.zeros(1, 9, 9), 4).any()


def test_soft_masks_keep_their_values():
    mask = torch.full((1, 50, 50), 0.5)
    assert torch.equal(geo.feather_inside(mask, 10), mask)
    image = torch.zeros(1, 50, 50, 3)
    geometry = prepare(image, (64, 64))
    restored = geo.restore(geometry, torch.ones(1, 64, 64, 3), mask)
    torch.testing.assert_close(restored, torch.full_like(image, 0.5))


def test_a_mask_of_the_model_pictures_size_is_brought_back_too():
    image = photo("chelsea", 400, 200)
    geometry = prepare(image, (128, 64), "stretch")
    mask = torch.zeros(64, 128)
    mask[16:48, 32:96] = 1
    restored = geo.restore(geometry, torch.zeros(1, 64, 128, 3), mask)
    assert not restored[0, 100, 200].any()
    assert torch.equal(restored[:, :40], image[:, :40])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 64, 64), r"mask: got 64×64, expected the source's 100×80"),
        (torch.full((1, 80, 100), math.nan), r"mask: values from nan"),
        (torch.full((1, 80, 100), 2.0), r"mask: values from 2 to 2"),
        (torch.zeros(3, 80, 100), r"mask: got 3 masks for 2 pictures"),
        (torch.zeros(0, 80, 100), r"mask: got the shape \[0, 80, 100\]"),
        (torch.zeros(1, 80, 100, 3), r"mask: got the shape"),
    ],
)
def test_bad_masks_are_named(mask, message):
    image = torch.zeros(2, 80, 100, 3)
    geometry = prepare(image, (128, 96))
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] " + message):
        geo.restore(geometry, torch.zeros(2, 96, 128, 3), mask)
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] feather: got 300"):
        geo.restore(geometry, torch.zeros(2, 96, 128, 3), torch.ones(1, 80, 100), 300)


def test_each_picture_of_a_batch_gets_its_own_source():
    image = torch.stack([photo(name, 300, 200)[0] for name in ("coffee", "chelsea")])
    geometry = prepare(image, (128, 128), "crop")
    restored = geo.restore(geometry, torch.zeros(4, 128, 128, 3))
    assert restored.shape == (4, 200, 300, 3)
    for i in range(4):
        assert torch.equal(restored[i, :, :20], image[i % 2, :, :20])
    alone = geo.restore(prepare(image[1:], (128, 128), "crop"), torch.zeros(1, 128, 128, 3))
    assert torch.equal(restored[1:2], alone)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_does_not_belong_is_refused(batch):
    geometry = prepare(torch.zeros(2, 80, 100, 3), (128, 96), "pad")
    with pytest.raises(ValueError, match=rf"\[QE_INPUT\] edited image: got a batch of {batch} for a source"):
        geo.restore(geometry, torch.zeros(batch, 96, 128, 3))


def test_a_geometry_without_source_says_what_it_lacks():
    geometry = geo.plan(100, 80, (128, 128), "crop")
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] geometry: it carries no source"):
        geo.restore(geometry, torch.zeros(1, 128, 128, 3))
    assert geo.restore(geo.plan(100, 80, (128, 96)), torch.zeros(1, 96, 128, 3)).shape == (1, 80, 100, 3)


# Pictures of other kinds


def test_alpha_is_composited_over_white():
    image = torch.zeros(1, 2, 2, 4)
    image[0, 0, 0] = torch.tensor([0.2, 0.4, 0.6, 1.0])
    image[0, 0, 1] = torch.tensor([0.2, 0.4, 0.6, 0.5])
    rgb = to_rgb(image)
    torch.testing.assert_close(rgb[0, 0, 0], torch.tensor([0.2, 0.4, 0.6]))
    torch.testing.assert_close(rgb[0, 0, 1], torch.tensor([0.6, 0.7, 0.8]))
    assert torch.equal(rgb[0, 1], torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(2, 40, 30, 1), (2, 40, 30), (2, 40, 30, 2)])
def test_grey_and_mask_shaped_pictures_get_three_channels(shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    rgb = to_rgb(image)
    assert rgb.shape == (2, 40, 30, 3)
    assert torch.equal(rgb[..., 0], rgb[..., 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_out_as_float32(dtype):
    image = photo("coffee", 100, 80).to(dtype)
    geometry = prepare(image)
    restored = geo.restore(geometry, geo.apply(geometry, image))
    assert restored.dtype == torch.float32
    assert psnr(restored, image.float()) > 35


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_inputs_are_never_changed(channels):
    image = torch.rand((1, 64, 64, channels), generator=torch.Generator().manual_seed(4))
    before = image.clone()
    geometry = prepare(image, (64, 64))
    picture = geo.apply(geometry, image)
    picture.zero_()
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    untouched = mask.clone()
    edited = torch.ones(1, 64, 64, 3)
    for restored in (geo.restore(geometry, edited), geo.restore(geometry, edited, mask, 4)):
        restored.fill_(0.3)
    assert torch.equal(image, before)
    assert torch.equal(mask, untouched)
    assert torch.equal(edited, torch.ones(1, 64, 64, 3))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(0, 8, 8, 3), r"\[QE_INPUT\] image: got the empty shape \[0, 8, 8, 3\]"),
        (torch.zeros(1, 0, 8, 3), r"\[QE_INPUT\] image: got the empty shape \[1, 0, 8, 3\]"),
        (torch.zeros(1, 8, 8, 5), r"\[QE_INPUT\] image: got the shape \[1, 8, 8, 5\]"),
        (torch.zeros(8, 8, 3), r"\[QE_INPUT\] image: got the shape \[8, 8, 3\]"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), r"\[QE_INPUT\] image: got torch.uint8"),
        (torch.full((1, 8, 8, 3), math.nan), r"\[QE_NAN\] image: 192 NaN and 0 Inf"),
        (torch.full((1, 8, 8, 3), -math.inf), r"\[QE_NAN\] image: 0 NaN and 192 Inf"),
        (None, r"\[QE_INPUT\] image: got NoneType"),
    ],
)
def test_bad_pictures_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


def test_apply_refuses_a_picture_of_another_size():
    with pytest.raises(ValueError, match=r"\[QE_INPUT\] image: got 9×8, expected 8×8"):
        geo.apply(geo.plan(8, 8, (32, 32)), torch.zeros(1, 8, 9, 3))


def test_overshoot_is_cut_off_and_unusual_ranges_survive():
    edge = torch.zeros(1, 16, 16, 3)
    edge[:, :, 8:] = 1
    scaled = resize(edge, 64, 64)
    assert float(scaled.min()) == 0
    assert float(scaled.max()) == 1
    assert float(resize(edge * 3 - 1, 64, 64).max()) == 2
