/** The list of conversations: beside them, or on a small screen in a drawer over them. */

import { el } from "./dom.js";

export class Sidebar {
  #side = document.getElementById("sidebar");
  #main = document.getElementById("main");
  #menu = document.getElementById("menu");
  #list = document.getElementById("conversations");
  #small = matchMedia("(max-width: 48rem)");

  constructor() {
    this.#menu.addEventListener("click", () => this.#show(true));
    document.getElementById("close-menu").addEventListener("click", () => this.close());
    document.getElementById("scrim").addEventListener("click", () => this.close());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.#isOpen) return;
      event.preventDefault();
      this.close();
    });
    this.#small.addEventListener("change", () => this.#show(false));
    this.#show(false);
  }

  close() {
    const wasOpen = this.#isOpen;
    this.#show(false);
    if (wasOpen) this.#menu.focus();
  }

  /** `conversations`: {id, title} in order; `writing`: the ids of those whose answer is being written. */
  render(conversations, current, writing) {
    const focused = this.#list.contains(document.activeElement) && document.activeElement.hash;
    this.#list.replaceChildren(
      ...conversations.map(({ id, title }) => {
        const link = el("a", { href: `#${id}`, "aria-current": id === current && "page", dir: "auto" }, title);
        if (writing.has(id)) link.append(el("span", { class: "writing" }, el("span", { class: "visually-hidden" }, " (writing)")));
        return el("li", {}, link);
      }),
    );
    if (focused) this.#list.querySelector(`a[href="${focused}"]`)?.focus();
  }

  get #isOpen() {
    return this.#menu.getAttribute("aria-expanded") === "true";
  }

  /** On a small screen, what cannot be seen cannot be reached with the keyboard either. */
  #show(open) {
    this.#menu.setAttribute("aria-expanded", String(open));
    document.body.classList.toggle("drawer-open", open);
    this.#side.inert = this.#small.matches && !open;
    this.#main.inert = this.#small.matches && open;
    if (open) document.getElementById("close-menu").focus();
  }
}
