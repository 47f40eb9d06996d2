import assert from "node:assert/strict";
import { test } from "node:test";

import { EventParser, readEvents } from "../../../lminf_edge/server/page/sse.js";

const EXAMPLES = [
  ["one event", "data: hello\n\n", ["hello"]],
  ["no space after the colon, only one taken away", "data:a\n\ndata:  b\n\n", ["a", " b"]],
  ["several lines", "data: a\ndata:\ndata: b\n\n", ["a\n\nb"]],
  ["a field without colon", "data\n\n", [""]],
  ["comments and unknown fields", ": keep-alive\n\nid: 7\nretry: 10\n: data: x\ndata: a\nfoo: bar\n\n", ["a"]],
  ["no event without data", "event: ping\n\ndata: a\n\n", ["a"]],
  ["an end without an empty line", "data: a\n\ndata: b\n", ["a"]],
  ["all line ends", "data: a\r\n\r\ndata: b\r\rdata: c\n\ndata: d\r\n\ndata: e\n\r\n", ["a", "b", "c", "d", "e"]],
  ["characters of two, three and four bytes", "data: é – 🦉\n\n", ["é – 🦉"]],
  ["other line separators are text", "data: a\u2028b\u0085c\n\n", ["a\u2028b\u0085c"]],
  ["a byte order mark", "\ufeffdata: a\n\n", ["a"]],
];

async function eventsOf(pieces) {
  const stream = new ReadableStream({
    start(controller) {
      for (const piece of pieces) controller.enqueue(piece);
      controller.close();
    },
  });
  const data = [];
  for await (const event of readEvents(stream)) data.push(event.data);
  return data;
}

for (const [name, text, expected] of EXAMPLES) {
  test(`${name}: in one piece, byte by byte, and cut in two anywhere`, async () => {
    const bytes = new TextEncoder().encode(text);
    assert.deepEqual(await eventsOf([bytes]), expected);
    assert.deepEqual(await eventsOf(Array.from(bytes, (byte) => Uint8Array.of(byte))), expected);
    for (let i = 0; i <= bytes.length; i++) {
      assert.deepEqual(await eventsOf([bytes.slice(0, i), bytes.slice(i)]), expected, `cut at ${i}`);
    }
  });
}

test("the type of an event holds for that event", () => {
  const events = new EventParser().push("event: error\ndata: a\n\ndata: b\n\n");
  assert.deepEqual(events, [
    { type: "error", data: "a" },
    { type: "message", data: "b" },
  ]);
});

test("leaving the loop cancels the stream", async () => {
  let cancelled = false;
  const stream = new ReadableStream({
    pull: (controller) => controller.enqueue(new TextEncoder().encode("data: [DONE]\n\n")),
    cancel: () => (cancelled = true),
  });
  for await (const event of readEvents(stream)) {
    assert.equal(event.data, "[DONE]");
    break;
  }
  assert.ok(cancelled);
});

test("an error of the stream is passed on", async () => {
  const stream = new ReadableStream({ pull: (controller) => controller.error(new TypeError("network error")) });
  await assert.rejects(async () => {
    for await (const event of readEvents(stream)) assert.fail(event);
  }, /network error/);
});

test("a line that arrives in very many pieces takes linear time", () => {
  const parser = new EventParser();
  const start = performance.now();
  parser.push("data: ");
  for (let i = 0; i < 300_000; i++) parser.push("xy");
  const [event] = parser.push("\n\n");
  assert.equal(event.data.length, 600_000);
  assert.ok(performance.now() - start < 2000);
});
