// The anthropic package for JavaScript against a server: node anthropic_client.mjs URL

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const settings = { model: "nano", max_tokens: 16, system: "Go on with the story." };
const messages = [{ role: "user", content: "The ferry left at six, an hour before the sun came over the hills." }];

const models = await client.models.list();
assert.equal(models.data[0].id, "nano");

const whole = await client.messages.create({ ...settings, messages });
assert.equal(whole.stop_reason, "max_tokens");
assert.equal(whole.usage.output_tokens, 16);

// the whole history again, and a new question
messages.push({ role: "assistant", content: whole.content }, { role: "user", content: "And then?" });
const counted = await client.messages.countTokens({ model: "nano", system: settings.system, messages });
const stream = client.messages.stream({ ...settings, messages });
let text = "";
stream.on("text", (part) => (text += part));
const next = await stream.finalMessage();
assert.equal(next.content[0].text, text);
assert.equal(next.usage.input_tokens + next.usage.cache_read_input_tokens, counted.input_tokens);
assert.ok(next.usage.cache_read_input_tokens >= whole.usage.input_tokens);

// a call, and its result
const tool = { name: "look_up", input_schema: { type: "object", properties: { page: { type: "integer" } }, required: ["page"] } };
const tools = { tools: [tool], tool_choice: { type: "tool", name: "look_up" } };
const called = await client.messages.stream({ ...settings, ...tools, max_tokens: 60, messages }).finalMessage();
const call = called.content.at(-1);
assert.equal(called.stop_reason, "tool_use");
assert.equal(typeof call.input.page, "number");
messages.push({ role: "assistant", content: called.content });
messages.push({ role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "A boat." }] });
assert.equal((await client.messages.create({ ...settings, tools: [tool], messages })).content[0].type, "text");

// compaction
const edits = [{ type: "compact_20260112", trigger: { type: "input_tokens", value: 1 } }];
const compacted = await client.beta.messages
  .stream({ ...settings, messages, context_management: { edits }, betas: ["compact-2026-01-12"] })
  .finalMessage();
assert.equal(compacted.content[0].type, "compaction");
const short = [{ role: "assistant", content: compacted.content }, { role: "user", content: "And then?" }];
const after = await client.beta.messages.create({ ...settings, messages: short });
assert.ok(after.usage.cache_read_input_tokens > counted.input_tokens);

await assert.rejects(client.messages.create({ ...settings, messages: "Hello" }), (error) => {
  assert.equal(error.status, 400);
  assert.equal(error.error.error.type, "invalid_request_error");
  return true;
});
console.log("ok");
