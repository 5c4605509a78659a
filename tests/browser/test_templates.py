"""What a person sees of the pack in ComfyUI's page: templates, reports on the nodes, progress, translations."""

import json
import re
import time

import pytest
from browser import Browser
from comfy_client import ComfyClient
from comfy_host import REPO
from make_screenshots import MAX_BYTES, PICTURES, SHOWN
from seen import on_canvas

pytestmark = [pytest.mark.server, pytest.mark.slow]

API = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((REPO / "workflows" / "api").glob("*.json"))}
# These name files that a machine has only when its user put them there: ComfyUI offers them for download.
NEEDS_FILES = {name for name, nodes in API.items() if any(n["class_type"] == "UNETLoader" for n in nodes.values())}
COMPLAINTS = (
    "[data-testid=error-overlay], [data-testid=error-dialog], .p-toast-message-error, .p-toast-message-warn,"
    " [data-toast-kind=error], [data-toast-kind=warning]"
)
SHOWS_PICTURES = (
    "SaveImage",
    "QwenEditSave",
    "PreviewImage",
    "QwenEditBatch",
    "QwenEditPerfReport",
    "QwenEditStepSweep",
)
FEW_STEPS = """
for (const widget of app.graph.nodes.filter((node) => node.type.startsWith("QwenEdit")).flatMap((node) => node.widgets ?? []))
  if (widget.name === "steps") widget.value = 2;
  else if (widget.name === "sweep") widget.value = "2, 3";
"""
PICTURE_WIDTHS = """
const loaded = async ({ filename, subfolder, type }) => {
  const picture = new Image();
  picture.src = app.api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  await picture.decode();
  return picture.naturalWidth;
};
return Promise.all((app.nodeOutputs[args[0]]?.images ?? []).map(loaded));
"""


@pytest.mark.parametrize("name", sorted(API.keys() - {"warm_up"}))  # which no person opens
def test_template_opens_without_a_complaint_queues_its_api_workflow_and_runs(browser: Browser, name: str):
    browser.problems()
    browser.open_template(name)
    assert browser.api_graph() == API[name]
    # The pictures of the template are there, though nobody has put them into the input folder.
    browser.wait(
        "return app.graph._nodes.filter(n => n.type === 'LoadImage').every(n => n.imgs?.[0]?.naturalWidth > 0)", 20
    )
    if name not in NEEDS_FILES:
        # What the page said of the template before, about files that are missing, fades; then nothing comes.
        browser.wait("return !document.querySelector(args[0])", 10, COMPLAINTS)
        time.sleep(1)
        assert browser.js("return [...document.querySelectorAll(args[0])].map(e => e.textContent)", COMPLAINTS) == []
        shows_its_results(browser, name)
    assert browser.problems() == []


def shows_its_results(browser: Browser, name: str) -> None:
    """The open template with few steps: it succeeds, and all of its results are pictures."""
    if name == "batch_of_edits":  # of what lies in the input folder
        with ComfyClient(browser.url) as client:
            client.upload(REPO / "web" / "examples" / "qwen_edit_cat.png")
    browser.js(FEW_STEPS)
    browser.run(120)
    for number, node in API[name].items():
        if node["class_type"] in SHOWS_PICTURES:
            widths = browser.js(PICTURE_WIDTHS, number)
            assert widths, f"{name}: {node['_meta']['title']} shows no picture"
            assert min(widths) >= 256


def test_the_effective_settings_stand_on_the_sampler_and_not_in_its_widgets(browser: Browser):
    browser.open_template("lightning")
    assert on_canvas(browser, 5) == ["4 steps · no CFG · dyn. shift"]
    browser.js(
        "const set = (name, value) => app.graph.getNodeById(5).widgets.find(w => w.name === name).value = value;"
        "set('preset', 'ComfyUI template'); set('steps', 12);"
    )
    assert on_canvas(browser, 5) == ["12 steps · CFG 4 · shift 3.1"]
    queued = browser.api_graph()["5"]["inputs"]
    assert (queued["steps"], queued["true_cfg_scale"], queued["shift"]) == (12, 0, 0)


def test_run_shows_progress_preview_and_reports(browser: Browser):
    browser.open_template("single_edit")
    before = browser.js("return JSON.stringify(app.graph.serialize().nodes.map(n => n.widgets_values))")
    browser.js("""
        window.seen = {};
        for (const type of ["progress", "b_preview", "execution_success", "execution_error"]) {
          app.api.addEventListener(type, (event) => (window.seen[type] ??= []).push(event.detail));
        }
        app.graph.getNodeById(5).widgets.find((widget) => widget.name === "steps").value = 4;
        await app.queuePrompt(0, 1);
    """)
    # The preview lies on the sampler while it runs.
    browser.wait("return app.graph.getNodeById(5).imgs?.[0]?.naturalWidth > 0 || window.seen.execution_error", 120)
    browser.wait("return window.seen.execution_success || window.seen.execution_error", 120)
    assert browser.js("return window.seen.execution_error ?? []") == []
    assert browser.js("return window.seen.b_preview.length") >= 3
    assert browser.js("return window.seen.progress.filter(p => p.node === '5').map(p => p.value)")[-1] == 4
    reports = browser.js(
        "return Object.fromEntries(app.graph._nodes.map(n => [n.type, n.widgets?.find(w => w.name === 'report')?.value]))"
    )
    assert reports["QwenEditSampler"] == "4 steps, true CFG 4, dynamic shift"
    assert reports["QwenEditSmartResize"].startswith("256×256 → 256×256")
    assert "denoise" in reports["QwenEditPerfLogger"]
    assert reports["SaveImage"] is None
    # Before and after, in ComfyUI's own comparison.
    compared = browser.js("return app.nodeOutputs['10']")
    assert "compare.a" in json.dumps(compared)
    assert "compare.b" in json.dumps(compared)
    browser.js(
        "app.graph.getNodeById(10).widgets[0].value = args[0]", API["single_edit"]["10"]["inputs"]["compare_view"]
    )
    # What a node reports is neither queued nor saved.
    browser.js('app.graph.getNodeById(5).widgets.find((widget) => widget.name === "steps").value = 0')
    assert browser.api_graph() == API["single_edit"]
    assert browser.js("return JSON.stringify(app.graph.serialize().nodes.map(n => n.widgets_values))") == before
    assert browser.problems() == []


def test_the_page_fills_in_the_name_of_a_saved_file(browser: Browser):
    browser.open_template("lightning")
    browser.js(
        "app.graph.getNodeById(8).widgets.find((widget) => widget.name === 'filename_prefix').value = args[0]",
        "%date:yyyy%/%Edit.seed%",
    )
    assert browser.js("return app.graph.getNodeById(5).title") == "Edit"
    prefix = browser.api_graph()["8"]["inputs"]["filename_prefix"]
    assert re.fullmatch(r"20\d\d/\d+", prefix)


def test_the_extension_is_small():
    assert sum(path.stat().st_size for path in (REPO / "web" / "js").glob("*.js")) < 100_000


def test_the_pictures_of_the_page_are_there_and_small():
    for name in SHOWN:
        assert 0 < (PICTURES / f"{name}.jpg").stat().st_size <= MAX_BYTES, "scripts/make_screenshots.py makes them."
