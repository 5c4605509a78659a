// What the canvas shows of Qwen Edit Fast beyond what ComfyUI shows by itself:
// the text that a node reports after it ran, and the example pictures of the pack's templates.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { linesOf, showMarks } from "./marks.js";
import { inOwnWords } from "./sentences.js";
import { text } from "./texts.js";

const REPORT = "report";
const lineHeight = () => (LiteGraph.vueNodesMode ? 15 : 12);
const CHARACTER_WIDTH = 6;
const width = (line) => line.replace(/[\u2e80-\uffff]/g, "  ").length; // in characters; Chinese ones are twice as wide
const PADDING = 26;
const EXAMPLES = ["astronaut", "cat", "coffee", "rocket"].map((name) => `qwen_edit_${name}.png`);
const uploaded = new Set();

function reportWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === REPORT);
  if (existing) return existing;
  const { widget } = app.widgets.STRING(node, REPORT, ["STRING", { multiline: true }], app);
  widget.label = text("report");
  widget.serialize = false; // not in the saved workflow
  widget.options.serialize = false; // not in what is queued
  widget.options.read_only = true;
  widget.options.getMinHeight = () => widget.reportHeight ?? lineHeight() + PADDING;
  widget.options.getMaxHeight = widget.options.getMinHeight;
  const element = widget.element ?? widget.inputEl;
  if (element) {
    element.readOnly = true;
    element.style.opacity = 0.75;
    element.style.lineHeight = `${lineHeight()}px`; // of Chinese lines too, which would be higher by themselves
  }
  return widget;
}

function showReport(node, lines) {
  const said = linesOf(lines).map(inOwnWords).join("\n");
  if (!said && !node.widgets?.some((widget) => widget.name === REPORT)) return;
  const widget = reportWidget(node);
  widget.value = said;
  const table = said.includes("  "); // columns are lined up with spaces
  const element = widget.element ?? widget.inputEl;
  if (element) {
    element.style.fontFamily = table ? "monospace" : "";
    element.style.whiteSpace = table ? "pre" : "";
  }
  const columns = Math.max(20, (node.size[0] - 40) / CHARACTER_WIDTH);
  const rows = said
    .split("\n")
    .reduce((sum, line) => sum + (table ? 1 : Math.max(1, Math.ceil(width(line) / columns))), 0);
  widget.reportHeight = rows * lineHeight() + PADDING;
  const least = node.computeSize();
  node.setSize([0, 1].map((side) => Math.max(node.size[side], least[side])));
  app.graph.setDirtyCanvas(true, true);
}

// What ComfyUI's page shows of a node that runs, and some versions of it ever after: the report has it too.
function removeProgressText(node) {
  const widget = node.widgets.find((one) => one.name === "$$node-text-preview");
  if (widget) node.removeWidget(widget);
}

// ComfyUI labels the slots of a growing input with their names, and a label hides the translation.
function showTranslatedSlots(node) {
  for (const input of node.inputs) if (input.label === input.name.split(".")[1]) delete input.label;
}

// The templates edit pictures that come with the pack. Load Image reads from ComfyUI's input folder, so a
// template that is opened puts its pictures there. ComfyUI keeps a file that is there already.
async function provideExample(name) {
  if (uploaded.has(name)) return;
  const file = await fetch(new URL(`../examples/${name}`, import.meta.url));
  if (!file.ok) return;
  const form = new FormData();
  form.append("image", await file.blob(), name);
  const answer = await api.fetchApi("/upload/image", { method: "POST", body: form });
  if (answer.ok && (await answer.json()).name === name) uploaded.add(name);
}

// %date:yyyy-MM-dd% and %Node.widget% are filled in by the page, which does it by itself for ComfyUI's own nodes only.
function fillInFileName(node) {
  const widget = node.widgets?.find((one) => one.name === "filename_prefix");
  const filled = window.comfyAPI?.utils?.applyTextReplacements;
  if (widget && filled) widget.serializeValue = () => filled(app, widget.value);
}

app.registerExtension({
  name: "QwenEditFast",

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("QwenEdit")) return;
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      showMarks(this, output);
      removeProgressText(this);
      // Why it went on in another way than asked for: said while it ran, and not in what it returns.
      showReport(this, [output?.text, this.qwenEditSaid].flat());
    };
    showTranslatedSlots(node);
    if (node.comfyClass === "QwenEditSave") fillInFileName(node);
    const onConnectionsChange = node.onConnectionsChange;
    node.onConnectionsChange = function () {
      onConnectionsChange?.apply(this, arguments);
      showTranslatedSlots(this); // a slot may have grown
    };
  },

  async beforeConfigureGraph(graph) {
    const wanted = (graph?.nodes ?? [])
      .filter((node) => node.type === "LoadImage")
      .map((node) => node.widgets_values?.[0])
      .filter((name) => EXAMPLES.includes(name));
    await Promise.all([...new Set(wanted)].map(provideExample));
  },

  loadedGraphNode(node) {
    if (node.comfyClass?.startsWith("QwenEdit")) showTranslatedSlots(node);
    if (node.type !== "LoadImage") return;
    const widget = node.widgets?.find((one) => one.name === "image");
    const offered = widget?.options?.values;
    if (Array.isArray(offered) && uploaded.has(widget.value) && !offered.includes(widget.value)) {
      offered.push(widget.value);
    }
  },
});
