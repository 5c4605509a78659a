"""Builds workflows/*.json, which ComfyUI's template browser offers, from workflows/api/*.json.

    python scripts/make_templates.py --server http://127.0.0.1:8188

ComfyUI's own page, in a headless Chromium, turns each workflow in API format into a graph; this script
adds places, groups and notes. Run it after a workflow in API format or the inputs of a node changed.
The server must run this pack, with the demo model.
"""

from __future__ import annotations

import argparse
import json
import uuid
from typing import Any

from browser import Browser, BrowserError
from comfy_host import REPO, run_as_script, say, write_atomically
from template_layouts import LAYOUTS

WORKFLOWS = REPO / "workflows"
ARRANGE = """
const [note, groups, below] = args;
const WIDTH = {QwenEditLoader: 320, QwenEditSampler: 360, QwenEditStepPreset: 360, LoadImage: 300, QwenEditEncode: 400,
               QwenEditSmartResize: 320, QwenEditBatch: 420, QwenEditPerfLogger: 420, QwenEditLoraSwitch: 370,
               QwenEditPerfReport: 480, QwenEditStepSweep: 480, PreviewAny: 400, SaveImage: 340, QwenEditSave: 340, PreviewImage: 340,
               ImageCompare: 360, PrimitiveStringMultiline: 320, UNETLoader: 330};
const HEIGHT = {LoadImage: 300, SaveImage: 300, QwenEditSave: 300, PreviewImage: 330, ImageCompare: 350, QwenEditPerfLogger: 330, QwenEditEncode: 330,
                PrimitiveStringMultiline: 110, QwenEditBatch: 620, PreviewAny: 300, QwenEditPerfReport: 900, QwenEditStepSweep: 860};
// What a node grows by when it has reported (others: 90), and while it shows a preview.
const REPORT = {QwenEditSave: 0, QwenEditLoraSwitch: 140, QwenEditBatch: 300, QwenEditEncode: 70};
const PREVIEW = 220;
const GAP = 40, TITLE = 30, PAD = 15, TOP = 60;
const graph = app.graph;
function place(node, x, y, width) {
  const least = node.computeSize();
  node.setSize([width, Math.max(least[1], HEIGHT[node.type] ?? 0)]);
  node.pos = [x, y + TITLE];
  let next = y + TITLE + node.size[1] + 30;
  if (node.type.startsWith("QwenEdit") && node.type !== "QwenEditPerfLogger") next += REPORT[node.type] ?? 90;
  if (node.type.endsWith("Sampler")) next += PREVIEW;
  return next;
}
function group(title, x, y, width, bottom) {
  const made = new LiteGraph.LGraphGroup(title);
  made.pos = [x - PAD, y - TOP];
  made.size = [width + 2 * PAD, bottom - y + TOP];
  graph.add(made);
}
let x = 0;
const text = LiteGraph.createNode("MarkdownNote");
graph.add(text);
text.title = "Read me";
text.widgets[0].value = note;
const underNote = below.includes(groups[0][0]);
text.setSize([340, 420]);
text.pos = [x, TITLE];
const columns = [];
for (const [title, ids] of groups) {
  if (!columns.length || !below.includes(title)) columns.push([]);
  columns.at(-1).push([title, ids.map((id) => graph.getNodeById(id))]);
}
if (!underNote) x += 340 + GAP + PAD;
for (const column of columns) {
  const nodes = column.flatMap(([, members]) => members);
  const width = Math.max(...nodes.map((n) => Math.max(n.computeSize()[0], WIDTH[n.type] ?? 270)));
  let y = 0;
  if (underNote && column === columns[0]) {
    text.setSize([width + 2 * PAD, 290]);
    text.pos = [x - PAD, TITLE];
    y = TITLE + text.size[1] + 20 + TOP;
  }
  for (const [title, members] of column) {
    const top = y;
    for (const node of members) y = place(node, x, y, width);
    group(title, x, top, width, y - 10);
    y += 10 + TOP;
  }
  x += width + GAP + 2 * PAD;
}
for (const node of graph._nodes) {
  for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
}
return JSON.stringify(graph.serialize());
"""


def tidy(name: str, graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with the same ids each time it is built, and without what the page works out by itself."""
    numbers = {link[0]: number for number, link in enumerate(sorted(graph["links"]), 1)}
    for link in graph["links"]:
        link[0] = numbers[link[0]]
    graph["links"].sort()
    for node in graph["nodes"]:
        for slot in node.get("inputs", []) + node.get("outputs", []):
            slot.pop("localized_name", None)
            if slot.get("link") is not None:
                slot["link"] = numbers[slot["link"]]
            if slot.get("links"):
                slot["links"] = sorted(numbers[link] for link in slot["links"])
    graph["nodes"].sort(key=lambda node: int(node["id"]))
    for number, group in enumerate(graph["groups"], 1):
        group["id"] = number
    graph["last_link_id"] = len(numbers)
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"qwen-edit-fast/{name}"))
    graph["extra"] = {"qwenEditTemplate": name}  # taken out by the page when the template is opened
    return graph


def build(browser: Browser, name: str) -> dict[str, Any]:
    """One workflow in UI format. Raises BrowserError when it would not queue what the API file says."""
    layout = LAYOUTS[name]
    workflow = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    browser.load_api(workflow, name)
    graph = json.loads(browser.js(ARRANGE, layout.note, layout.groups, layout.below))
    queued = browser.api_graph()
    if queued != workflow:
        wrong = [node for node in workflow if workflow[node] != queued.get(node)]
        raise BrowserError(
            f"{name}: the page would queue something else; nodes {', '.join(wrong)}: "
            f"{[queued.get(node) for node in wrong]}"
        )
    for number, address in layout.models:
        node = next(node for node in graph["nodes"] if int(node["id"]) == number)
        file, folder = node["widgets_values"][0], address.split("/")[-2]
        node["properties"]["models"] = [{"name": file, "url": address.format(file), "directory": folder}]
    return tidy(name, graph)


def main() -> int:
    """Build all templates, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    options = parser.parse_args()
    for name in options.names or LAYOUTS:
        # A browser for each, because previews of one graph make nodes of the next one taller.
        with Browser(options.server) as browser:
            browser.open()
            text = json.dumps(build(browser, name), indent=1, ensure_ascii=False) + "\n"
        path = WORKFLOWS / f"{name}.json"
        write_atomically(path, text.encode())
        say(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    run_as_script(main, BrowserError)
