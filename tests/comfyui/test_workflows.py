"""The shipped workflows on the real server: they run, they edit, and both formats say the same.

The demo model does an instruction with one exact answer as well in a few steps as in forty, so the number of
steps is reduced.
"""

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_client import ArrayClient, from_file
from comfy_host import REPO
from make_thumbnails import with_demo_model

from training import instructions

pytestmark = pytest.mark.server

API = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((REPO / "workflows" / "api").glob("*.json"))}
TEMPLATES = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((REPO / "workflows").glob("*.json"))}
EXAMPLES = REPO / "web" / "examples"
STEPS = 6
EXACT_DB = 20.0
MARGIN_DB = 3.0  # better than the unedited picture by this much
MAX_THUMBNAIL = 60_000
VIRTUAL = ("MarkdownNote", "Note")
# Widgets that the page has for itself: the seed's habit, and the button of Load Image.
PAGE_ONLY = ("control_after_generate", "upload")

Edits = Callable[[str], list[np.ndarray]]


@cache
def picture(name: str) -> np.ndarray:
    """An example picture [H, W, 3], and its mask as a fourth channel where it has one."""
    return from_file((EXAMPLES / f"qwen_edit_{name}.png").read_bytes())


@pytest.fixture(scope="module")
def edits(server) -> Edits:
    """`edits(name)`: the pictures of a shipped workflow with few steps, previews included; run only once."""

    @cache
    def run(name: str) -> list[np.ndarray]:
        workflow = with_demo_model(json.loads(json.dumps(API[name])))
        with ArrayClient(server.url) as client:
            for node in workflow.values():
                if node["class_type"] in ("QwenEditSampler", "QwenEditStepPreset", "KSampler") and not isinstance(
                    node["inputs"]["steps"], list
                ):
                    node["inputs"]["steps"] = STEPS
                if node["class_type"] == "QwenEditStepSweep":
                    node["inputs"]["sweep"] = f"2, {STEPS}"
                if node["class_type"] == "LoadImage":
                    path = EXAMPLES / node["inputs"]["image"]
                    assert client.upload(path) == path.name
            return client.arrays(client.run(workflow, timeout_s=300), type=None)

    return run


def check_exact(result: np.ndarray, source: np.ndarray, exact: np.ndarray) -> None:
    """The edit happened, and the rest of the picture was preserved."""
    assert result.shape == exact.shape
    reached, unedited = instructions.psnr(result, exact), instructions.psnr(source, exact)
    assert reached >= EXACT_DB, f"{reached:.1f} dB from the exact answer; the unedited picture has {unedited:.1f} dB"
    assert reached >= unedited + MARGIN_DB, f"{reached:.1f} dB, but the unedited picture has {unedited:.1f} dB"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("single_edit", [(256, 256)]),
        ("two_references", [(256, 256)]),
        ("list_of_pictures", [(256, 256), (256, 256), (384, 256)]),
        ("draft_then_high_quality", [(256, 256)] * 2),
        ("lora_switching", [(256, 256)] * 2),
        ("large_picture_with_mask", [(600, 400)]),
        ("native_ksampler", [(256, 256)]),
        ("three_references", [(256, 256)]),
        ("reference_cache", [(256, 256)] * 2),
        ("official_2511_accelerated", [(256, 256)]),
    ],
)
def test_results_have_the_size_of_the_source(edits: Edits, name: str, sizes: list[tuple[int, int]]):
    assert [(image.shape[1], image.shape[0]) for image in edits(name)] == sizes


def test_all_workflows_are_tested_and_in_both_formats():
    assert len(TEMPLATES) == 15
    assert TEMPLATES.keys() == API.keys() - {"warm_up"}  # which is for probes, and no picture to look at


def test_single_edit(edits: Edits):
    source = picture("astronaut")
    check_exact(edits("single_edit")[0], source, instructions.grey(source))


def test_two_references(edits: Edits):
    first, second = picture("astronaut"), picture("cat")
    exact = instructions.halves(first, second)
    check_exact(edits("two_references")[0], first, exact)
    check_exact(edits("two_references")[0], second, exact)


@pytest.mark.parametrize(
    ("index", "name", "operation"),
    [(0, "astronaut", instructions.invert), (1, "cat", instructions.sepia), (2, "rocket", instructions.tint_green)],
)
def test_each_picture_of_a_list_gets_its_prompt(edits: Edits, index: int, name: str, operation):
    check_exact(edits("list_of_pictures")[index], picture(name), operation(picture(name)))


def test_draft_and_high_quality_share_seed_and_encoding(edits: Edits):
    draft, final = edits("draft_then_high_quality")
    # The same noise and instruction, another guidance: alike, not equal.
    assert 0 < np.abs(draft - final).mean() < 0.2
    workflow = API["draft_then_high_quality"]
    samplers = [node["inputs"] for node in workflow.values() if node["class_type"] == "QwenEditSampler"]
    assert [sampler["preset"] for sampler in samplers] == ["draft", "high quality"]
    shared = ("model", "seed", "positive", "negative", "latent")
    assert {key: samplers[0][key] for key in shared} == {key: samplers[1][key] for key in shared}


def test_branches_with_different_loras_differ(edits: Edits):
    sketch, film = edits("lora_switching")
    source = picture("astronaut")
    assert np.abs(sketch - film).mean() > 0.05
    assert np.abs(sketch - source).mean() > 0.05
    # A sketch has hardly any colour, a warm film has more red than blue.
    assert np.ptp(sketch, axis=-1).mean() < 0.5 * np.ptp(source, axis=-1).mean()
    assert (film[..., 0] - film[..., 2]).mean() > (source[..., 0] - source[..., 2]).mean()


def test_large_picture_is_edited_inside_the_mask_only(edits: Edits):
    source, result = picture("coffee")[..., :3], edits("large_picture_with_mask")[0]
    mask = 1 - picture("coffee")[..., 3]
    # ComfyUI saves by truncating, so the source's own value may come back one step lower.
    assert np.abs(result - source)[mask == 0].max() <= 1.01 / 255
    inside = np.zeros(mask.shape, bool)
    inside[20:380, 520:580] = True  # the table, well away from the seam
    assert mask[inside].min() == 1
    assert np.ptp(result, axis=-1)[inside].mean() < 0.25 * np.ptp(source, axis=-1)[inside].mean()
    assert instructions.psnr(result[inside], instructions.grey(source)[inside]) >= EXACT_DB


def test_native_ksampler(edits: Edits):
    source = picture("astronaut")
    check_exact(edits("native_ksampler")[0], source, instructions.sepia(source))


def test_official_2511_accelerated(edits: Edits):
    source = picture("astronaut")
    check_exact(edits("official_2511_accelerated")[0], source, instructions.grey(source))


def test_a_batch_edits_a_folder(client: ArrayClient, server):
    workflow = json.loads(json.dumps(API["batch_of_edits"]))
    names = ("astronaut", "cat")
    for name in names:
        client.upload(EXAMPLES / f"qwen_edit_{name}.png", subfolder="template")
    (batch,) = (node["inputs"] for node in workflow.values() if node["class_type"] == "QwenEditBatch")
    batch |= {"source": "template", "output": "template", "steps": STEPS}
    results = client.arrays(client.run(workflow, timeout_s=300))
    assert len(results) == len(list((server.output / "template").iterdir())) == 2
    for name, result in zip(names, results, strict=True):
        # the batch makes 0.07 megapixels of 256x256
        assert result.shape == (256, 256, 3)
        check_exact(result, picture(name), instructions.grey(picture(name)))


def test_warming_up_makes_the_server_ready(client: ArrayClient):
    client.free()
    deadline = time.monotonic() + 30
    while client.get("/qwen_edit/status")["ready"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    result = client.run(API["warm_up"], timeout_s=120)
    assert len(result.images("temp")) == 1
    assert client.get("/qwen_edit/status")["ready"]


def test_measure_my_card_saves_the_edit_and_draws_the_chart(edits: Edits):
    source = picture("astronaut")
    result, chart = edits("measure_my_card")
    check_exact(result, source, instructions.grey(source))
    assert chart.shape[1] == 900


def test_step_sweep_draws_the_chart_and_the_pictures(edits: Edits):
    chart, sheet = edits("step_sweep")
    assert chart.shape[:2] == (920, 900)
    assert sheet.shape[1] >= 2 * 256


def test_lightning(edits: Edits):
    source = picture("cat")
    check_exact(edits("lightning")[0], source, instructions.sepia(source))


def test_small_card(edits: Edits):
    source = picture("rocket")
    result = edits("small_card")[0]
    assert instructions.psnr(result, instructions.invert(source)) > instructions.psnr(
        source, instructions.invert(source)
    )


def api_of(template: dict[str, Any]) -> dict[str, Any]:
    """What a template's nodes, links and widget values amount to in API format."""
    origins = {link[0]: [str(link[1]), link[2]] for link in template["links"]}
    nodes = {}
    for node in template["nodes"]:
        if node["type"] in VIRTUAL:
            continue
        assert node["mode"] == 0, f"Node {node['id']} is bypassed or muted."
        inputs: dict[str, Any] = {}
        values = list(node.get("widgets_values", []))
        for slot in node["inputs"]:
            if slot["name"] == "compare_view":  # the page fills it itself and does not save it
                inputs["compare_view"] = {"__value__": ["", ""]}
            elif "widget" in slot:
                inputs[slot["widget"]["name"]] = values.pop(0)
                if slot["name"] == "seed":
                    assert values.pop(0) == "fixed"
            if slot.get("link") is not None:
                inputs[slot["name"]] = origins[slot["link"]]
        assert not values, f"Node {node['id']} has more widget values than widgets: {values}"
        for name in PAGE_ONLY:
            inputs.pop(name, None)
        nodes[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return nodes


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_and_api_workflow_agree(name: str):
    assert api_of(TEMPLATES[name]) == API[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_links_of_a_template_are_complete(name: str):
    template = TEMPLATES[name]
    nodes = {node["id"]: node for node in template["nodes"]}
    for number, origin, output, target, slot, _ in template["links"]:
        assert number in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number


@pytest.mark.parametrize("name", TEMPLATES)
def test_nodes_of_a_template_do_not_overlap(name: str):
    title = 30
    boxes = [
        (node["pos"][0], node["pos"][1] - title, node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for node in TEMPLATES[name]["nodes"]
    ]
    for index, a in enumerate(boxes):
        for b in boxes[:index]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_of_a_template_are_drawn_when_it_opens(name: str):
    """The page then zooms to the whole graph, and draws no texts below 57 %: what fits is for a screen of 1920×1080."""
    nodes = TEMPLATES[name]["nodes"]
    left, top = (min(node["pos"][axis] for node in nodes) for axis in (0, 1))
    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in nodes) for axis in (0, 1))
    assert right - left <= 2500
    assert bottom - top <= 1230


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_has_a_thumbnail(name: str):
    path: Path = REPO / "workflows" / f"{name}.jpg"
    assert path.is_file(), "scripts/make_thumbnails.py makes the thumbnails."
    assert path.stat().st_size <= MAX_THUMBNAIL


def test_no_two_thumbnails_are_the_same_picture():
    pictures = [path.read_bytes() for path in (REPO / "workflows").glob("*.jpg")]
    assert len(set(pictures)) == len(pictures) == len(TEMPLATES)
