// Badges on the pack's nodes: the effective settings of a preset, resident LoRAs, and what went otherwise than asked
// for. Presets and texts come from the server; nothing is written into widgets. `badges` of a node is ComfyUI's own
// list, drawn by the classic canvas and by Nodes 2.0, which refreshes only what depends on widgets: what a run found is
// there in the report on the node.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const COLOURS = { settings: "#2f4f6f", resident: "#3d4f3d", warnings: "#8a4b08", notes: "#4a4a5a", fallback: "#7a5a00" };
const PROGRESS = /: wrote |are in the weights now|whole transformer is on the card/; // said while all goes as asked for
const PRESET_NODES = ["QwenEditSampler", "QwenEditStepPreset"];
const OVERRIDES = ["steps", "true_cfg_scale", "shift"];
const LORA_NODE = "QwenEditLoraSwitch";

let recipes = {};
let texts = {};

const text = (key, values = {}) =>
  Object.entries(values).reduce((line, [name, value]) => line.replace(`{${name}}`, value), texts[key] ?? key);

const newBadge = (kind, words) => new LGraphBadge({ text: words, fgColor: "#ffffff", bgColor: COLOURS[kind] });

// What a run found. An empty badge is not drawn.
function setBadge(node, kind, words) {
  const own = (node.qwenEditBadges ??= {});
  if (own[kind]) own[kind].text = words;
  else if (words) node.badges.push((own[kind] = newBadge(kind, words)));
  node.setDirtyCanvas(true, true);
}

// An override of 0 keeps the preset's value.
function settings(preset, ...overrides) {
  const recipe = recipes[preset];
  if (!recipe) return "";
  const [steps, cfg, shift] = OVERRIDES.map((name, index) => overrides[index] || recipe[name]);
  const parts = [
    text("steps", { steps }),
    cfg === 1 ? text("noCfg") : text("cfg", { cfg: +cfg.toFixed(2) }),
    shift ? text("shift", { shift: +shift.toFixed(2) }) : text("dynamicShift"),
  ];
  return parts.join(" · ");
}

// A badge that follows the node's widgets: the classic canvas asks for it whenever it draws, so nothing is worked out
// twice; Nodes 2.0 asks when a widget that is read here has changed, and wants a new badge for new words.
function settingsBadge(node) {
  const names = ["preset", ...OVERRIDES];
  const widgets = names.map((name) => node.widgets.find((widget) => widget.name === name));
  const slots = node.inputs.filter((input) => names.includes(input.widget?.name));
  let shown = newBadge("settings", "");
  let known;
  return () => {
    const values = widgets.map((widget) => widget.value);
    // What comes through a link is known only when the node has run.
    const now = slots.some((slot) => slot.link != null) ? "linked" : values.join();
    if (now !== known) {
      known = now;
      shown = newBadge("settings", now === "linked" ? "" : settings(...values));
    }
    return shown;
  };
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

  async init() {
    const [answer, i18n] = await Promise.all([api.fetchApi("/qwen_edit/recipes"), api.fetchApi("/i18n")]);
    const language = app.extensionManager.setting.get("Comfy.Locale");
    const translations = i18n.ok ? await i18n.json() : {};
    texts = { ...translations.en?.qwenEditFast?.badges, ...translations[language]?.qwenEditFast?.badges };
    if (answer.ok) recipes = await answer.json();
  },

  setup() {
    // What a node of ours says while it runs: findings, or that it goes on in another way than asked for.
    api.addEventListener("progress_text", ({ detail }) => {
      const node = nodeOf(detail.nodeId);
      if (!node?.comfyClass?.startsWith("QwenEdit")) return;
      const lines = split(detail.text);
      if (count(lines, "Warning:") + count(lines, "Note:")) showFindings(node, lines);
      else if (!PROGRESS.test(detail.text)) setBadge(node, "fallback", text("fallback"));
    });
    api.addEventListener("executing", ({ detail }) => {
      const node = detail && nodeOf(detail);
      if (node?.qwenEditBadges) setBadge(node, "fallback", "");
    });
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("QwenEdit")) return;
    if (PRESET_NODES.includes(node.comfyClass)) node.badges.push(settingsBadge(node));
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      showFindings(this, split(output?.text));
      if (this.comfyClass === LORA_NODE) showResident(this);
    };
  },
});
