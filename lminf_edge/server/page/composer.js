/** Where messages are written. What is being written is kept per conversation until it is sent, in this tab. */

import { growWithText, submitOnEnter } from "./dom.js";
import { Files } from "./files.js";

const SAVE_MS = 300;

export class Composer {
  #form = document.getElementById("composer");
  #input = document.getElementById("message");
  #send = document.getElementById("send");
  #stop = document.getElementById("stop");
  #draft = "draft:new"; // where in sessionStorage
  #files = new Files(() => this.focus());
  #others = new Map(); // files of what is being written elsewhere: kept until the page is left
  #timer = 0;

  constructor({ send, stop }) {
    submitOnEnter(this.#input);
    growWithText(this.#input);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      if ((this.text.trim() || this.#files.all.length) && this.#stop.hidden) send(this.text, this.#files.all);
    });
    this.#stop.addEventListener("click", stop);
    this.#input.addEventListener("input", () => {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.#save(), SAVE_MS);
    });
    addEventListener("pagehide", () => this.#save());
  }

  get text() {
    return this.#input.value;
  }

  set text(text) {
    this.#input.value = text;
    this.#input.dispatchEvent(new Event("input"));
  }

  /** Goes to what is being written in another conversation; `id` is null for a new one. */
  open(id) {
    this.#save();
    this.#others.set(this.#draft, this.#files.all);
    this.#draft = `draft:${id ?? "new"}`;
    this.#files.all = this.#others.get(this.#draft) ?? [];
    this.text = sessionStorage.getItem(this.#draft) ?? "";
  }

  /** The message is sent: nothing is being written, in a conversation which may have become `id` only now. */
  sent(id) {
    sessionStorage.removeItem(this.#draft);
    this.#others.delete(this.#draft);
    this.#draft = `draft:${id}`;
    this.#files.all = [];
    this.text = "";
  }

  /** While an answer is written, the button stops it. */
  set busy(busy) {
    const hadFocus = [this.#send, this.#stop].includes(document.activeElement);
    this.#send.hidden = busy;
    this.#stop.hidden = !busy;
    if (hadFocus) this.focus();
  }

  /** Puts the focus here, but for touch screens: there it would bring up the keyboard. */
  focus() {
    if (matchMedia("(hover: hover)").matches) this.#input.focus();
    else document.getElementById("title").focus();
  }

  #save() {
    clearTimeout(this.#timer);
    try {
      if (this.text) sessionStorage.setItem(this.#draft, this.text);
      else sessionStorage.removeItem(this.#draft);
    } catch {
      // Longer than the browser keeps: it stays in the text area.
    }
  }
}
