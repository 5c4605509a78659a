// A badge on the nodes that have a preset: the steps, CFG and shift that will run. Presets come from the server; nothing
// is written into widgets. `badges` of a node is ComfyUI's own list, drawn by the classic canvas and by Nodes 2.0, which
// draws it anew only when a widget that a badge reads has changed: what a run finds is in marks.js.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { text } from "./texts.js";

const COLOUR = "#2f4f6f";
const PRESET_NODES = ["QwenEditSampler", "QwenEditStepPreset"];
const WIDTH = 360; // in Nodes 2.0 the badge stands in the node, beside the front end's own
const OVERRIDES = ["steps", "true_cfg_scale", "shift"];

let recipes = {};

const newBadge = (words) => new LGraphBadge({ text: words, fgColor: "#ffffff", bgColor: COLOUR });

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
  let shown = newBadge("");
  let known;
  return () => {
    const values = widgets.map((widget) => widget.value);
    // What comes through a link is known only when the node has run.
    const now = slots.some((slot) => slot.link != null) ? "linked" : values.join();
    if (now !== known) {
      known = now;
      shown = newBadge(now === "linked" ? "" : settings(...values));
    }
    return shown;
  };
}

app.registerExtension({
  name: "QwenEditFast.Badges",

  async init() {
    const answer = await api.fetchApi("/qwen_edit/recipes");
    if (answer.ok) recipes = await answer.json();
  },

  nodeCreated(node) {
    if (!PRESET_NODES.includes(node.comfyClass)) return;
    node.badges.push(settingsBadge(node));
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  },
});
