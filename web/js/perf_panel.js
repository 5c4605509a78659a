// A tab in ComfyUI's sidebar: where the time of the measured runs went, live while a run goes on.
// It shows what the server sends (message qwen_edit_perf) and keeps (GET /qwen_edit/perf); texts are in locales/*/main.json.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const EVENT = "qwen_edit_perf";
const ROUTE = "/qwen_edit/perf";
const KEPT = 10;
const STAGES = {
  load: "#e8a33d",
  lora: "#d8cf5a",
  preprocess: "#56a8e4",
  denoise: "#8f7cf7",
  decode: "#3fb68b",
  postprocess: "#8fd3a4",
  save: "#e07fae",
  other: "#9aa0ab",
  report: "#5b6470",
  host: "#747b87",
};
const STYLE = `
.qwen-edit-perf { padding: 14px; font-size: 13px; line-height: 1.45; color: var(--fg-color, var(--input-text)); height: 100%;
  overflow-y: auto; box-sizing: border-box; }
.qwen-edit-perf .row { display: flex; gap: 8px; align-items: baseline; justify-content: space-between; }
.qwen-edit-perf .total { font-size: 26px; font-weight: 700; font-variant-numeric: tabular-nums; }
.qwen-edit-perf .dim { color: var(--descrip-text, #888); }
.qwen-edit-perf .advice { border-left: 3px solid #8f7cf7; padding: 6px 10px; margin: 10px 0;
  background: color-mix(in srgb, #8f7cf7 12%, transparent); border-radius: 0 6px 6px 0; }
.qwen-edit-perf h4 { margin: 18px 0 6px; font-size: 13px; font-weight: 600; }
.qwen-edit-perf .bar { display: flex; height: 14px; border-radius: 4px; overflow: hidden; background: var(--border-color, #4444); }
.qwen-edit-perf .bar i { display: block; min-width: 1px; }
.qwen-edit-perf .legend { display: flex; flex-wrap: wrap; gap: 2px 12px; margin-top: 6px; }
.qwen-edit-perf .legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
.qwen-edit-perf .node { margin-bottom: 7px; }
.qwen-edit-perf .node .bar { height: 6px; }
.qwen-edit-perf .node .row span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.qwen-edit-perf .node .row span:last-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
.qwen-edit-perf svg { display: block; width: 100%; height: 56px; }
.qwen-edit-perf button, .qwen-edit-perf a.button { font: inherit; color: inherit; background: transparent; cursor: pointer;
  border: 1px solid var(--border-color, #555); border-radius: 6px; padding: 3px 10px; text-decoration: none; }
.qwen-edit-perf button:hover, .qwen-edit-perf a.button:hover { border-color: #8f7cf7; }
.qwen-edit-perf .run { display: block; width: 100%; text-align: left; margin-bottom: 6px; padding: 6px 8px; }
.qwen-edit-perf .run[aria-pressed="true"] { border-color: #8f7cf7; }
.qwen-edit-perf .run .bar { height: 8px; margin-top: 4px; }
.qwen-edit-perf .downloads { display: flex; gap: 8px; align-items: center; margin-top: 12px; }
`;

let texts = {};
let english = {};
let runs = []; // newest first, as the server shows them
let live = null; // the run that goes on
let chosen = null; // prompt id of the run a person chose; null: the latest
let progress = null; // of the node that is running: {node, value, max}
let root = null;

function t(key, values = {}) {
  const find = (from) => key.split(".").reduce((at, part) => at?.[part], from);
  const text = find(texts) ?? find(english) ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.onclick = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function time(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms >= 9950 ? 1 : 2)} s`;
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(1)} ms`;
}

// Drawing the report is part of the run, but not of what people compare.
const work = (run) => run.wall_ms - (run.stages.report?.ms ?? 0);
const stagesOf = (run) => Object.keys(STAGES).filter((name) => name !== "report" && run.stages[name]?.ms > 0);

function stageBar(run, longest) {
  const bar = make("div", { class: "bar", role: "img", "aria-label": stagesOf(run).map((n) => stageText(run, n)).join(", ") });
  bar.style.width = `${(100 * work(run)) / longest}%`;
  for (const name of stagesOf(run)) {
    const part = make("i", { title: stageText(run, name) });
    part.style.background = STAGES[name];
    part.style.width = `${(100 * run.stages[name].ms) / work(run)}%`;
    bar.append(part);
  }
  return bar;
}

// Of the values only a run's status is a word.
const adviceText = ({ code, values }) =>
  t(`advice.${code}`, values.status ? { ...values, status: t(values.status) } : values);

const stageText = (run, name) => `${t(`stages.${name}`)} ${time(run.stages[name].ms)}`;

function legend(run) {
  const names = stagesOf(run).filter((name) => run.stages[name].ms / work(run) >= 0.005);
  return make(
    "div",
    { class: "legend dim" },
    ...names.map((name) => {
      const square = make("i");
      square.style.background = STAGES[name];
      return make("span", {}, square, stageText(run, name));
    }),
  );
}

function nodeList(run) {
  const ran = run.nodes.filter((node) => !node.cached && node.stage !== "report");
  const between = run.wall_ms - run.nodes.reduce((sum, node) => sum + node.ms, 0);
  const rows = ran.map((node) => [title(node), node.ms, node.device_ms, node.stage]).sort((a, b) => b[1] - a[1]);
  rows.push([t("between"), Math.max(between, 0), null, "host"]);
  const cached = run.nodes.length - run.nodes.filter((node) => !node.cached).length;
  return make(
    "div",
    {},
    make("h4", {}, t("nodes"), cached ? make("span", { class: "dim" }, `  ${t("cached", { count: cached })}`) : null),
    ...rows.map(([name, ms, device, stage]) => {
      const share = ms / work(run);
      const fill = make("i");
      fill.style.background = STAGES[stage] ?? STAGES.other;
      fill.style.width = `${Math.min(100 * share, 100)}%`;
      const percent = share >= 0.01 ? `${Math.round(100 * share)} %` : "< 1 %";
      const row = make(
        "div",
        { class: "node" },
        make("div", { class: "row" }, make("span", {}, name), make("span", { class: "dim" }, `${time(ms)}  ${percent}`)),
        make("div", { class: "bar" }, fill),
      );
      if (device !== null && device !== undefined) row.title = t("device", { ms: time(device) });
      return row;
    }),
  );
}

const title = (node) => LiteGraph.registered_node_types[node.class_type]?.title ?? node.class_type;

function svg(shapes) {
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("viewBox", "0 0 100 56");
  picture.setAttribute("preserveAspectRatio", "none");
  for (const [tag, attributes] of shapes) {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
    picture.append(shape);
  }
  return picture;
}

function stepBars(run) {
  const sampled = [...run.nodes, ...run.spans].filter((node) => node.stage === "denoise" && node.steps?.count > 1);
  const longest = sampled.sort((a, b) => b.ms - a.ms)[0];
  if (!longest?.steps.ms.length) return null;
  const { first_ms: first, ms: others, count } = longest.steps;
  const limit = Math.max(...others, Math.min(first, 2 * Math.max(...others))) * 1.05;
  const width = 100 / (others.length + 1);
  const bars = [first, ...others].map((ms, index) => {
    const height = Math.min(ms / limit, 1) * 56;
    const place = { x: index * width, y: 56 - height, width: width * 0.8, height };
    return ["rect", { ...place, fill: index ? STAGES.denoise : STAGES.host }];
  });
  const median = [...others].sort((a, b) => a - b)[Math.floor(others.length / 2)];
  return make(
    "div",
    {},
    make("h4", {}, t("steps", { count, ms: time(median) }), make("span", { class: "dim" }, `  ${t("first", { ms: time(first) })}`)),
    svg(bars),
  );
}

function memoryLines(run) {
  const memory = run.memory;
  if (memory.at_ms.length < 3) return null;
  const lines = [["process", memory.rss_mib, "#4cc3a5"]];
  if (memory.device_mib) lines.unshift(["card", memory.device_mib, "#8f7cf7"]);
  const top = Math.max(...lines.flatMap(([, values]) => values)) * 1.08;
  const points = (values) =>
    values.map((mib, index) => `${(100 * memory.at_ms[index]) / run.wall_ms},${56 - (56 * mib) / top}`).join(" ");
  const shapes = lines.map(([, values, colour]) => [
    "polyline",
    { points: points(values), fill: "none", stroke: colour, "stroke-width": 2, "vector-effect": "non-scaling-stroke" },
  ]);
  const named = lines.map(([name, values, colour]) => {
    const square = make("i");
    square.style.background = colour;
    return make("span", {}, square, `${t(name)}, ${t("atMost", { gib: (Math.max(...values) / 1024).toFixed(1) })}`);
  });
  return make("div", {}, make("h4", {}, t("memory")), svg(shapes), make("div", { class: "legend dim" }, ...named));
}

function details(run) {
  const going = run.status === "running";
  const state = [t(run.status), run.device.name, ...(going ? [] : [run.cold ? t("cold") : t("warm")])];
  const last = run.nodes.filter((node) => !node.cached).at(-1);
  const at = going && progress && progress.max > 1 && last?.id === progress.node ? `, ${t("stepOf", progress)}` : "";
  return make(
    "div",
    {},
    make(
      "div",
      { class: "row" },
      make("span", { class: "total" }, time(work(run))),
      make("span", { class: "dim", "data-state": run.status }, state.join(" · ")),
    ),
    going && last ? make("div", { class: "dim now" }, `${title(last)}${at}`) : null,
    run.advice ? make("div", { class: "advice" }, adviceText(run.advice)) : null,
    stageBar(run, work(run)),
    legend(run),
    stepBars(run),
    nodeList(run),
    memoryLines(run),
    going ? null : downloads(run),
  );
}

function downloads(run) {
  const link = (format) => {
    const address = `${ROUTE}?prompt_id=${encodeURIComponent(run.prompt_id)}&format=${format}`;
    const name = `qwen_edit_perf_${run.time.slice(0, 19).replace(/\D/g, "")}.${format}`;
    return make("a", { class: "button", href: api.apiURL(address), download: name }, format.toUpperCase());
  };
  return make("div", { class: "downloads" }, make("span", { class: "dim" }, t("export")), link("json"), link("csv"));
}

function runList() {
  const longest = Math.max(...runs.map(work));
  return make(
    "div",
    { class: "runs" },
    make("h4", {}, t("runs")),
    ...runs.map((run) => {
      const shown = (chosen ?? runs[0].prompt_id) === run.prompt_id && !live;
      const when = new Date(run.time).toLocaleTimeString();
      const state = run.status === "success" ? t(run.cold ? "cold" : "warm") : t(run.status);
      return make(
        "button",
        { class: "run", "aria-pressed": String(shown), onclick: () => choose(run) },
        make("div", { class: "row" }, make("span", {}, when), make("span", { class: "dim" }, `${time(work(run))} ${state}`)),
        stageBar(run, longest),
      );
    }),
  );
}

function choose(run) {
  chosen = run.prompt_id;
  show();
}

function empty() {
  const add = () => {
    const node = LiteGraph.createNode("QwenEditPerfReport");
    node.pos = [...app.canvas.ds.offset].map((offset, axis) => (axis ? 200 : 500) / app.canvas.ds.scale - offset);
    app.graph.add(node);
    app.canvas.selectNode?.(node);
  };
  return make("div", {}, make("p", { class: "dim" }, t("empty")), make("button", { onclick: add }, t("add")));
}

function show() {
  if (!root?.isConnected) return;
  const shown = live ?? runs.find((run) => run.prompt_id === chosen) ?? runs[0];
  root.replaceChildren(...(shown ? [details(shown), ...(runs.length ? [runList()] : [])] : [empty()]));
}

function receive(run) {
  if (run.status === "running") {
    live = run;
  } else {
    if (live?.prompt_id === run.prompt_id) live = progress = null;
    runs = [run, ...runs.filter((other) => other.prompt_id !== run.prompt_id)].slice(0, KEPT);
    chosen = null;
  }
  show();
}

async function load() {
  const answer = await api.fetchApi(ROUTE);
  if (answer.ok) runs = (await answer.json()).runs;
  show();
}

async function loadTexts() {
  const answer = await api.fetchApi("/i18n");
  const all = answer.ok ? await answer.json() : {};
  english = all.en?.qwenEditPerf ?? {};
  const language = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  texts = all[language]?.qwenEditPerf ?? english;
}

app.registerExtension({
  name: "QwenEditFast.PerfPanel",

  async setup() {
    await loadTexts();
    api.addEventListener(EVENT, ({ detail }) => receive(detail));
    api.addEventListener("progress", ({ detail }) => (progress = detail));
    // A run whose end was missed, because the connection or the server was gone.
    api.addEventListener("reconnected", () => {
      live = null;
      load();
    });
    app.extensionManager.registerSidebarTab({
      id: "qwen-edit-perf",
      icon: "pi pi-chart-bar",
      title: t("title"),
      tooltip: t("tooltip"),
      type: "custom",
      render(element) {
        root = make("div", { class: "qwen-edit-perf" });
        element.style.height = "100%";
        element.replaceChildren(make("style", {}, STYLE), root);
        show();
        load();
      },
    });
  },
});
