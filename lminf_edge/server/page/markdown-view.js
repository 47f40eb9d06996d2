/** Markdown trees (markdown.js) as elements. Whatever the model writes ends up in text nodes and checked addresses. */

import { copyButton, el } from "./dom.js";
import { IncrementalParser, isSafeUrl } from "./markdown.js";

/** A text that grows, shown in `container`. */
export class MarkdownView {
  #container;
  #parser = new IncrementalParser();
  #open = []; // the blocks that can still change, each {block, node}

  constructor(container) {
    this.#container = container;
  }

  /** Shows more of the text. */
  push(text) {
    const { final, open } = this.#parser.push(text);
    const before = this.#open;
    const shown = [...final, ...open].map((block, i) => this.#reuse(block, before[i]) ?? { block, node: blockNode(block) });
    shown.forEach(({ node }, i) => {
      if (!before[i]) this.#container.append(node);
      else if (before[i].node !== node) before[i].node.replaceWith(node);
    });
    for (const { node } of before.slice(shown.length)) node.remove();
    this.#open = shown.slice(final.length);
  }

  /** What was shown of a block, if it still fits, so that it stays selected and scrolled: code is appended to. */
  #reuse(block, before) {
    if (block.type !== "fence" || before?.block.type !== "fence" || before.block.language !== block.language) {
      return before && JSON.stringify(before.block) === JSON.stringify(block) ? before : null;
    }
    const text = before.node.querySelector("code").firstChild;
    if (block.text.startsWith(text.data)) text.appendData(block.text.slice(text.data.length));
    else text.data = block.text;
    before.block.text = block.text; // the copy button's
    return before;
  }
}

export function blockNode(block) {
  switch (block.type) {
    case "heading": // below a message's own, h2; models begin with # or ##
      return el(`h${Math.min(Math.max(block.level + 1, 3), 6)}`, {}, inlineNodes(block.children));
    case "quote":
      return el("blockquote", {}, block.children.map(blockNode));
    case "list": {
      const items = block.items.map((blocks) => el("li", {}, itemNodes(blocks)));
      return el(block.ordered ? "ol" : "ul", { start: block.ordered && String(block.start) }, items);
    }
    case "fence":
      return fenceNode(block);
    case "table":
      return el("div", { class: "table", tabindex: "0" }, tableNode(block));
    case "rule":
      return el("hr");
    default:
      return el("p", {}, inlineNodes(block.children));
  }
}

/** An item of one line has no paragraph around its words. */
function itemNodes([first, ...rest]) {
  if (first?.type !== "paragraph" || rest.some((block) => block.type === "paragraph")) {
    return [first, ...rest].filter(Boolean).map(blockNode);
  }
  return [...inlineNodes(first.children), ...rest.map(blockNode)];
}

function fenceNode(block) {
  const code = el("code");
  code.append(document.createTextNode(block.text));
  const head = el("div", { class: "code-head" }, el("span", {}, block.language), copyButton("Copy code", () => block.text));
  return el("div", { class: "code", dir: "ltr" }, head, el("pre", { tabindex: "0" }, code));
}

function tableNode({ align, rows: [head, ...rows] }) {
  const row = (tag, cells) =>
    el("tr", {}, cells.map((cell, i) => el(tag, { class: align[i] }, inlineNodes(cell))));
  return el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, rows.map((cells) => row("td", cells))));
}

const TAGS = { strong: "strong", emphasis: "em", strikethrough: "s" };

function inlineNodes(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return node;
    if (node.type === "break") return el("br");
    if (node.type === "code") return el("code", {}, node.text);
    const children = inlineNodes(node.children);
    if (node.type !== "link") return el(TAGS[node.type], {}, children);
    if (!isSafeUrl(node.url)) return el("span", {}, children);
    return el("a", { href: node.url, target: "_blank", rel: "noopener noreferrer" }, children);
  });
}
