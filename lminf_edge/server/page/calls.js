/** Tool calls of an answer, folded, and the form for their results. */

import { el, growWithText } from "./dom.js";

/** A folded text under a title, that can grow; `node` is to be shown, `text` and `title` set. */
export class Folded {
  #title = document.createTextNode("");
  #text = document.createTextNode("");

  constructor(kind, tag = "pre") {
    const summary = el("summary", {}, this.#title);
    this.node = el("details", { class: `folded ${kind}`, "data-testid": kind }, summary, el(tag, { dir: "auto" }, this.#text));
  }

  set title(title) {
    if (this.#title.data !== title) this.#title.data = title;
  }

  set text(text) {
    if (text.startsWith(this.#text.data)) this.#text.appendData(text.slice(this.#text.length));
    else this.#text.data = text;
  }
}

/** Shows the calls of an answer in `views`, one Folded each, which are made and put before `end` as calls come. */
export function showCalls(calls, views, end, isBeingWritten) {
  for (const [i, { name, arguments: given }] of calls.entries()) {
    if (!views[i]) {
      views[i] = new Folded("call");
      end.before(views[i].node);
    }
    views[i].title = `${isBeingWritten ? "Calling" : "Called"} ${name}`;
    views[i].text = isBeingWritten ? given : readable(given);
  }
}

/** Asks for a result of each call; `send(messages)` gets them as messages of the conversation. */
export function resultsForm(calls, send) {
  const areas = calls.map(({ name }) => {
    const area = el("textarea", { rows: "1", dir: "auto", required: true, "data-testid": "result", "aria-label": `Result of ${name}`, placeholder: `Result of ${name}` });
    growWithText(area);
    return area;
  });
  const form = el(
    "form",
    { class: "editor" },
    areas,
    el("p", { class: "note" }, "The model waits for what its calls return. You may also just go on writing."),
    el("button", { type: "submit", class: "primary", "data-testid": "send-results" }, calls.length > 1 ? "Send results" : "Send result"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(calls.map(({ id, name }, i) => ({ role: "tool", tool_call_id: id, name, content: areas[i].value })));
  });
  return form;
}

function readable(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // cut off by the token limit
  }
}
