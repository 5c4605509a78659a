// What a run found, as marks on the pack's nodes: what was chosen, what is resident, findings by name, and that a node went
// on in another way than asked for. On the classic canvas they are badges above the node. Nodes 2.0 draws badges anew only
// when a widget changes, and all in one row: there the marks are elements above the report, in a widget that is neither
// saved nor queued.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { known, loadTexts, text } from "./texts.js";

const MARKS = "marks";
const COLOURS = { chosen: "#2f4f6f", resident: "#3d4f3d", warning: "#8a4b08", note: "#4a4a5a", fallback: "#7a5a00" };
const SIGNS = { Warning: ["warning", "⚠"], Note: ["note", "ⓘ"] };
const LINE = /^(Warning|Note): (.*)/;
const PROGRESS = /: wrote |are in the weights now|whole transformer is on the card/; // said while all goes as asked for
const LORA_NODE = "QwenEditLoraSwitch";

function marksWidget(node) {
  const existing = node.widgets.find((widget) => widget.name === MARKS);
  if (existing) return existing;
  const element = document.createElement("div");
  element.style.cssText = "display: flex; flex-wrap: wrap; gap: 3px; overflow: hidden; pointer-events: none;";
  const widget = node.addDOMWidget(MARKS, "qwen_edit_marks", element, { serialize: false, margin: 0 }); // not queued
  widget.serialize = false; // not in the saved workflow
  // No height on the classic canvas, where they are badges, and no more than they need in Nodes 2.0.
  widget.computeSize = () => [0, -4];
  widget.computeLayoutSize = undefined;
  return widget;
}

function element(kind, words) {
  const one = document.createElement("span");
  one.textContent = words;
  one.dataset.qwenEditMark = kind;
  one.style.cssText = `padding: 1px 7px; border-radius: 8px; font: 11px sans-serif; color: #fff; background: ${COLOURS[kind]}`;
  return one;
}

const newBadge = (kind, words) => new LGraphBadge({ text: words, fgColor: "#ffffff", bgColor: COLOURS[kind] });

function badge(kind, words) {
  const [shown, none] = [newBadge(kind, words), newBadge(kind, "")]; // an empty one is not drawn
  return () => (LiteGraph.vueNodesMode ? none : shown);
}

// `changed`: a list of words for each kind.
function setMarks(node, changed) {
  const { words, badges } = (node.qwenEditMarks ??= { words: {}, badges: [] });
  Object.assign(words, changed);
  const marks = Object.entries(words).flatMap(([kind, all]) => all.map((one) => [kind, one]));
  marksWidget(node).element.replaceChildren(...marks.map((one) => element(...one)));
  const own = marks.map((one) => badge(...one));
  node.badges = [...node.badges.filter((one) => !badges.includes(one)), ...own];
  node.qwenEditMarks.badges = own;
  node.setDirtyCanvas(true, true);
}

export const linesOf = (said) => [said].flat().filter(Boolean).join("\n").split("\n");

// By the name of the finding where it has one in locales/*/main.json, else that there is one: the report has its sentence.
function findings(output) {
  const found = { warning: new Set(), note: new Set() };
  for (const line of linesOf(output?.text)) {
    const [, start, sentence] = line.match(LINE) ?? [];
    if (!start) continue;
    const [kind, sign] = SIGNS[start];
    const code = output.findings?.find((one) => one.sentence === sentence)?.code;
    found[kind].add(`${sign} ${text(known(code) ? code : kind)}`);
  }
  return { warning: [...found.warning], note: [...found.note] };
}

async function showResident(node) {
  const answer = await api.fetchApi("/qwen_edit/loras");
  if (!answer.ok) return;
  const loras = await answer.json();
  const mib = loras.reduce((sum, lora) => sum + lora.mib, 0).toFixed(1);
  setMarks(node, { resident: loras.length ? [text("resident", { count: loras.length, mib })] : [] });
}

// Once a node has run.
export function showMarks(node, output) {
  setMarks(node, { chosen: output?.chosen ?? [], ...findings(output) });
  if (node.comfyClass === LORA_NODE) showResident(node);
}

// Ids of nodes in subgraphs name the way to them: "170:12".
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "QwenEditFast.Marks",

  init: loadTexts,

  setup() {
    // What a node of ours says while it runs: findings, which it repeats in the end, or that it goes on in another way than
    // asked for.
    api.addEventListener("progress_text", ({ detail }) => {
      const node = nodeOf(detail.nodeId);
      if (!node?.comfyClass?.startsWith("QwenEdit")) return;
      const findings = linesOf(detail.text).some((line) => LINE.test(line));
      if (findings || PROGRESS.test(detail.text)) return;
      (node.qwenEditSaid ??= []).push(detail.text);
      setMarks(node, { fallback: [text("fallback")] });
    });
    api.addEventListener("executing", ({ detail }) => {
      const node = detail && nodeOf(detail);
      if (!node?.qwenEditSaid) return;
      delete node.qwenEditSaid;
      setMarks(node, { fallback: [] });
    });
  },
});
