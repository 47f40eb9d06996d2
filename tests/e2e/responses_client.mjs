// The Responses API by the openai package for JavaScript against a server: node responses_client.mjs URL

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const settings = { model: "nano", max_output_tokens: 16, instructions: "Go on with the story." };
const input = "The ferry left at six, an hour before the sun came over the hills.";

const first = await client.responses.create({ ...settings, input });
assert.equal(first.status, "incomplete");
assert.equal(first.usage.output_tokens, 16);

// on from a stored response
let text = "";
let last = null;
let n = 0;
const asked = { ...settings, input: "And then?", previous_response_id: first.id };
for await (const event of await client.responses.create({ ...asked, stream: true })) {
  assert.equal(event.sequence_number, n++);
  if (event.type === "response.output_text.delta") text += event.delta;
  last = event;
}
assert.equal(last.type, "response.incomplete");
assert.equal(last.response.output[0].content[0].text, text);
assert.ok(last.response.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens);
assert.equal((await client.responses.retrieve(last.response.id)).output_text, text);

// a call, and its output
const parameters = { type: "object", properties: { page: { type: "integer" } }, required: ["page"] };
const tools = [{ type: "function", name: "look_up", parameters, strict: false }, { type: "web_search" }];
const called = await client.responses
  .stream({ ...settings, max_output_tokens: 60, input, tools, tool_choice: "required" })
  .finalResponse();
const call = called.output.at(-1);
assert.equal(typeof JSON.parse(call.arguments).page, "number");
const output = { type: "function_call_output", call_id: call.call_id, output: "A boat." };
const more = await client.responses.create({ ...settings, tools, input: [output], previous_response_id: called.id });
assert.equal(more.output[0].type, "message");

// compaction
const context_management = [{ type: "compaction", compact_threshold: 1 }];
const compacted = await client.responses.create({ ...settings, input, context_management, store: false });
assert.equal(compacted.output[0].type, "compaction");
const short = [...compacted.output, { role: "user", content: "And then?" }];
const after = await client.responses.create({ ...settings, input: short });
assert.ok(after.usage.input_tokens > compacted.usage.input_tokens);

await client.responses.delete(first.id);
await assert.rejects(client.responses.retrieve(first.id), { status: 404 });
await assert.rejects(client.responses.create({ ...asked, previous_response_id: "resp_none" }), { status: 400 });
console.log("ok");
