"""What the extension costs the canvas: time to draw a frame with 100 of the pack's nodes that have run, with and without its
badges.

    python benchmarks/canvas.py --server http://127.0.0.1:8188 [--nodes 100] [--draws 60]

Real Chromium on a running ComfyUI with this pack. Without: the same nodes with the badges of the extension taken off.
With and without take turns. Prints JSON: medians of a whole redraw in ms, and the bytes of the extension's files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from browser import Browser, BrowserError
from comfy_host import REPO, run_as_script

TYPES = ("QwenEditSampler", "QwenEditLoraSwitch", "QwenEditLoader", "QwenEditStepPreset")
FILL = """
const [types, count] = args;
app.graph.clear();
for (let index = 0; index < count; index++) {
  const node = LiteGraph.createNode(types[index % types.length]);
  node.pos = [(index % 10) * 340, Math.floor(index / 10) * 320];
  app.graph.add(node);
  node.onExecuted({ text: ["Warning: as after a run"], chosen: ["2511 · bf16 · cudnn"] });
}
app.canvas.ds.scale = 0.45;
app.canvas.ds.offset = [50, 80];
window.qwenEditBadges = app.graph._nodes.map((node) => node.badges);
"""
DRAW = """
const [withBadges, draws] = args;
app.graph._nodes.forEach((node, index) => {
  const all = window.qwenEditBadges[index];
  node.badges = withBadges ? all : all.slice(0, 1);
});
const times = [];
for (let index = 0; index < draws; index++) {
  app.canvas.setDirty(true, true);
  const begin = performance.now();
  app.canvas.draw(true, true);
  times.push(performance.now() - begin);
}
return times;
"""


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=100, metavar="N")
    parser.add_argument("--draws", type=int, default=60, metavar="N", help="redraws of each kind")
    options = parser.parse_args()
    times: dict[bool, list[float]] = {True: [], False: []}
    with Browser(options.server) as browser:
        browser.open()
        browser.js(FILL, TYPES, options.nodes)
        browser.js(DRAW, True, 5)  # fonts and text widths
        for turn in range(6):
            times[turn % 2 == 0] += browser.js(DRAW, turn % 2 == 0, options.draws // 3)
    result = {
        "nodes": options.nodes,
        "redraw_with_ms": round(statistics.median(times[True]), 2),
        "redraw_without_ms": round(statistics.median(times[False]), 2),
        "extension_bytes": sum(path.stat().st_size for path in (REPO / "web" / "js").glob("*.js")),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_as_script(main, BrowserError)
