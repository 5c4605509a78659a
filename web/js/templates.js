// The pack's templates in the language of the page: titles of nodes and groups, and the note. `extra.qwenEditTemplate` names
// a template in its file and is taken out when it is opened, so that what a user saves keeps the user's own words.

import { app } from "../../../scripts/app.js";
import { templateTexts } from "./texts.js";

const MARK = "qwenEditTemplate";

app.registerExtension({
  name: "QwenEditFast.Templates",

  beforeConfigureGraph(graph) {
    const name = graph?.extra?.[MARK];
    if (!name) return;
    delete graph.extra[MARK];
    const { titles, notes } = templateTexts();
    for (const one of [...graph.nodes, ...graph.groups]) {
      if (one.title in titles) one.title = titles[one.title];
      if (one.type === "MarkdownNote" && name in notes) one.widgets_values = [notes[name]];
    }
  },
});
