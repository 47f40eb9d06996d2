/** Text files that go with a message: dropped on the page or chosen, listed above what is being written. */

import { el, iconButton } from "./dom.js";
import { count } from "./status.js";

const MAX_BYTES = 8 << 20; // of all files of a message: the server takes requests of 16 MiB

export class Files {
  #all = [];
  #changed;
  #list = document.getElementById("files");
  #problem = document.getElementById("files-problem");

  /** `changed()` is called when files were added or taken away. */
  constructor(changed) {
    this.#changed = changed;
    const chosen = document.getElementById("choose-files");
    document.getElementById("attach").addEventListener("click", () => chosen.click());
    chosen.addEventListener("change", async () => {
      await this.#add([...chosen.files]);
      chosen.value = ""; // the same file may be chosen again
    });
    const main = document.getElementById("main");
    const isFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
    main.addEventListener("dragover", (event) => {
      if (!isFiles(event)) return;
      event.preventDefault();
      event.dataTransfer.dropEffect = "copy";
      main.classList.add("dropping");
    });
    main.addEventListener("dragleave", ({ relatedTarget }) => {
      if (!main.contains(relatedTarget)) main.classList.remove("dropping");
    });
    main.addEventListener("drop", (event) => {
      main.classList.remove("dropping");
      if (!isFiles(event)) return;
      event.preventDefault();
      this.#add([...event.dataTransfer.files]);
    });
  }

  /** [{name, text}] */
  get all() {
    return this.#all;
  }

  set all(files) {
    this.#all = files;
    this.#problem.textContent = "";
    this.#show();
  }

  async #add(files) {
    this.#problem.textContent = "";
    for (const file of files) {
      try {
        const held = this.#all.reduce((sum, { text }) => sum + text.length, 0);
        if (held + file.size > MAX_BYTES) throw new Error(`${file.name} is too large: a message takes 8 MiB of files.`);
        this.#all = [...this.#all, { name: file.name, text: await readText(file) }];
      } catch (error) {
        this.#problem.textContent = error.message;
      }
    }
    this.#show();
  }

  #show() {
    this.#list.hidden = !this.#all.length;
    this.#list.replaceChildren(
      ...this.#all.map((file) =>
        el("li", { "data-testid": "file" }, el("span", { dir: "auto" }, describe(file)), this.#remover(file)),
      ),
    );
    this.#changed();
  }

  #remover(file) {
    return iconButton("close", `Leave ${file.name} out`, () => {
      this.#all = this.#all.filter((each) => each !== file);
      this.#show();
    });
  }
}

async function readText(file) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch (error) {
    throw new Error(`${file.name} cannot be read: it is no text in UTF-8.`, { cause: error });
  }
  if (!text.trim() || text.includes("\0")) throw new Error(`${file.name} cannot be read: it has no text.`);
  return text;
}

/** A file in words. */
export const describe = ({ name, text }) => `${name} · ${count(text.length)} characters`;
