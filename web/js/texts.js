// The words of badges, marks, messages, reports and templates, in the language of the user: locales/*/main.json, as the server
// serves it.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { learn } from "./sentences.js";

let texts = {};
let templates = { titles: {}, notes: {} }; // as they stand in their files

// Tables say a stage by its name, which is the key of its words.
const named = ([name, words]) => [`stage ${name}`, words];
const sentences = ({ qwenEditFast, qwenEditPerf }, stages) => ({
  ...qwenEditFast.sentences,
  ...qwenEditPerf.advice,
  ...Object.fromEntries(stages.map(named)),
});

// Once, before the first node is made.
export async function loadTexts() {
  const answer = await api.fetchApi("/i18n");
  const all = answer.ok ? await answer.json() : {};
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const own = [all.en?.qwenEditFast, all[language]?.qwenEditFast].filter(Boolean);
  if (language !== "en" && own.length === 2) {
    const stages = Object.entries(all[language].qwenEditPerf.stages);
    learn(sentences(all.en, stages.map(([name]) => [name, name])), sentences(all[language], stages));
  }
  templates = all[language]?.qwenEditFast?.templates ?? templates;
  texts = Object.assign({}, ...own.flatMap(({ badges, findings, accelerate }) => [badges, findings, accelerate]));
}

export const templateTexts = () => templates;

export const known = (key) => key in texts;

export const text = (key, values = {}) =>
  Object.entries(values).reduce((line, [name, value]) => line.replace(`{${name}}`, value), texts[key] ?? key);
