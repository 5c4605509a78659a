"""Step sweeps: the list, the measures against scikit-image's, the knee, the table, the pictures."""

import json
import math

import numpy as np
import pytest
import torch

from qwen_edit.recipes import PRESETS
from qwen_edit.sweep import Outcome, as_json, find_knee, knee, likeness, parse_sweep, sentence, sweep_table
from qwen_edit.sweep_chart import GAP, LABEL, MAX_SHEET, contact_sheet, draw_sweep


def test_numbers_take_the_preset_and_its_overrides_and_names_are_their_own():
    points = parse_sweep("4, 12\nlightning 8,, DRAFT ", "standard", true_cfg_scale=2.0)
    assert [point.label for point in points] == ["4", "12", "Lightning 8", "draft"]
    assert [point.recipe.steps for point in points] == [4, 12, 8, 20]
    assert [point.recipe.true_cfg_scale for point in points] == [2.0, 2.0, 1.0, 3.0]
    assert points[2].recipe == PRESETS["Lightning 8"]
    assert [point.evaluations for point in points] == [8, 24, 8, 40]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 points"),
        ("8", "1 points"),
        ("4,8,4", "4 more than once"),
        ("4,08,8", "8 more than once"),
        ("4,0", "at least 1"),
        ("4,-8", "'-8'"),
        ("4,8.5", "'8.5'"),
        ("4,1001", "steps is 1001"),
        ("4,fast", "'fast'"),
        ("4;8", "'4;8'"),
        (",".join(map(str, range(1, 18))), "17 points"),
    ],
)
def test_a_list_that_says_nothing_useful_is_refused(text, said):
    with pytest.raises(ValueError, match=r"^\[QE_INPUT\]") as refused:
        parse_sweep(text, "standard")
    assert said in str(refused.value)


def test_likeness_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(3)
    rows = torch.linspace(0, 1, 48)[:, None, None]
    reference = (rows * torch.tensor([0.9, 0.5, 0.2]) + torch.linspace(0, 0.1, 40)[None, :, None]).clamp(0, 1)[None]
    picture = (reference + 0.05 * torch.randn(reference.shape, generator=generator)).clamp(0, 1)
    psnr, ssim = likeness(picture, reference)
    first, second = picture[0].numpy(), reference[0].numpy()
    assert psnr == pytest.approx(metrics.peak_signal_noise_ratio(second, first, data_range=1.0), abs=1e-3)
    _, whole = metrics.structural_similarity(
        first, second, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        full=True,
    )  # fmt: skip
    assert ssim == pytest.approx(whole[5:-5, 5:-5].mean(), abs=1e-3)
    assert likeness(reference, reference.clone()) == (math.inf, 1.0)


def test_the_knee_is_where_more_time_buys_less():
    assert knee([(1, 0.80), (2, 0.90), (3, 0.945), (5, 0.975), (10, 1.0)]) == 2
    assert knee([(10, 1.0), (3, 0.945), (1, 0.80), (2, 0.90), (5, 0.975)]) == 1  # in any order
    assert knee([(1, 0.1), (2, 0.2), (3, 0.3)]) is None  # a straight line
    assert knee([(1, 0.1), (2, 0.11), (3, 0.3)]) is None  # it pays more and more
    assert knee([(1, 0.1), (3, 0.3)]) is None
    assert knee([(1, 0.5), (2, 0.5), (3, 0.5)]) is None


OUTCOMES = [
    Outcome("4", 4, 4.0, 1.7, 21.2, 0.81),
    Outcome("8", 8, 4.0, 3.4, 25.6, 0.93),
    Outcome("12", 12, 4.0, error="[QE_NAN] The result holds NaN."),
    Outcome("Lightning 8", 8, 1.0, 1.75, math.inf, 1.0),
    Outcome("40", 40, 4.0, 16.9),
]


def test_a_failed_point_is_in_the_table_and_in_nothing_else():
    assert find_knee(OUTCOMES, 4) == 3
    table = sweep_table(OUTCOMES, 4, 3)
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "failed: [QE_NAN]" in rows["12"]
    assert rows["40"].endswith("the reference")
    assert rows["Lightning 8"].endswith("the knee")
    assert "equal" in rows["Lightning 8"]
    told = json.loads(as_json(OUTCOMES, 4, 3))
    assert told["points"][3]["psnr_db"] is None
    assert told["points"][2]["error"].startswith("[QE_NAN]")
    assert (
        sentence(OUTCOMES, 4, 3)
        == "The knee is at Lightning 8: SSIM 1.000, equal against 40 steps, in 10% of its time."
    )
    assert sentence(OUTCOMES, 4, None).startswith("No knee")


def test_the_chart_is_drawn_for_whatever_came_out():
    pytest.importorskip("matplotlib")
    for outcomes, reference in ((OUTCOMES, 4), ([OUTCOMES[4], OUTCOMES[2]], 0)):
        for theme in ("dark", "light"):
            picture = draw_sweep(outcomes, reference, find_knee(outcomes, reference), theme)
            assert picture.shape == (920, 900, 3)
            assert picture.dtype == np.uint8
            assert picture.std() > 5


def test_the_contact_sheet_keeps_pixels_while_it_fits():
    pictures = [torch.rand(1, 40, 160, 3, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    sheet = contact_sheet(pictures, [str(n) for n in range(5)])
    tile = sheet[:, GAP + LABEL : GAP + LABEL + 40, GAP : GAP + 160]
    assert torch.equal(tile, pictures[0])
    large = contact_sheet([torch.zeros(1, 1024, 1536, 3)] * 6, ["x"] * 6)
    assert max(large.shape[1:3]) <= MAX_SHEET + LABEL * 6
