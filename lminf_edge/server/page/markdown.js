/**
 * Markdown as a tree of plain data, without a document: nothing in it can run, and it can be tested anywhere.
 * The part of CommonMark that models write, and GitHub's tables. HTML is text like any other; a line's end is a break.
 *
 * Blocks: {type: "paragraph" | "heading" (level) | "quote" | "list" (ordered, start, items) | "fence" (language, text)
 * | "table" (align, rows; the first is the head) | "rule"}. Inline: strings, and {type: "strong" | "emphasis" |
 * "strikethrough" | "code" (text) | "link" (url) | "break"}. What contains others has `children`.
 *
 * The time is linear in the text's length: nesting is bounded, and what a regular expression has tried in vain is not
 * tried again from the next character.
 */

const MAX_DEPTH = 16;
const MAX_PARAGRAPH = 4000; // characters; it then ends with its line: while a text grows, its last block is parsed again

const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*))?$/;

/** The blocks of a text. */
export const parse = (text) => parseBlocks(linesOf(text));

/** Parses a text that grows: each part of it a few times only. */
export class IncrementalParser {
  #tail = ""; // the text from the first block on that can still change

  /** Returns the blocks that became final, and those after them that the rest of the text can still change. */
  push(text) {
    this.#tail += text;
    const lines = linesOf(this.#tail);
    const starts = [];
    const blocks = parseBlocks(lines, 0, starts);
    // A block ends where the next one begins for certain: when the line it begins with is complete, and so is the one
    // after that (it could make this line the head of a table).
    const n_final = Math.max(0, starts.findLastIndex((start) => start < lines.length - 2));
    if (n_final) {
      let offset = 0;
      for (let i = 0; i < starts[n_final]; i++) offset = this.#tail.indexOf("\n", offset) + 1;
      this.#tail = this.#tail.slice(offset);
    }
    return { final: blocks.slice(0, n_final), open: blocks.slice(n_final) };
  }
}

/** An address that may become a link: of the web or of a mailbox, nothing else. */
export const isSafeUrl = (url) => /^(?:https?:\/\/|mailto:)[^\s\p{Cc}]+$/iu.test(url) && URL.canParse(url);

const linesOf = (text) => text.split("\n").map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line));
const isBlank = (line) => line.trim() === "";

function parseBlocks(lines, depth = 0, starts = []) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (isBlank(lines[i])) {
      i++;
      continue;
    }
    starts.push(i);
    const line = lines[i];
    const nests = depth < MAX_DEPTH;
    let block, match;
    if ((match = FENCE.exec(line))) [block, i] = parseFence(lines, i, match);
    else if ((match = HEADING.exec(line))) {
      block = { type: "heading", level: match[1].length, children: parseInline(headingText(match[2] ?? "")) };
      i++;
    } else if (RULE.test(line)) {
      block = { type: "rule" };
      i++;
    } else if (nests && QUOTE.test(line)) {
      const quoted = [];
      while (i < lines.length && QUOTE.test(lines[i])) quoted.push(lines[i++].replace(QUOTE, ""));
      block = { type: "quote", children: parseBlocks(quoted, depth + 1) };
    } else if (nests && ITEM.test(line)) [block, i] = parseList(lines, i, depth);
    else if (isTable(lines, i)) [block, i] = parseTable(lines, i);
    else {
      const text = [lines[i++]];
      let length = line.length;
      while (i < lines.length && length < MAX_PARAGRAPH && !isBlank(lines[i])) {
        if (interrupts(lines[i]) || isTable(lines, i)) break;
        length += lines[i].length;
        text.push(lines[i++]);
      }
      block = { type: "paragraph", children: parseInline(text.map((part) => part.trim()).join("\n")) };
    }
    blocks.push(block);
  }
  return blocks;
}

/** Whether a line ends the paragraph before it. "1984." at the start of a line does not. */
function interrupts(line) {
  const item = ITEM.exec(line);
  if (item) return Boolean(item[4]) && (item[2].length === 1 || item[2].startsWith("1")) && item[2].length <= 2;
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function headingText(text) {
  const trimmed = text.trim();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end--;
  return end === 0 || /\s/.test(trimmed[end - 1]) ? trimmed.slice(0, end).trim() : trimmed;
}

function parseFence(lines, i, [, indent, marker, info]) {
  const body = [];
  let closed = false;
  for (i++; i < lines.length && !closed; i++) {
    const line = lines[i].trim();
    closed = line.length >= marker.length && line === marker[0].repeat(line.length);
    if (!closed) body.push(dedent(lines[i], indent.length));
  }
  if (!closed && body.at(-1) === "") body.pop(); // the line that is about to be written
  return [{ type: "fence", language: info.trim().split(/\s/, 1)[0], text: body.join("\n") }, i];
}

function parseList(lines, i, depth) {
  const kind = (item) => (item[2].length === 1 ? item[2] : item[2].at(-1)); // "-", "*", "+", "." or ")"
  const first = ITEM.exec(lines[i]);
  const ordered = first[2].length > 1;
  const list = { type: "list", ordered, ...(ordered && { start: parseInt(first[2]) }), items: [] };
  for (;;) {
    const item = i < lines.length && !RULE.test(lines[i]) && ITEM.exec(lines[i]);
    if (!item || kind(item) !== kind(first)) break;
    // Text belongs to the item from two columns to the right of its marker on, though CommonMark wants it right below
    // the item's first word: models are not that careful.
    const inside = item[1].length + 2;
    const column = item[1].length + item[2].length + Math.min(item[3]?.length ?? 1, 4);
    const body = [item[4] ?? ""];
    for (i++; i < lines.length; i++) {
      if (isBlank(lines[i])) {
        const next = nextText(lines, i);
        if (next === lines.length || indentOf(lines[next]) < inside) break;
        while (i < next) body.push(lines[i++]);
      } else if (indentOf(lines[i]) < inside && (ITEM.test(lines[i]) || interrupts(lines[i]))) break;
      body.push(dedent(lines[i], column));
    }
    list.items.push(parseBlocks(body, depth + 1));
    const next = nextText(lines, i);
    if (next < lines.length && ITEM.test(lines[next])) i = next;
  }
  return [list, i];
}

function nextText(lines, i) {
  while (i < lines.length && isBlank(lines[i])) i++;
  return i;
}

function indentOf(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns++;
    else if (character === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

/** The line without its first `columns` columns of indentation. */
function dedent(line, columns) {
  const indent = indentOf(line);
  return indent && columns ? " ".repeat(Math.max(0, indent - columns)) + line.replace(/^[ \t]+/, "") : line;
}

function isTable(lines, i) {
  const rule = lines[i + 1];
  if (!rule?.includes("|") || !rule.includes("-") || !lines[i].includes("|")) return false;
  const cells = cellsOf(rule);
  return cells.every((cell) => /^:?-+:?$/.test(cell)) && cells.length === cellsOf(lines[i]).length;
}

function parseTable(lines, i) {
  const align = cellsOf(lines[i + 1]).map((cell) => {
    if (!cell.endsWith(":")) return "left";
    return cell.startsWith(":") ? "center" : "right";
  });
  const rows = [lines[i]];
  for (i += 2; i < lines.length && lines[i].includes("|") && !interrupts(lines[i]); i++) rows.push(lines[i]);
  return [{ type: "table", align, rows: rows.map((row) => cellsOf(row).slice(0, align.length).map(parseInline)) }, i];
}

function cellsOf(row) {
  const cells = row
    .trim()
    .replace(/^\|/, "")
    .split(/(?<!\\)\|/)
    .map((cell) => cell.replaceAll("\\|", "|").trim());
  if (cells.length > 1 && cells.at(-1) === "") cells.pop();
  return cells;
}

const SPECIAL = /`+|\*+|_+|~~|!?\[|\]|\\[!-/:-@[-`{-~]|\n|<(?:https?:\/\/|mailto:)[^\s<>]+>|https?:\/\/[^\s<>`"[\]]+/gi;
const ADDRESS = /\s*(?:<([^<>\n]*)>|((?:[^\s()<\\]|\\.|\([^\s()]{0,256}\)){1,2048}))/y;
const ADDRESS_END = /(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y; // a title, which is not shown
const EMPHASIS = { "*1": "emphasis", "*2": "strong", _1: "emphasis", _2: "strong", "~2": "strikethrough" };

/** The inline content of a block: strings and nodes. */
export function parseInline(text) {
  const special = new RegExp(SPECIAL);
  const codeEnds = findCodeEnds(text);
  const out = [];
  const openers = []; // what may yet begin something, {sign, at}: out[at] is its text
  let at = 0;

  const open = (token, sign) => {
    if (openers.length === MAX_DEPTH) openers.shift();
    openers.push({ sign, at: out.length });
    out.push(token);
  };
  const close = (index, node) => {
    const start = openers[index].at;
    openers.length = index;
    out.push({ ...node, children: joined(out.splice(start).slice(1)) });
  };

  for (let match; (match = special.exec(text)); special.lastIndex = at) {
    const token = match[0];
    if (match.index > at) out.push(text.slice(at, match.index));
    at = match.index + token.length;
    switch (token[0]) {
      case "\\":
        out.push(token[1]);
        break;
      case "\n":
        if (typeof out.at(-1) === "string") out.push(out.pop().replace(/\\$/, "").trimEnd());
        out.push({ type: "break" });
        break;
      case "`": {
        const end = codeEnds.get(match.index);
        out.push(end === undefined ? token : { type: "code", text: codeText(text.slice(at, end)) });
        if (end !== undefined) at = end + token.length;
        break;
      }
      case "[":
      case "!":
        open(token, token);
        break;
      case "]":
        at = closeBracket(at);
        break;
      case "*":
      case "_":
      case "~":
        mark(token, text[match.index - 1] ?? " ", text[at] ?? " ");
        break;
      default: {
        const url = token[0] === "<" ? token.slice(1, -1) : withoutPunctuation(token);
        if (token[0] !== "<") at -= token.length - url.length;
        out.push(isSafeUrl(url) ? { type: "link", url, children: [url] } : text.slice(match.index, at));
      }
    }
  }
  out.push(text.slice(at));
  return joined(out);

  /** "]": a link or an image (which becomes a link) if an address follows. Returns where to go on. */
  function closeBracket(start) {
    const index = openers.findLastIndex(({ sign }) => sign.endsWith("["));
    const address = index >= 0 && addressAt(text, start);
    if (!address) {
      if (index >= 0) openers.splice(index, 1);
      out.push("]");
      return start;
    }
    const isImage = openers[index].sign === "![";
    close(index, { type: "link", url: address.url });
    const link = out.at(-1);
    link.children = withoutLinks(link.children);
    if (isImage) link.children = [`Image: ${plainText(link.children) || address.url}`];
    else if (!link.children.length) link.children = [address.url];
    if (!isImage) openers.splice(0, Infinity, ...openers.filter(({ sign }) => sign !== "[")); // no link in a link
    return address.end;
  }

  /** A run of "*", "_" or "~~": closes what it can, and opens with the rest. */
  function mark(run, before, after) {
    const inWord = run[0] === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
    let left = run.length <= 3 && !inWord ? run.length : 0;
    while (left && !/\s/.test(before)) {
      const index = openers.findLastIndex(({ sign, at }) => {
        return sign[0] === run[0] && Number(sign[1]) <= left && at < out.length - 1;
      });
      if (index < 0) break;
      left -= Number(openers[index].sign[1]);
      close(index, { type: EMPHASIS[openers[index].sign] });
      if (!left) return;
    }
    if (!left || /\s/.test(after)) out.push(run.slice(0, left || run.length));
    else for (const n of left === 3 ? [1, 2] : [left]) open(run.slice(0, n), run[0] + n);
  }
}

/** Where each run of backticks that begins a code span finds the one that ends it: the next of the same length. */
function findCodeEnds(text) {
  const ends = new Map();
  const next = new Map(); // length of a run -> where the next such run is
  for (const { 0: run, index } of [...text.matchAll(/`+/g)].reverse()) {
    if (next.has(run.length)) ends.set(index, next.get(run.length));
    next.set(run.length, index);
  }
  return ends;
}

function codeText(text) {
  const line = text.replaceAll("\n", " ");
  return line.length > 2 && line.startsWith(" ") && line.endsWith(" ") && !isBlank(line) ? line.slice(1, -1) : line;
}

/** "(address)" or "(address "title")" at `start`, if the address is a safe one. */
function addressAt(text, start) {
  if (text[start] !== "(") return null;
  ADDRESS.lastIndex = start + 1;
  const match = ADDRESS.exec(text);
  if (!match) return null;
  ADDRESS_END.lastIndex = ADDRESS.lastIndex;
  if (!ADDRESS_END.test(text)) return null;
  const url = (match[1] ?? match[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  return isSafeUrl(url) ? { url, end: ADDRESS_END.lastIndex } : null;
}

/** A bare address without what belongs to the sentence around it. */
function withoutPunctuation(url) {
  let end = url.length;
  const closing = url.includes("(") ? ".,;:!?'*_~" : ".,;:!?'*_~)";
  while (closing.includes(url[end - 1])) end--;
  return url.slice(0, end);
}

const withoutLinks = (nodes) =>
  joined(
    nodes.flatMap((node) => {
      if (node.type === "link") return node.children;
      return node.children ? { ...node, children: withoutLinks(node.children) } : node;
    }),
  );

const plainText = (nodes) =>
  nodes.map((node) => (typeof node === "string" ? node : node.text ?? plainText(node.children ?? []))).join("");

/** The nodes with neighbouring strings joined. */
function joined(nodes) {
  const result = [];
  let strings = [];
  for (const node of [...nodes, null]) {
    if (typeof node === "string") {
      strings.push(node);
      continue;
    }
    const text = strings.join("");
    if (text) result.push(text);
    if (node) result.push(node);
    strings = [];
  }
  return result;
}
