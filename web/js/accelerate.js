// A command of the menu and the command palette: Qwen Edit Accelerate before the samplers of a Qwen-Image model in the open
// workflow, its subgraphs included. What is fast already, other models and muted samplers are left alone.

import { app } from "../../../scripts/app.js";
import { text } from "./texts.js";

const ID = "QwenEditFast.Accelerate";
const NODE = "QwenEditAccelerate";
const SAMPLED = ["LATENT", "GUIDER"]; // what a node gives out that samples with the MODEL it takes
const MUTED = [2, 4]; // LiteGraph's modes of muted and bypassed nodes
const QWEN = /qwen/i;
const GAP = 30;
const REPORT = 110; // what the node grows by when it has run, and in Nodes 2.0 by its foot
const WIDTH = 300;

const graphs = () => [app.rootGraph, ...app.rootGraph.subgraphs.values()];

const isSampler = (node) =>
  node.comfyClass !== NODE &&
  !node.isSubgraphNode?.() &&
  !MUTED.includes(node.mode) &&
  node.outputs?.some(({ type }) => SAMPLED.includes(type));

// The input through which a node gets its MODEL, or undefined.
const modelInput = (node) => node.inputs?.find(({ type, link }) => type === "MODEL" && link != null);

// The nodes that a MODEL comes through, from the sampler's side. A loader ends it, and so does the subgraph's own input:
// then `outside` is true.
function upstream(graph, node) {
  const nodes = [];
  for (let input = modelInput(node); input; input = modelInput(nodes.at(-1))) {
    const origin = graph.getNodeById(graph.getLink(input.link).origin_id);
    if (!origin) return { nodes, outside: true };
    nodes.push(origin);
  }
  return { nodes, outside: false };
}

const namesQwen = (node) => node.widgets?.some(({ value }) => typeof value === "string" && QWEN.test(value)) ?? false;

function wantsIt(graph, sampler, anyQwen) {
  const { nodes, outside } = upstream(graph, sampler);
  if (nodes.some(({ comfyClass }) => [NODE, "QwenEditLoader"].includes(comfyClass))) return false;
  const loader = nodes.at(-1);
  // A subgraph's node or its input: which file is loaded there is not to be seen from here.
  return outside || loader?.isSubgraphNode?.() ? anyQwen : !!loader && namesQwen(loader);
}

// Left of the sampler, above or below it, where no other node lies.
function place(graph, node, sampler) {
  const title = LiteGraph.NODE_TITLE_HEIGHT;
  const [x, y] = sampler.pos;
  node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  const width = node.size[0];
  const height = node.size[1] + REPORT;
  const free = ([left, top]) =>
    graph.nodes.every(
      (other) =>
        other === node ||
        other.pos[0] > left + width + GAP / 2 ||
        other.pos[0] + other.size[0] < left - GAP / 2 ||
        other.pos[1] - title > top + height + GAP / 2 ||
        other.pos[1] + other.size[1] < top - title - GAP / 2,
    );
  const above = (lines) => [x, y - lines * (height + title + GAP)];
  const places = [[x - width - GAP, y], above(1), [x, y + sampler.size[1] + title + GAP], above(2), above(3)];
  node.pos = places.find(free) ?? above(4);
}

// One node for all samplers of a graph that take the same MODEL.
function insert(graph, samplers) {
  const link = graph.getLink(modelInput(samplers[0]).link);
  const origin = graph.getNodeById(link.origin_id);
  const node = LiteGraph.createNode(NODE);
  graph.add(node);
  place(graph, node, samplers[0]);
  if (origin) origin.connect(link.origin_slot, node, 0);
  else graph.inputs[link.origin_slot].connect(node.inputs[0], node);
  for (const sampler of samplers) node.connect(0, sampler, sampler.inputs.indexOf(modelInput(sampler)));
}

function bySource(graph, samplers) {
  const sources = new Map();
  for (const sampler of samplers) {
    const { origin_id, origin_slot } = graph.getLink(modelInput(sampler).link);
    const source = `${origin_id}:${origin_slot}`;
    sources.set(source, [...(sources.get(source) ?? []), sampler]);
  }
  return [...sources.values()];
}

function accelerate() {
  const anyQwen = graphs().some((graph) => graph.nodes.some(namesQwen));
  const found = graphs()
    .map((graph) => [
      graph,
      graph.nodes.filter((node) => isSampler(node) && modelInput(node) && wantsIt(graph, node, anyQwen)),
    ])
    .filter(([, samplers]) => samplers.length);
  app.canvas.emitBeforeChange();
  for (const [graph, samplers] of found) {
    for (const alike of bySource(graph, samplers)) insert(graph, alike);
  }
  app.canvas.emitAfterChange();
  app.canvas.setDirty(true, true);
  const count = found.reduce((sum, [, samplers]) => sum + samplers.length, 0);
  const inside = found.map(([graph]) => graph).filter((graph) => graph !== app.rootGraph);
  const names = inside.map(({ name }) => name).join(", ");
  const key = !count ? "nothingToAccelerate" : names ? "acceleratedInside" : "accelerated";
  app.extensionManager.toast.add({
    severity: count ? "success" : "info",
    summary: "Qwen Edit Fast",
    detail: text(key, { count, names }),
    life: 8000,
  });
}

app.registerExtension({
  name: ID,
  commands: [{ id: ID, label: "Accelerate this workflow", icon: "pi pi-bolt", function: accelerate }],
  menuCommands: [{ path: ["Extensions", "Qwen Edit Fast"], commands: [ID] }],
});
