// Badges on the pack's nodes: the effective settings of a preset, resident LoRAs, and what went otherwise than asked
// for. Presets and texts come from the server; nothing is written into widgets. `badges` of a node is ComfyUI's own
// list, drawn by the classic canvas and by Nodes 2.0.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const COLOURS = { settings: "#2f4f6f", resident: "#3d4f3d", warnings: "#8a4b08", notes: "#4a4a5a", fallback: "#7a5a00" };
const PRESET_NODES = ["QwenEditSampler", "QwenEditStepPreset"];
const OVERRIDES = ["steps", "true_cfg_scale", "shift"];
const LORA_NODE = "QwenEditLoraSwitch";

let recipes = {};
let texts = {};

const text = (key, values = {}) =>
  Object.entries(values).reduce((line, [name, value]) => line.replace(`{${name}}`, value), texts[key] ?? key);

function setBadge(node, kind, words) {
  const own = (node.qwenEditBadges ??= {});
  if ((own[kind]?.text ?? "") === words) return;
  const others = node.badges.filter((badge) => badge !== own[kind]);
  if (words) own[kind] = new LGraphBadge({ text: words, fgColor: "#ffffff", bgColor: COLOURS[kind] });
  else delete own[kind];
  const oldValue = node.badges;
  node.badges = words ? [...others, own[kind]] : others;
  // Nodes 2.0 draws from a copy, which this refreshes.
  node.graph?.trigger?.("node:property:changed", {
    type: "node:property:changed",
    nodeId: node.id,
    property: "badges",
    oldValue,
    newValue: node.badges,
  });
  node.setDirtyCanvas(true, true);
}

// An override of 0 keeps the preset's value. What comes through a link is known only when the node has run.
function showSettings(node) {
  const inputs = ["preset", ...OVERRIDES];
  const linked = node.inputs?.some((input) => inputs.includes(input.widget?.name) && input.link != null);
  const value = (name) => node.widgets?.find((widget) => widget.name === name)?.value;
  const recipe = recipes[value("preset")];
  if (linked || !recipe) return setBadge(node, "settings", "");
  const [steps, cfg, shift] = OVERRIDES.map((name) => value(name) || recipe[name]);
  const parts = [
    text("steps", { steps }),
    cfg === 1 ? text("noCfg") : text("cfg", { cfg: +cfg.toFixed(2) }),
    shift ? text("shift", { shift: +shift.toFixed(2) }) : text("dynamicShift"),
  ];
  setBadge(node, "settings", parts.join(" · "));
}

function followSettings(node) {
  for (const widget of node.widgets ?? []) {
    if (widget.name !== "preset" && !OVERRIDES.includes(widget.name)) continue;
    const callback = widget.callback;
    widget.callback = function () {
      const result = callback?.apply(this, arguments);
      showSettings(node);
      return result;
    };
  }
  for (const event of ["onConfigure", "onConnectionsChange", "onAdded"]) {
    const before = node[event];
    node[event] = function () {
      before?.apply(this, arguments);
      showSettings(this);
    };
  }
}

async function showResident(node) {
  const answer = await api.fetchApi("/qwen_edit/loras");
  if (!answer.ok) return;
  const loras = await answer.json();
  const mib = loras.reduce((sum, lora) => sum + lora.mib, 0).toFixed(1);
  setBadge(node, "resident", loras.length ? text("resident", { count: loras.length, mib }) : "");
}

const count = (lines, start) => lines.filter((line) => line.startsWith(start)).length;

function showFindings(node, lines) {
  for (const [kind, start] of [["warnings", "Warning:"], ["notes", "Note:"]]) {
    const found = count(lines, start);
    setBadge(node, kind, found ? text(kind, { count: found }) : "");
  }
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

const split = (said) => [said].flat().filter(Boolean).join("\n").split("\n");

app.registerExtension({
  name: "QwenEditFast.Badges",

  async setup() {
    const [answer, i18n] = await Promise.all([api.fetchApi("/qwen_edit/recipes"), api.fetchApi("/i18n")]);
    const language = app.extensionManager.setting.get("Comfy.Locale");
    const translations = i18n.ok ? await i18n.json() : {};
    texts = { ...translations.en?.qwenEditFast?.badges, ...translations[language]?.qwenEditFast?.badges };
    if (answer.ok) recipes = await answer.json();
    for (const node of app.graph?.nodes ?? []) if (PRESET_NODES.includes(node.comfyClass)) showSettings(node);

    // What a node of ours says while it runs: findings, or that it goes on in another way than asked for.
    api.addEventListener("progress_text", ({ detail }) => {
      const node = nodeOf(detail.nodeId);
      if (!node?.comfyClass?.startsWith("QwenEdit")) return;
      const lines = split(detail.text);
      if (count(lines, "Warning:") + count(lines, "Note:")) showFindings(node, lines);
      else setBadge(node, "fallback", text("fallback"));
    });
    api.addEventListener("executing", ({ detail }) => {
      const node = detail && nodeOf(detail);
      if (node?.qwenEditBadges) setBadge(node, "fallback", "");
    });
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("QwenEdit")) return;
    if (PRESET_NODES.includes(node.comfyClass)) followSettings(node);
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      showFindings(this, split(output?.text));
      if (this.comfyClass === LORA_NODE) showResident(this);
    };
  },
});
