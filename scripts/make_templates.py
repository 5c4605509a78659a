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
from dataclasses import dataclass
from typing import Any

from browser import Browser, BrowserError
from comfy_host import REPO, run_as_script, say, write_atomically

WORKFLOWS = REPO / "workflows"
HUB = "https://huggingface.co/Comfy-Org"
MODEL_NOTE = """
**Model.** The small demo model runs anywhere and knows a few simple edits, at about 0.07 megapixels. \
With the real weights, choose them in *Load the model* and set *megapixels* to 1.0."""


@dataclass(frozen=True)
class Layout:
    """Columns from left to right: a title, and the ids of the nodes from top to bottom."""

    note: str
    columns: tuple[tuple[str, tuple[int, ...]], ...]
    models: tuple[
        tuple[int, str], ...
    ] = ()  # node, address of the file that it names: the page offers it where it lacks


LAYOUTS = {
    "single_edit": Layout(
        """# Single edit

One picture, one instruction.

1. Choose your picture in *Load picture*.
2. Type what to change in *Instruction*.
3. Run.

The result has the size and place of your picture. *Where the time went* shows what each stage cost.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Result", (6, 7, 8)),
            ("Measurement", (10, 9)),
        ),
    ),
    "lightning": Layout(
        """# Lightning

Four steps without guidance: about a twentieth of the work of *standard*.

1. Put *Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors* into *models/loras*.
2. Choose it in *The Lightning LoRA goes here*.
3. Run. For the 8-step LoRA, choose the preset *Lightning 8*.

A checkpoint with Lightning in it needs no LoRA. Without either, as here with the demo model, the sampler warns.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Lightning", (9, 5)),
            ("Result", (6, 7, 8)),
            ("Before and after", (10,)),
        ),
    ),
    "small_card": Layout(
        """# Small card

For cards below 16 GB. Profile *auto* takes the most exact precision that fits (4 bit on these cards), the text encoder \
leaves the card after encoding, and the picture is decoded in tiles. A transformer that still does not fit is streamed \
from RAM; offload *stream* asks for that.

4 bit is visibly less exact than 8 bit.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Result", (6, 7, 8)),
            ("Before and after", (10,)),
        ),
    ),
    "official_2511_accelerated": Layout(
        """# ComfyUI's own 2511 workflow and one node more

Everything is ComfyUI's own, with the settings of its template for 2511: shift 3.1, CFGNorm, euler, simple, 40 steps, \
CFG 4. *Accelerate* stands between CFGNorm and KSampler. In a workflow of your own, put it in the same place.

Bypass it (Ctrl-B) to compare. What it does not honour runs natively, and it says so.

This one needs the real files; ComfyUI offers those that you lack. It does not run with the demo model.
""",
        (
            ("Models", (1, 2, 3)),
            ("Picture", (4, 5, 10)),
            ("Instruction", (6, 7)),
            ("Model settings", (8, 9, 11, 12)),
            ("The one node more", (13,)),
            ("Edit", (14, 15)),
            ("Result", (16, 17)),
        ),
        (
            (1, f"{HUB}/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/{{}}"),
            (2, f"{HUB}/HunyuanVideo_1.5_repackaged/resolve/main/split_files/text_encoders/{{}}"),
            (3, f"{HUB}/Qwen-Image_ComfyUI/resolve/main/split_files/vae/{{}}"),
        ),
    ),
    "three_references": Layout(
        """# Three references

One instruction that uses up to three pictures. Name them *picture 1*, *picture 2* and *picture 3*.

The result has the size of picture 1. The model was trained with up to three pictures; the demo model with up to two, \
so what it makes of three is a surprise.
"""
        + MODEL_NOTE,
        (
            ("Model and pictures", (1, 2, 3, 10)),
            ("Instruction", (4, 5)),
            ("Edit", (6,)),
            ("Result", (7, 8, 9)),
        ),
    ),
    "two_references": Layout(
        """# Two references

One instruction that uses two pictures. Name them *picture 1* and *picture 2*.

The result has the size of picture 1. More pictures: connect them to the next free input of *Instruction*; \
the model was trained with up to three.
"""
        + MODEL_NOTE,
        (
            ("Model and pictures", (1, 2, 3)),
            ("Instruction", (4, 5)),
            ("Edit", (6,)),
            ("Result", (7, 8, 9)),
        ),
    ),
    "list_of_pictures": Layout(
        """# A list of pictures with a prompt each

*List of pictures* and *List of prompts* have the same length: picture 1 gets prompt 1, and so on. One prompt \
for all pictures: type it into *Instructions* instead of the link.

The pictures may have different sizes. They are edited one after the other, each as if it were alone.
"""
        + MODEL_NOTE,
        (
            ("Model", (1,)),
            ("Pictures", (2, 3, 4)),
            ("Prompts", (6, 7, 8)),
            ("Lists and instructions", (5, 9, 10, 11)),
            ("Edit", (12,)),
            ("Results", (13, 14, 15)),
        ),
    ),
    "draft_then_high_quality": Layout(
        """# Draft, then high quality

Both samplers start from the same seed and the same encoded instruction, so encoding is done once.

1. Select the high quality nodes and press Ctrl-B to bypass them.
2. Try seeds with the draft until you like one.
3. Press Ctrl-B again and run: the same seed with 60 steps.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction and seed", (3, 4, 5)),
            ("Draft", (6, 7, 8, 9)),
            ("High quality", (10, 11, 12, 13)),
        ),
    ),
    "lora_switching": Layout(
        """# LoRA switching

Two branches of one model with different LoRAs. A LoRA is read once and stays resident: switching it on or off, \
or changing its strength, loads nothing and changes no weights.

Strength 0 keeps a LoRA resident but off. Put your own LoRAs into *models/loras*.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("LoRAs", (5, 10)),
            ("Edit", (6, 11)),
            ("Sketch", (7, 8, 9)),
            ("Warm film", (12, 13, 14)),
        ),
    ),
    "large_picture_with_mask": Layout(
        """# Large picture with mask

The picture is reduced to a size the model likes, edited, and brought back. Outside the mask every pixel is the \
source's own; the seam is feathered inside the mask.

To paint your own mask, right-click *Load picture and mask* and choose *Open in MaskEditor*. What you paint is \
where the edit may show. Connect an upscale model to *Back to size* to enlarge the edit with it.
"""
        + MODEL_NOTE,
        (
            ("Model, picture and mask", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Result", (6, 7, 8)),
            ("Before and after", (9,)),
        ),
    ),
    "native_ksampler": Layout(
        """# With ComfyUI's KSampler

*Preset for native samplers* sets the model's time shift and guidance for ComfyUI's own samplers. KSampler takes \
its steps and cfg; keep *euler* and *simple*. For SamplerCustom, use its SIGMAS instead.

The result is that of Qwen Edit Sampler with the same preset and seed.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Preset and KSampler", (5, 6)),
            ("Result", (7, 8, 9)),
        ),
    ),
    "batch_of_edits": Layout(
        """# A batch of edits

1. Put a folder of pictures, or a manifest (.csv, .jsonl) with one edit on each line, into ComfyUI's *input* folder.
2. Type its name into *source*. Empty: every picture that lies directly in the input folder.
3. Run. Results appear in *output* as they finish; bad items are listed in *Report* and skipped.

Cancel whenever you like. Run again, and it goes on where it was. Keep the seed fixed: another seed makes new results.
"""
        + MODEL_NOTE,
        (
            ("Model", (1,)),
            ("Batch", (2,)),
            ("Report", (3,)),
        ),
    ),
    "measure_my_card": Layout(
        """# Measure my card

One edit, and a chart of where its time went: per stage, node and step, beside earlier runs, with memory over time and one \
line on what to try.

1. Run. The first run also loads the model.
2. Change the seed and run again: the warm time, beside the cold one.
3. Open *Timing* in the sidebar for the runs so far, and their numbers as JSON or CSV.

The report measures every node of the graph, ComfyUI's own too. Put it into any workflow: it takes a picture and hands it on.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Edit", (5,)),
            ("Result", (6, 7, 8)),
            ("Measurement", (9,)),
        ),
    ),
    "step_sweep": Layout(
        """# Step sweep

The same edit with 4, 8, 12, 20 and 40 steps: what each costs in time, how near it comes to the longest, and where more steps \
stop paying.

Write numbers of steps or names of presets into *sweep*, as *draft, standard, Lightning 8*. Each picture is the one that Qwen \
Edit Sampler makes with the same seed.
"""
        + MODEL_NOTE,
        (
            ("Model and picture", (1, 2)),
            ("Instruction", (3, 4)),
            ("Sweep", (5,)),
            ("Pictures", (6,)),
        ),
    ),
}

ARRANGE = """
const [note, columns] = args;
const WIDTH = {QwenEditLoader: 320, LoadImage: 300, QwenEditEncode: 400, QwenEditSmartResize: 320, QwenEditBatch: 420, PreviewAny: 400, SaveImage: 340,
               PreviewImage: 340, ImageCompare: 360, QwenEditPerfLogger: 420, QwenEditLoraSwitch: 380, PrimitiveStringMultiline: 320,
               QwenEditPerfReport: 480, QwenEditStepSweep: 480, QwenEditSampler: 360, QwenEditStepPreset: 360};
const HEIGHT = {LoadImage: 330, SaveImage: 360, PreviewImage: 330, ImageCompare: 390, QwenEditPerfLogger: 330, QwenEditEncode: 330,
                PrimitiveStringMultiline: 110, QwenEditBatch: 620, PreviewAny: 300, QwenEditPerfReport: 900, QwenEditStepSweep: 860};
const REPORT = 90, PREVIEW = 220;  // what a node grows by when it has reported, and while it shows a preview
const GAP = 40, TITLE = 30, PAD = 15, TOP = 60;
const graph = app.graph;
function place(node, x, y, width) {
  const least = node.computeSize();
  node.setSize([width, Math.max(least[1], HEIGHT[node.type] ?? 0)]);
  node.pos = [x, y + TITLE];
  let next = y + TITLE + node.size[1] + 30;
  if (node.type.startsWith("QwenEdit") && node.type !== "QwenEditPerfLogger") next += REPORT;
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
text.setSize([340, 420]);
text.pos = [x, TITLE];
x += 340 + GAP + PAD;
for (const [title, ids] of columns) {
  const nodes = ids.map((id) => graph.getNodeById(id));
  const width = Math.max(...nodes.map((n) => Math.max(n.computeSize()[0], WIDTH[n.type] ?? 270)));
  let y = 0;
  for (const node of nodes) y = place(node, x, y, width);
  group(title, x, 0, width, y - 10);
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
    graph["extra"] = {}
    return graph


def build(browser: Browser, name: str) -> dict[str, Any]:
    """One workflow in UI format. Raises BrowserError when it would not queue what the API file says."""
    layout = LAYOUTS[name]
    workflow = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    browser.load_api(workflow, name)
    graph = json.loads(browser.js(ARRANGE, layout.note, layout.columns))
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
