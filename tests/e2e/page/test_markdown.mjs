import assert from "node:assert/strict";
import { test } from "node:test";

import { blockNode, MarkdownView } from "../../../lminf_edge/server/page/markdown-view.js";
import { IncrementalParser, isSafeUrl, parse, parseInline } from "../../../lminf_edge/server/page/markdown.js";
import { FakeDocument } from "./fake_document.mjs";

globalThis.document = new FakeDocument();

/** The text as the page would have it, as HTML; the buttons for copying left out. */
const html = (text) => parse(text).map((block) => blockNode(block).html()).join("");

const BLOCKS = [
  ["paragraphs; a line's end is a break", "a\nb\n\n\nc", "<p>a<br>b</p><p>c</p>"],
  ["CRLF", "a\r\n\r\n- b\r\n", "<p>a</p><ul><li>b</li></ul>"],
  ["headings, below the page's own", "# a\n## b ##\n### c\n####### d\n#e", "<h3>a</h3><h3>b</h3><h4>c</h4><p>####### d<br>#e</p>"],
  ["rules", "a\n---\n* * *", "<p>a</p><hr><hr>"],
  ["a quote with blocks", "> a\n>\n> - b\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"],
  ["lists", "- a\n- b\n\n1. c\n2. d", "<ul><li>a</li><li>b</li></ul><ol start=1><li>c</li><li>d</li></ol>"],
  ["a list that goes on at a number", "7) a\n8) b", "<ol start=7><li>a</li><li>b</li></ol>"],
  ["a nested list", "- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"],
  ["two columns are enough to nest", "1. a\n  - b\n2. c", "<ol start=1><li>a<ul><li>b</li></ul></li><li>c</li></ol>"],
  ["tabs nest", "- a\n\t- b", "<ul><li>a<ul><li>b</li></ul></li></ul>"],
  ["an item with paragraphs", "- a\n\n  b\n- c", "<ul><li><p>a</p><p>b</p></li><li>c</li></ul>"],
  ["an item goes on in the next line", "- a\nb", "<ul><li>a<br>b</li></ul>"],
  ["a list ends a paragraph, a year does not", "a\n- b\n\nc\n1984. d", "<p>a</p><ul><li>b</li></ul><p>c<br>1984. d</p>"],
  ["a fence", "```js x\n  a <b>\n\n*c*\n```\nd", "<pre>js:  a <b>\n\n*c*</pre><p>d</p>"],
  ["a fence with a fence in it", "~~~~\n```\n~~~\n~~~~", "<pre>:```\n~~~</pre>"],
  ["a fence that is not closed yet", "```py\nx = 1\n", "<pre>py:x = 1</pre>"],
  ["a fence in an item", "1. a\n   ```\n   b\n\n     c\n   ```\n2. d", "<ol start=1><li>a<pre>:b\n\n  c</pre></li><li>d</li></ol>"],
  ["a table", "| a | b |\n|---|:-:|\n| `c` | d \\| e |\n| f |", "<table>a|b / <code>c</code>|d | e / f</table>"],
  ["a table after a line", "x\na | b\n--|--\nc | d\n\ny", "<p>x</p><table>a|b / c|d</table><p>y</p>"],
  ["no table where the columns differ", "a | b\n---|---|---", "<p>a | b<br>---|---|---</p>"],
];

const INLINE = [
  ["emphasis", "*a* **b** ***c*** _d_ __e__ ~~f~~", "<em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <strong>e</strong> <s>f</s>"],
  ["emphasis in emphasis", "**a *b* c** *d **e***", "<strong>a <em>b</em> c</strong> <em>d <strong>e</strong></em>"],
  ["emphasis in a word", "a*b*c snake_case_name 2 * 3 * 4", "a<em>b</em>c snake_case_name 2 * 3 * 4"],
  ["signs without a partner", "*a **b _c [d ~~e", "*a **b _c [d ~~e"],
  ["code", "`a` ``b`c`` ` d *e* ", "<code>a</code> <code>b`c</code> ` d <em>e</em> "],
  ["code comes first", "*a `b*` c", "*a <code>b*</code> c"],
  ["escapes", "\\*a\\* \\[b](c) \\\\ \\d", "*a* [b](c) \\ \\d"],
  ["HTML is text", "<b>a</b> &amp; <!-- c -->", "<b>a</b> &amp; <!-- c -->"],
  ["links", "[a *b*](https://x.org/c_(d)?e=f&g#h \"t\")", "<a https://x.org/c_(d)?e=f&g#h>a <em>b</em></a>"],
  ["addresses in brackets", "[a](<https://x.org>) <mailto:a@x.org>", "<a https://x.org>a</a> <a mailto:a@x.org>mailto:a@x.org</a>"],
  ["bare addresses", "(see https://x.org/a_b.) **https://x.org**", "(see <a https://x.org/a_b>https://x.org/a_b</a>.) <strong><a https://x.org>https://x.org</a></strong>"],
  ["no link in a link", "[a [b](https://x.org) c](https://y.org)", "[a <a https://x.org>b</a> c](<a https://y.org>https://y.org</a>)"],
  ["an address as a link's text", "[https://x.org](https://y.org)", "<a https://y.org>https://x.org</a>"],
  ["a link without text", "[](https://x.org)", "<a https://x.org>https://x.org</a>"],
  ["an image is a link", "![a **b**](https://x.org/c.png)", "<a https://x.org/c.png>Image: a b</a>"],
  ["an image in a link", "[![a](https://x.org/b.png)](https://y.org)", "<a https://y.org>Image: a</a>"],
];

for (const [name, text, expected] of BLOCKS) test(`blocks: ${name}`, () => assert.equal(html(text), expected));
for (const [name, text, expected] of INLINE) {
  test(`inline: ${name}`, () => assert.equal(html(`.${text}`), `<p>.${expected.trimEnd()}</p>`));
}

const ATTACKS = [
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  '<a href="javascript:alert(1)" onclick="alert(1)">x</a>',
  "<svg/onload=alert(1)>",
  "[x](javascript:alert(1))",
  "[x](JaVaScRiPt:alert%281%29)",
  "[x](\u0001javascript:alert)",
  "[x](java\tscript:alert)",
  "[x](<javascript:alert(1)>)",
  "[x](&#106;avascript:alert)",
  "[x](vbscript:x)",
  "[x](data:text/html;base64,PHNjcmlwdD4=)",
  "[x](file:///etc/passwd)",
  "[x](//evil.example)",
  "[x](/v1/models)",
  "![x](javascript:alert(1))",
  "![x](data:image/svg+xml;base64,PHN2Zz4=)",
  '![x" onerror="alert(1)](https://x.org)',
  '[x](https://x.org"onmouseover="alert(1))',
  "[x](https://x.org 'a' onclick=alert(1))",
  "<https://x.org\" onclick=alert(1)>",
  "<javascript:alert(1)>",
  "https://x.org/<script>",
  "[[x](javascript:a)](javascript:b)",
  "**[x*](javascript:a)** [**y](data:x)**",
  "```\"><script>\n</code></pre><script>alert(1)</script>\n```",
  "| <script> | [x](javascript:a) |\n|---|---|\n| <img onerror=a> | `</td>` |",
  "> - <iframe src=//evil.example>\n>   [x](javascript:a)",
  "# <style>@import 'x'</style>",
  "[x]: javascript:alert(1)\n\n[x]",
  "[x](https://)",
  "[x](https://x.org\\\n@evil)",
];
const ELEMENTS = /^(p|h[3-6]|blockquote|ul|ol|li|pre|code|div|span|button|svg|use|table|thead|tbody|tr|th|td|hr|br|strong|em|s|a)$/;
const ATTRIBUTES = /^(class|start|tabindex|dir|href|target|rel|type|aria-label|aria-hidden|title|data-testid)$/;

function assertHarmless(node) {
  if (node.data !== undefined) return;
  assert.match(node.tag, ELEMENTS);
  for (const [name, value] of Object.entries(node.attributes)) {
    assert.match(name, ATTRIBUTES);
    if (name === "href" && node.tag === "a") assert.match(value, /^(https?:\/\/|mailto:)[^\s]+$/i);
    if (name === "href" && node.tag === "use") assert.match(value, /^#icon-[a-z]+$/);
    if (name === "class") assert.match(value, /^[a-z -]+$/);
  }
  if (node.tag === "a") assert.equal(node.attributes.rel, "noopener noreferrer");
  node.children.forEach(assertHarmless);
}

for (const attack of ATTACKS) {
  test(`harmless: ${JSON.stringify(attack)}`, () => {
    for (const text of [attack, `*${attack}*`, `[${attack}](https://x.org)`, `- ${attack}`, `> ${attack}`]) {
      for (const block of parse(text)) assertHarmless(blockNode(block));
    }
  });
}

test("only addresses of the web and of mailboxes are links", () => {
  for (const url of ["https://x.org", "HTTP://x.org/a?b#c", "mailto:a@x.org"]) assert.ok(isSafeUrl(url), url);
  for (const url of ["", "x.org", "javascript:a", " https://x.org", "https://x.org/\n", "https://a b", "https://", "http:x"]) {
    assert.ok(!isSafeUrl(url), url);
  }
});

/** Pseudorandom numbers, the same in every run (a linear congruential generator, Numerical Recipes' constants). */
function random(seed) {
  return (n) => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return Math.floor((seed / 2 ** 32) * n);
  };
}

const PIECES = [
  "\n", "\n\n", " ", "  ", "    ", "\t", "a", "b c", "- ", "* ", "1. ", "2) ", "> ", "# ", "```", "~~~", "---", "***", "|", " | ",
  "|---|", "|-|-|", "a | b\n-|-\n", "*", "**", "_", "~~", "`", "``", "[", "]", "(", ")", "![", "](https://x.org)", "https://x.org",
  "<", ">", "\\", "\r\n", "```js\n", "é🦉", "<script>", "javascript:",
];

test("text in pieces gives the same blocks as the whole text, and nothing that is final changes", () => {
  for (let seed = 0; seed < 4000; seed++) {
    const pick = random(seed);
    const pieces = Array.from({ length: 1 + pick(40) }, () => PIECES[pick(PIECES.length)]);
    const parser = new IncrementalParser();
    const final = [];
    let open = [];
    for (const piece of pieces) {
      for (const part of pick(2) ? [piece] : [...piece]) {
        const step = parser.push(part);
        final.push(...step.final);
        open = step.open;
      }
    }
    assert.deepEqual([...final, ...open], parse(pieces.join("")), JSON.stringify(pieces.join("")));
  }
});

test("what is shown while the text grows is, at the end, what the whole text shows", () => {
  for (let seed = 0; seed < 500; seed++) {
    const pick = random(seed);
    const pieces = Array.from({ length: 1 + pick(40) }, () => PIECES[pick(PIECES.length)]);
    const container = document.createElement("div");
    const view = new MarkdownView(container);
    for (const piece of pieces) view.push(piece);
    container.children.forEach(assertHarmless);
    assert.equal(container.children.map((node) => node.html()).join(""), html(pieces.join("")), JSON.stringify(pieces));
  }
});

test("code that grows keeps its element", () => {
  const container = document.createElement("div");
  const view = new MarkdownView(container);
  view.push("a\n\n```js\nlet");
  const [, code] = container.children;
  for (const piece of [" x", " = 1;\n", "```", "\n\nb\n\nc\n\nd"]) view.push(piece);
  assert.equal(container.children[1], code);
  assert.equal(container.children.map((node) => node.html()).join(""), "<p>a</p><pre>js:let x = 1;</pre><p>b</p><p>c</p><p>d</p>");
});

const LONG = [
  "*", "**", "_", "*a ", "*a **b ", "a*", "~~", "`", "`a", "a``b`", "[", "![", "]", "[a](", "[a](b", "[a](<", '[a](b "', "[a](b '", "[a] (",
  "[a](https://x.org/(", "](", "<http://", "https://x.org ", "http://a", "\\", "\\\\", "(", ")", "<", "<a", "&", " ", "\t", "\n", " \n", "a\n",
  "> ", "> a\n", ">", "- ", "- a\n", "  - a\n", "- a\n\n", "1. a\n", "# ", "#", "a #", "|", "| a ", "a|b\n-|-\n", "-|", "|\n|", "```\n", "```", "~~~\n",
  "``` ```\n", "---\n", "- - ", "* * ", "\r", "\r\n", "é🦉", "a", "**a** ", "[a](https://x.org) ", "![a](https://x.org)",
];

for (const piece of LONG) {
  test(`linear time: ${JSON.stringify(piece)} again and again`, () => {
    const text = piece.repeat(Math.ceil(200_000 / piece.length));
    const start = performance.now();
    parse(text);
    parse(`${text}x`);
    parseInline(text);
    assert.ok(performance.now() - start < 3000);
  });
}

test("linear time: nested lists and quotes, each line deeper than the one before", () => {
  const start = performance.now();
  const lines = Array.from({ length: 600 }, (_, i) => `${" ".repeat(2 * i)}- a\n${">".repeat(i)} b\n`);
  const depth = (node) => (node.children ? 1 + Math.max(0, ...node.children.map(depth)) : 0);
  for (const block of parse(lines.join(""))) assert.ok(depth(blockNode(block)) < 100);
  assert.ok(performance.now() - start < 3000);
});

test("a paragraph of very many lines is parsed a part at a time", () => {
  const line = `${"word ".repeat(20)}\n`;
  const blocks = parse(line.repeat(1000));
  assert.ok(blocks.length > 20 && blocks.every(({ type }) => type === "paragraph"));
  const parser = new IncrementalParser();
  const final = [];
  for (let i = 0; i < 1000; i++) {
    const step = parser.push(line);
    final.push(...step.final);
    assert.ok(step.open.length <= 2);
  }
  assert.deepEqual(final, blocks.slice(0, final.length));
});

test("a long text that comes in small pieces takes linear time", () => {
  const view = new MarkdownView(document.createElement("div"));
  const start = performance.now();
  for (let i = 0; i < 40_000; i++) view.push(i % 20 ? "word " : "\n\nA *paragraph*: ");
  assert.ok(performance.now() - start < 5000);
});
