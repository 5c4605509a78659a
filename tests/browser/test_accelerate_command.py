"""The command that puts Qwen Edit Accelerate into whatever workflow is open."""

import copy
import json
from importlib.metadata import files
from pathlib import Path

import pytest
from browser import Browser
from comfy_host import REPO

pytestmark = [pytest.mark.server, pytest.mark.slow]

COMMAND = "QwenEditFast.Accelerate"
API = {name: json.loads((REPO / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
       for name in ("official_2511_accelerated", "native_ksampler")}  # fmt: skip


def shipped_by_comfyui(name: str) -> dict:
    """One of the templates that come with ComfyUI."""
    (path,) = [path for path in files("comfyui-workflow-templates-json") or () if path.name == f"{name}.json"]
    return json.loads(Path(str(path.locate())).read_text("utf-8"))


def load(browser: Browser, workflow: dict) -> None:
    browser.js("await app.loadGraphData(JSON.parse(args[0]), true, true, 'opened')", json.dumps(workflow))
    browser.wait("return !app.isGraphLoading", 30)


def run(browser: Browser) -> str:
    """What the message says."""
    browser.js("await app.extensionManager.command.execute(args[0])", COMMAND)
    said = "[...document.querySelectorAll('.p-toast-message, [data-testid=toast]')].find(e => e.textContent.includes('Qwen Edit Fast'))"
    text = browser.wait(f"return {said}?.textContent", 10)
    browser.js(f"let said; while ((said = {said})) {{ said.querySelector('button').click();"
               " await new Promise(done => setTimeout(done, 300)); }")  # fmt: skip
    return text


def accelerated(graph: dict) -> list[tuple[str, set[str]]]:
    """Of each Accelerate: which node it stands behind, and which before."""

    def takers(id: str) -> set[str]:
        return {other for other, node in graph.items() if node["inputs"].get("model") == [id, 0]}

    return [(node["inputs"]["model"][0], takers(id)) for id, node in graph.items()
            if node["class_type"] == "QwenEditAccelerate"]  # fmt: skip


def test_comfyuis_own_template_gets_it_before_the_sampler_inside_its_node(browser: Browser):
    browser.open()
    load(browser, shipped_by_comfyui("image_qwen_image_edit_2511"))
    (sampler,) = [id for id, node in browser.api_graph().items() if node["class_type"] == "KSampler"]
    outer, _inner = sampler.split(":")
    model = browser.api_graph()[sampler]["inputs"]["model"][0]
    assert "before 1 sampler(s), inside Image Edit" in run(browser)
    assert accelerated(browser.api_graph()) == [(model, {sampler})]
    overlaps = browser.js(
        "const graph = app.graph.getNodeById(args[0]).subgraph, own = graph.nodes.find(n => n.type === 'QwenEditAccelerate');"
        "const box = ({ pos, size }) => [pos[0], pos[1] - LiteGraph.NODE_TITLE_HEIGHT, pos[0] + size[0], pos[1] + size[1]];"
        "const [a, b, c, d] = box(own);"
        "return graph.nodes.filter(n => n !== own).filter(n => { const [e, f, g, h] = box(n);"
        " return a < g && e < c && b < h && f < d; }).map(n => n.type)",
        int(outer),
    )
    assert overlaps == []
    assert "Nothing to accelerate" in run(browser)
    assert accelerated(browser.api_graph()) == [(model, {sampler})]
    browser.js("await app.extensionManager.command.execute('Comfy.Undo')")
    browser.wait("return !app.isGraphLoading", 30)
    assert accelerated(browser.api_graph()) == []


def test_an_open_workflow_gets_it_before_each_sampler_of_a_qwen_model(browser: Browser):
    plain = copy.deepcopy(API["official_2511_accelerated"])
    ((own, accelerate),) = [one for one in plain.items() if one[1]["class_type"] == "QwenEditAccelerate"]
    ((sampler, samples),) = [one for one in plain.items() if one[1]["class_type"] == "KSampler"]
    (loads,) = [node for node in plain.values() if node["class_type"] == "UNETLoader"]
    samples["inputs"]["model"] = accelerate["inputs"]["model"]
    del plain[own]
    second, plain["902"] = "900", copy.deepcopy(loads)
    plain[second], plain["901"] = copy.deepcopy(samples), copy.deepcopy(samples)
    plain["902"]["inputs"]["unet_name"] = "flux1-dev.safetensors"
    plain["901"]["inputs"]["model"] = ["902", 0]
    browser.open()
    browser.problems()  # the page's own, of ComfyUI's template
    browser.load_api(plain, "plain")
    model = plain[sampler]["inputs"]["model"][0]
    assert "before 2 sampler(s)." in run(browser)
    assert accelerated(browser.api_graph()) == [(model, {sampler, second})]
    assert browser.problems() == []


def test_a_model_of_our_own_loader_is_left_alone(browser: Browser):
    browser.open()
    browser.load_api(API["native_ksampler"], "native_ksampler")
    assert "Nothing to accelerate" in run(browser)
    assert browser.api_graph() == API["native_ksampler"]


def test_the_menu_has_it_in_both_languages(browser: Browser):
    found = "return app.extensionManager.command.commands.find(c => c.id === args[0])?.label"
    assert browser.js(found, COMMAND) == "Accelerate this workflow"
    for language in ("en", "zh"):
        label = json.loads((REPO / "locales" / language / "commands.json").read_text("utf-8"))[
            "QwenEditFast_Accelerate"
        ]
        served = browser.js("return (await (await fetch('/i18n')).json())[args[0]].commands.QwenEditFast_Accelerate",
                            language)  # fmt: skip
        assert served == label
