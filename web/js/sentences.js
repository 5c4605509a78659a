// The server writes reports in English. On a page in another language, a line that locales/*/main.json has a template for is
// shown in that language's words; what stands in its blanks, or in the cells of a table's row, is looked up in the same way.
// Other lines stay as they are.

let templates = [];

const pen = document.createElement("canvas").getContext("2d");
pen.font = "12px monospace";
const width = (words) => pen.measureText(words).width / pen.measureText(" ").width;

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

// The first cell of a row stands left in its column, the others right; between them are two spaces or more.
function row(line) {
  const parts = line.split(/( {2,})/); // cells at even places
  for (let at = 0; at < parts.length; at += 2) {
    const own = inOwnWords(parts[at]);
    const blank = at ? at - 1 : 1;
    parts[blank] = " ".repeat(Math.max(2, Math.round(parts[blank].length + width(parts[at]) - width(own))));
    parts[at] = own;
  }
  return parts.join("");
}

export function inOwnWords(line) {
  if (/\S {2,}\S/.test(line)) return row(line);
  for (const { pattern, names, own } of templates) {
    const found = line.match(pattern);
    if (!found) continue;
    const values = Object.fromEntries(names.map((name, at) => [name, inOwnWords(found[at + 1])]));
    return own.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  }
  return line;
}
