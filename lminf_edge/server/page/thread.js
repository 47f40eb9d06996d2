/** The messages of one conversation. Only the last are shown, more on request; only the one being written changes. */

import { Folded, resultsForm, showCalls } from "./calls.js";
import { button, copyButton, el, growWithText, iconButton, submitOnEnter } from "./dom.js";
import { describe } from "./files.js";
import { MarkdownView } from "./markdown-view.js";
import { count } from "./status.js";

const SHOWN = 40; // messages at first, and with each "Show earlier"
const FOLDED = 4000; // characters of a longer message of the user, until it is unfolded
const AT_END = 48; // pixels from the end that still count as being there
const BUSY = 0.2; // the share of the time that goes into showing an answer, at most

export class Thread {
  #actions;
  #chat = null;
  #first = 0; // index of the first message shown
  #rows = []; // those shown, each {message, node, ...}
  #atEnd = true; // whether the end stays in view
  #frame = 0;
  #problem = null; // the one shown
  #rest = 0; // no drawing before that time
  #scroller = document.getElementById("scroller");
  #list = document.getElementById("messages");
  #earlier = document.getElementById("earlier");
  #activity = document.getElementById("activity");
  #notice = document.getElementById("notice");
  #results = document.getElementById("results");
  #open = null; // the answer whose calls wait for results
  #latest = document.getElementById("latest");

  /** `actions`: edit(index, text), regenerate(), retry(), results(messages). */
  constructor(actions) {
    this.#actions = actions;
    this.#earlier.addEventListener("click", () => this.#showEarlier());
    this.#latest.addEventListener("click", () => this.#toEnd());
    this.#scroller.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
      this.#atEnd = scrollHeight - scrollTop - clientHeight < AT_END;
      this.#latest.hidden = this.#atEnd;
    });
    new ResizeObserver(() => this.#atEnd && this.#toEnd()).observe(this.#scroller); // a keyboard comes up
  }

  /** Whether the user is editing a message. */
  get isEditing() {
    return this.#list.querySelector("form") !== null;
  }

  /** Shows a conversation from its end. */
  show(chat) {
    this.#chat = chat;
    this.#rows = [];
    this.#list.replaceChildren();
    this.#rest = 0;
    this.#draw();
    this.#toEnd();
  }

  /** Something has arrived: shows it with the next frame, or a little later if showing it takes long. */
  update() {
    this.#frame ||= requestAnimationFrame((now) => {
      this.#frame = 0;
      if (now < this.#rest) this.update();
      else this.#draw();
    });
  }

  /** Shows the conversation as it is now. */
  refresh() {
    this.#rest = 0;
    this.#draw();
  }

  scrollToEnd() {
    this.#toEnd();
  }

  #draw() {
    const start = performance.now();
    const { messages, turn } = this.#chat;
    const rows = this.#rows;
    while (rows.length && rows.at(-1).message !== messages[this.#first + rows.length - 1]) rows.pop().node.remove();
    if (!rows.length) this.#first = Math.max(0, messages.length - SHOWN);
    for (const message of messages.slice(this.#first + rows.length)) {
      rows.push(this.#row(message));
      this.#list.append(rows.at(-1).node);
    }
    if (this.#atEnd && rows.length > 3 * SHOWN) {
      for (const { node } of rows.splice(0, rows.length - SHOWN)) node.remove();
      this.#first = messages.length - SHOWN;
    }
    if (rows.length) this.#fill(rows.at(-1), Boolean(turn) && turn.answer === rows.at(-1).message);
    this.#drawAround();
    const height = this.#scroller.scrollHeight; // lays the page out: this counts
    if (this.#atEnd) this.#toEnd(height);
    const end = performance.now();
    this.#rest = end + (end - start) * (1 / BUSY - 1);
  }

  /** What is not a message: the button for earlier ones, what the server does, what went wrong. */
  #drawAround() {
    const { messages, turn, problem } = this.#chat;
    this.#list.toggleAttribute("data-busy", Boolean(turn));
    this.#list.toggleAttribute("data-empty", !messages.length);
    this.#earlier.hidden = this.#first === 0;
    this.#earlier.textContent = `Show earlier messages (${count(this.#first)})`;

    this.#activity.hidden = !turn || Boolean(turn.answer);
    const [text, bar] = this.#activity.children;
    const { processed, total } = turn?.progress ?? {};
    bar.hidden = !(total > 0);
    if (total > 0) Object.assign(bar, { max: total, value: processed });
    text.textContent = total > 0 ? `Reading ${count(processed)} of ${count(total)} tokens` : "Waiting for the answer";

    const last = messages.at(-1);
    const open = !turn && last?.tool_calls && last.state === "finished" ? last : null;
    if (this.#open !== open) {
      this.#open = open;
      this.#results.hidden = !open;
      this.#results.replaceChildren(...(open ? [resultsForm(open.tool_calls, this.#actions.results)] : []));
    }

    if (this.#problem === problem) return;
    this.#problem = problem;
    this.#notice.hidden = !problem;
    this.#notice.replaceChildren(problem?.text ?? "");
    this.#notice.classList.toggle("error", Boolean(problem?.isError));
    if (problem?.retry) this.#notice.append(button(problem.retry, this.#actions.retry, { "data-testid": "retry" }));
  }

  #row(message) {
    const isUser = message.role === "user";
    if (message.role === "tool") return this.#toolRow(message);
    const body = el("div", { class: "body", dir: "auto" });
    const note = el("p", { class: "note", hidden: true });
    const row = { message, body, note, length: 0 };
    const actions = el("div", { class: "actions" });
    if (isUser) {
      actions.append(iconButton("edit", "Edit", () => this.#edit(row), { "data-testid": "edit" }));
    } else {
      row.markdown = new MarkdownView(body);
      const regenerate = iconButton("again", "Regenerate", this.#actions.regenerate, { "data-testid": "regenerate" });
      actions.append(copyButton("Copy answer", () => message.content), regenerate);
    }
    row.node = el(
      "li",
      { class: `message ${message.role}`, "data-testid": "message", "data-role": message.role },
      el("h2", { class: "visually-hidden" }, isUser ? "You" : "Answer"),
      body,
      note,
      actions,
    );
    for (const file of message.files ?? []) {
      const view = new Folded("file-sent");
      view.title = describe(file);
      view.node.addEventListener("toggle", () => (view.text = file.text), { once: true });
      body.before(view.node);
    }
    this.#fill(row, false);
    return row;
  }

  #toolRow(message) {
    const result = new Folded("tool-result");
    result.title = `Result of ${message.name}`;
    result.text = message.content;
    const attributes = { class: "message tool", "data-testid": "message", "data-role": "tool" };
    return { message, node: el("li", attributes, result.node) };
  }

  /** Shows what a message has grown by. */
  #fill(row, isBeingWritten) {
    const { message, body, note, node } = row;
    if (message.role === "tool") return;
    if (message.role === "user") {
      if (!row.length) this.#fillUser(body, message.content);
      row.length = message.content.length;
      return;
    }
    if (message.reasoning) {
      if (!row.reasoning) {
        row.reasoning = new Folded("reasoning", "p");
        body.before(row.reasoning.node);
      }
      row.reasoning.title = isBeingWritten && !message.content && !message.tool_calls ? "Thinking" : "Thoughts";
      row.reasoning.text = message.reasoning;
    }
    if (message.tool_calls) showCalls(message.tool_calls, (row.calls ??= []), note, isBeingWritten);
    if (message.content.length > row.length) row.markdown.push(message.content.slice(row.length));
    row.length = message.content.length;
    node.toggleAttribute("data-writing", isBeingWritten);
    node.setAttribute("aria-busy", String(isBeingWritten));
    if (!isBeingWritten && message.state === "stopped") note.textContent = "Stopped";
    else if (message.finish === "length") note.textContent = "Ended at the token limit";
    else note.textContent = "";
    note.hidden = !note.textContent;
  }

  #fillUser(body, text) {
    body.hidden = !text;
    const isLong = text.length > 1.5 * FOLDED;
    body.textContent = isLong ? `${text.slice(0, FOLDED)}…` : text;
    if (isLong) body.append(button(`Show all ${count(text.length)} characters`, unfold, { class: "unfold" }));

    function unfold() {
      body.textContent = text;
      body.tabIndex = -1; // where the button was
      body.focus({ preventScroll: true });
    }
  }

  /** Replaces a message of the user by a text area, until it is saved or cancelled. */
  #edit(row) {
    const area = el("textarea", { "aria-label": "Edit message", rows: "1", dir: "auto", "data-testid": "edit-text" });
    area.value = row.message.content;
    const index = this.#first + this.#rows.indexOf(row);
    const n_after = this.#chat.messages.length - index - 1;
    const hint = n_after ? `Saving drops the ${n_after === 1 ? "message" : `${count(n_after)} messages`} after it.` : "";
    const form = el(
      "form",
      { class: "editor" },
      area,
      el("p", { class: "note" }, hint),
      button("Cancel", close, { "data-testid": "edit-cancel" }),
      el("button", { type: "submit", class: "primary", "data-testid": "edit-save" }, "Save and ask again"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!area.value.trim() && !row.message.files) return;
      close();
      this.#actions.edit(index, area.value);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault(); // it would stop an answer
      close();
    });
    submitOnEnter(area);
    growWithText(area);
    row.node.classList.add("editing");
    row.node.append(form);
    area.focus();

    function close() {
      form.remove();
      row.node.classList.remove("editing");
      row.node.querySelector('[data-testid="edit"]').focus();
    }
  }

  #showEarlier() {
    const { scrollHeight, scrollTop } = this.#scroller;
    const first = Math.max(0, this.#first - SHOWN);
    const rows = this.#chat.messages.slice(first, this.#first).map((message) => this.#row(message));
    this.#rows.unshift(...rows);
    this.#first = first;
    this.#list.prepend(...rows.map(({ node }) => node));
    this.#drawAround();
    this.#scroller.scrollTop = scrollTop + this.#scroller.scrollHeight - scrollHeight; // what is read stays in place
    if (this.#earlier.hidden) {
      rows[0].node.tabIndex = -1;
      rows[0].node.focus({ preventScroll: true });
    }
  }

  #toEnd(height = this.#scroller.scrollHeight) {
    this.#atEnd = true;
    this.#latest.hidden = true;
    this.#scroller.scrollTop = height;
  }
}
