// The server writes reports in English. On a page in another language, a line that locales/*/main.json has a template for is
// shown in that language's words; what stands in its blanks is looked up in the same way. Other lines stay as they are.

let templates = [];

function compile(english, own) {
  const parts = english.split(/\{(\w+)\}/); // words at even places, names of blanks at odd ones
  const escaped = parts.map((part, at) => (at % 2 ? "(.*?)" : part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")));
  const startsBlank = parts[0] === "";
  if (startsBlank) escaped[1] = "(.*)"; // what precedes the last match: ", 4 px padding"
  const words = parts.filter((_, at) => at % 2 === 0).join("").length;
  const names = parts.filter((_, at) => at % 2);
  return { pattern: new RegExp(`^${escaped.join("")}$`), names, own, startsBlank, words };
}

// Templates by name, in English and in the page's language.
export function learn(english, own) {
  templates = Object.entries(english)
    .filter(([name]) => own[name])
    .map(([name, template]) => compile(template, own[name]))
    .sort((a, b) => a.startsBlank - b.startsBlank || b.words - a.words);
}

export function inOwnWords(line) {
  for (const { pattern, names, own } of templates) {
    const found = line.match(pattern);
    if (!found) continue;
    const values = Object.fromEntries(names.map((name, at) => [name, inOwnWords(found[at + 1])]));
    return own.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  }
  return line;
}
