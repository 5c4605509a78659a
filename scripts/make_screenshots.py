"""Makes the pictures of ComfyUI's page in web/docs/pictures and the README files, in a headless Chromium.

    python scripts/make_screenshots.py --server http://127.0.0.1:8188

Needs Chromium with ChromeDriver, selenium, Pillow, and a font with Chinese characters. The server must run this pack, with
the demo model, for nobody else: the page's language and looks are changed, and left in English as they come.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

from browser import Browser, BrowserError
from comfy_host import REPO, run_as_script, say, write_atomically
from make_thumbnails import jpeg
from PIL import Image

PICTURES = REPO / "web" / "docs" / "pictures"
MAX_BYTES = 150_000
# Settings of the page, and how they come.
LOOKS = {
    "Comfy.Locale": "en",
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Minimap.Visible": True,
    "Comfy.Graph.CanvasInfo": True,
    "Comfy.Graph.CanvasMenu": True,
}
PLAIN = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False}
SET = """
for (const [type, name, value] of args[0])
  app.graph.nodes.find((node) => node.type === type).widgets.find((widget) => widget.name === name).value = value;
"""
VIEW = """
[app.canvas.ds.scale, app.canvas.ds.offset] = args;
app.canvas.deselectAll();
app.canvas.setDirty(true, true);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
while (document.querySelector(".p-toast-message")) await wait(200);
await wait(1500);
"""
Box = tuple[int, int, int, int]


def picture(browser: Browser, box: Box) -> Image.Image:
    """A part of the window, in pixels: left, top, right, bottom."""
    return Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB").crop(box)


def canvas(browser: Browser) -> Image.Image:
    """Lightning with another LoRA in its place: what was chosen, what is resident, and a warning."""
    browser.open_template("lightning")
    demo = "demo: qwen_edit_demo_pencil_sketch"
    browser.js(SET, [("QwenEditLoraSwitch", "lora_1", demo)])
    browser.run(180)
    browser.js(VIEW, 0.72, [-270, 200])
    return picture(browser, (70, 95, 1270, 795))


def timing(browser: Browser) -> Image.Image:
    """The Timing panel after a cold and a warm run, beside the chart on its node."""
    browser.open_template("measure_my_card")
    browser.js("await app.api.fetchApi('/free', { method: 'POST', body: JSON.stringify({ unload_models: true }) })")
    for seed in (1, 2):
        browser.js(SET, [("QwenEditSampler", "seed", seed)])
        browser.run(180)
    browser.js("await app.extensionManager.command.execute('Workspace.ToggleSidebarTab.qwen-edit-perf')")
    left, top = browser.js("return [...app.graph.nodes.find((node) => node.type === 'QwenEditPerfReport').pos]")
    browser.js(VIEW, 0.76, [515 - left, 160 - top])
    return picture(browser, (0, 38, 800, 848))


def help_page(browser: Browser) -> Image.Image:
    """A node, its ⓘ, and the page that it opens."""
    browser.js("""
        app.graph.clear();
        const node = LiteGraph.createNode("QwenEditLoraSwitch");
        app.graph.add(node);
        node.pos = [760, 200];
        [app.canvas.ds.scale, app.canvas.ds.offset] = [1, [0, 0]];
        app.canvas.selectNode(node);
    """)
    browser.wait(
        "const button = document.querySelector('[data-testid=info-button]'); button?.click(); return button", 10
    )
    browser.wait("return document.querySelector('.node-help-content img')?.naturalWidth", 10)
    return picture(browser, (700, 90, 1600, 690))


SHOWN: dict[str, tuple[Callable[[Browser], Image.Image], dict[str, object]]] = {
    "canvas": (canvas, {}),
    "canvas_nodes2": (canvas, {"Comfy.VueNodes.Enabled": True}),
    "canvas_zh": (canvas, {"Comfy.Locale": "zh"}),
    "timing": (timing, {}),
    "help": (help_page, {}),
}


def main() -> int:
    """Make all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=PICTURES, metavar="PATH", help="a folder (default: %(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SHOWN)}")
    options = parser.parse_args()
    with Browser(options.server) as browser:
        try:
            for name in options.names or SHOWN:
                show, looks = SHOWN[name]
                for setting, value in (LOOKS | PLAIN | looks).items():
                    browser.set(setting, value)
                browser.open()
                path = options.output / f"{name}.jpg"
                write_atomically(path, jpeg(show(browser), MAX_BYTES))
                say(f"Wrote {path} ({path.stat().st_size} bytes)")
        finally:
            for setting, value in LOOKS.items():
                browser.set(setting, value)
    return 0


if __name__ == "__main__":
    run_as_script(main, BrowserError)
