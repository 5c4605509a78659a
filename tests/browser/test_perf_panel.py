"""The performance panel in ComfyUI's page: empty, live while a run goes on, finished, chosen, downloaded, in Chinese."""

import csv
import io
import json
import urllib.request

import pytest
from browser import Browser
from comfy_client import ComfyClient
from comfy_host import REPO

pytestmark = [pytest.mark.server, pytest.mark.slow]

API = json.loads((REPO / "workflows" / "api" / "measure_my_card.json").read_text("utf-8"))
TEXTS = {
    language: json.loads((REPO / "locales" / language / "main.json").read_text("utf-8"))["qwenEditPerf"]
    for language in ("en", "zh")
}
OPEN = "await app.extensionManager.command.execute('Workspace.ToggleSidebarTab.qwen-edit-perf')"
PANEL = "document.querySelector('.qwen-edit-perf')"
MAX_WEB_BYTES = 100_000


def open_panel(browser: Browser) -> None:
    browser.js(OPEN)
    browser.wait(f"return {PANEL}?.children.length > 0", 20)


def queue(browser: Browser, seed: int, steps: int) -> None:
    browser.js(
        """
        for (const [name, value] of [["seed", args[0]], ["steps", args[1]]])
          app.graph._nodes.find((n) => n.type === "QwenEditSampler").widgets.find((w) => w.name === name).value = value;
        await app.queuePrompt(0, 1);
        """,
        seed,
        steps,
    )


def wait_until_done(browser: Browser, runs: int) -> None:
    browser.wait(
        f"return {PANEL}.querySelector('[data-state=success]') && {PANEL}.querySelectorAll('.run').length === args[0]",
        120,
        runs,
    )


def test_the_panel_follows_a_run_and_keeps_it(browser: Browser, tmp_path):
    browser.open()
    browser.problems()
    browser.js("app.graph.clear()")
    open_panel(browser)
    assert TEXTS["en"]["empty"] in browser.js(f"return {PANEL}.textContent")
    browser.js(f"{PANEL}.querySelector('button').click()")
    assert browser.js("return app.graph._nodes.map((n) => n.type)") == ["QwenEditPerfReport"]

    browser.open_template("measure_my_card")
    browser.js(f"""
        window.states = new Set();
        window.watching = setInterval(() => {{
          const panel = {PANEL};
          const state = panel?.querySelector("[data-state]")?.dataset.state;
          if (state) window.states.add(state);
          const now = panel?.querySelector(".now")?.textContent;
          if (now?.includes("40")) window.states.add("steps");
        }}, 20);
    """)
    queue(browser, seed=1, steps=40)
    wait_until_done(browser, 1)
    queue(browser, seed=2, steps=6)
    wait_until_done(browser, 2)
    assert {"running", "success", "steps"} <= set(
        browser.js("clearInterval(window.watching); return [...window.states]")
    )

    shown = browser.js(f"return {PANEL}.innerText")
    record = json.loads(urllib.request.urlopen(f"{browser.url}/qwen_edit/perf").read())["runs"][0]
    assert record["advice"]["sentence"] in shown
    assert browser.js(f"return {PANEL}.querySelectorAll('svg rect').length") == 6
    assert browser.js("""
        const node = app.graph._nodes.find((n) => n.type === "QwenEditPerfReport");
        return node.imgs?.[0]?.naturalWidth ?? null""") in (900, None)
    # widths of the stages fill the bar
    widths = browser.js(
        f"return [...{PANEL}.querySelector('.bar').children].map((part) => parseFloat(part.style.width))"
    )
    assert sum(widths) == pytest.approx(100, abs=0.5)

    for form in ("json", "csv"):
        link = browser.js(f"return [...{PANEL}.querySelectorAll('a.button')].map((a) => [a.href, a.download])")
        href, name = next(pair for pair in link if pair[1].endswith(form))
        text = browser.js("return await (await fetch(args[0])).text()", href)
        if form == "json":
            assert json.loads(text)["prompt_id"] == record["prompt_id"]
        else:
            assert float(next(csv.DictReader(io.StringIO(text)))["ms"]) == record["wall_ms"]
        assert name.startswith("qwen_edit_perf_2")

    # the first run is chosen: its 40 steps are shown, and the nodes that the second took from the cache
    browser.js(f"{PANEL}.querySelectorAll('.run')[1].click()")
    browser.wait(f"return {PANEL}.querySelectorAll('svg rect').length === 40", 10)
    shown = browser.js(f"return {PANEL}.innerText")
    for title in ("Qwen Edit Sampler", "VAE Decode", "Load Image", "Save Image", TEXTS["en"]["between"]):
        assert title in shown, title
    assert browser.js(f"return {PANEL}.querySelectorAll('.run')[1].getAttribute('aria-pressed')") == "true"
    browser.screenshot(tmp_path / "panel.png")
    assert browser.problems() == []


def test_the_panel_speaks_chinese(browser: Browser, tmp_path):
    browser.set("Comfy.Locale", "zh")
    try:
        browser.open()
        browser.problems()  # leaving the graph of the test before is complained about
        with ComfyClient(browser.url) as client:
            client.upload(REPO / "web" / "examples" / "qwen_edit_astronaut.png")
        browser.load_api(API, "measure_my_card")
        queue(browser, seed=3, steps=4)
        open_panel(browser)
        texts = [TEXTS["zh"][key] for key in ("nodes", "runs", "memory", "export", "between")]
        texts += [TEXTS["zh"]["stages"]["denoise"], "Qwen 编辑"]
        # of one moment: until this run begins the panel shows the one before
        browser.wait(
            f"const shown = {PANEL}.innerText; return {json.dumps(texts)}.every((text) => shown.includes(text))", 120
        )
        browser.screenshot(tmp_path / "panel_zh.png")
        assert browser.problems() == []
        queue(browser, seed=4, steps=60)
        browser.wait(f"return {PANEL}.querySelector('.now')?.textContent.includes('60')", 60)
        browser.js("await app.api.interrupt()")
        browser.wait(f"return {PANEL}.querySelector('.advice')?.textContent.includes('（已取消）')", 60)
    finally:
        browser.set("Comfy.Locale", "en")
        browser.open()


def test_the_scripts_of_the_page_stay_small():
    assert sum(path.stat().st_size for path in (REPO / "web" / "js").rglob("*.js")) < MAX_WEB_BYTES
