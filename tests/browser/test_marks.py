"""What a run found stands on the nodes, on the classic canvas and in Nodes 2.0, and nowhere else."""

import json
from collections.abc import Iterator

import pytest
from browser import Browser
from comfy_host import REPO
from seen import in_nodes_2, on_canvas

pytestmark = [pytest.mark.server, pytest.mark.slow]

LOADER, SAMPLER, LORA_SWITCH = 1, 5, 9
FINDINGS = {
    language: json.loads((REPO / "locales" / language / "main.json").read_text("utf-8"))["qwenEditFast"]["findings"]
    for language in ("en", "zh")
}
# Marks whose element is seen, where it belongs.
DRAWN_IN_NODE = """
return [...document.querySelectorAll("[data-qwen-edit-mark]")].filter((mark) => {
  const [own, around] = [mark, mark.closest("[data-node-id]") ?? mark.parentElement].map((one) => one.getBoundingClientRect());
  return own.height > 0 && own.top >= around.top && own.bottom <= around.bottom && own.right <= around.right;
}).length
"""
SET = "app.graph.getNodeById(args[0]).widgets.find((widget) => widget.name === args[1]).value = args[2]"


@pytest.fixture(params=[False, True], ids=["classic canvas", "Nodes 2.0"])
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[tuple[Browser, bool]]:
    """The page, and whether it shows Nodes 2.0."""
    browser.set("Comfy.VueNodes.Enabled", request.param)
    browser.open()
    yield browser, request.param
    browser.set("Comfy.VueNodes.Enabled", False)
    browser.set("Comfy.Locale", "en")
    browser.open()


def our_inputs(browser: Browser) -> dict:
    return {
        key: node["inputs"] for key, node in browser.api_graph().items() if node["class_type"].startswith("QwenEdit")
    }


def wait_for(page: tuple[Browser, bool], node: int, words: str) -> list[str]:
    """What is seen on a node, once the words are; the page draws a moment after a run has ended."""
    browser, nodes_2 = page
    look = in_nodes_2 if nodes_2 else on_canvas
    for _ in range(50):
        if any(one.startswith(words) for one in look(browser, node)):
            break
        browser.js("await new Promise((done) => setTimeout(done, 200))")
    return look(browser, node)


def test_findings_the_choice_and_resident_loras_stand_on_the_nodes_until_they_are_solved(page: tuple[Browser, bool]):
    """Lightning's preset without its LoRA is worth a warning."""
    browser, nodes_2 = page
    browser.problems()
    browser.open_template("lightning")
    demo = browser.js(
        "return app.graph.getNodeById(args[0]).widgets.find((widget) => widget.name === 'lora_1')"
        ".options.values.find((value) => value.startsWith('demo: '))",
        LORA_SWITCH,
    )
    browser.js(SET, LORA_SWITCH, "lora_1", demo)
    saved = browser.js("return JSON.stringify(app.graph.serialize().nodes.map((n) => n.widgets_values))")
    queued = our_inputs(browser)
    warning = f"⚠ {FINDINGS['en']['lightning-missing']}"
    settings = "4 steps · no CFG · dyn. shift"
    assert settings in wait_for(page, SAMPLER, settings)

    browser.run(180)
    shown = wait_for(page, SAMPLER, warning)
    assert warning in shown
    assert settings in shown
    assert any(one.startswith("resident: 1 (") for one in wait_for(page, LORA_SWITCH, "resident"))
    assert "2511 · fp32 · pytorch" in wait_for(page, LOADER, "2511 ·")
    assert browser.js("return JSON.stringify(app.graph.serialize().nodes.map((n) => n.widgets_values))") == saved
    assert our_inputs(browser) == queued
    # In one place: within the node in Nodes 2.0, above it on the classic canvas.
    assert browser.js(DRAWN_IN_NODE) == (3 if nodes_2 else 0)

    browser.js(SET, SAMPLER, "preset", "standard")
    browser.js(SET, SAMPLER, "steps", 2)
    browser.run(180)
    shown = wait_for(page, SAMPLER, "2 steps · CFG 4 · dyn. shift")
    assert "2 steps · CFG 4 · dyn. shift" in shown
    assert warning not in shown
    assert browser.problems() == []


def test_findings_speak_chinese(page: tuple[Browser, bool]):
    browser, nodes_2 = page
    browser.set("Comfy.Locale", "zh")
    browser.open()
    browser.load_api(json.loads((REPO / "workflows" / "api" / "lightning.json").read_text("utf-8")), "lightning")
    browser.run(180)
    warning = f"⚠ {FINDINGS['zh']['lightning-missing']}"
    shown = wait_for(page, SAMPLER, warning)
    assert warning in shown
    assert "4 步 · 无 CFG · 动态偏移" in shown
    assert ("报告" in shown) == nodes_2


def test_a_fallback_stands_on_the_node_with_its_reason_until_a_run_without_one(page: tuple[Browser, bool]):
    """What falls back on the CPU falls back when it is loaded; here the page is told in the middle of a run, as on a card."""
    browser, nodes_2 = page
    browser.problems()
    browser.open_template("lightning")
    browser.js(SET, SAMPLER, "seed", 100 + nodes_2)  # no other test's, or ComfyUI answers from its cache
    reason = "Out of memory: trying once more with the MLPs in parts, which is a little slower."
    browser.js(
        """
        const told = ({ detail }) => {
          if (detail.node !== "5") return;
          app.api.removeEventListener("progress", told);
          app.api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId: "5", text: args[0] } }));
        };
        app.api.addEventListener("progress", told);
        """,
        reason,
    )
    report = "return app.graph.getNodeById(5).widgets.find((widget) => widget.name === 'report').value"
    browser.run(180)
    assert "↷ fallback" in wait_for(page, SAMPLER, "↷")
    assert browser.js(report).endswith(f"\n{reason}")
    browser.js(SET, SAMPLER, "preset", "standard")
    browser.js(SET, SAMPLER, "steps", 2)
    browser.run(180)
    shown = wait_for(page, SAMPLER, "2 steps")
    assert "↷ fallback" not in shown
    assert reason not in browser.js(report)
    assert browser.problems() == []
