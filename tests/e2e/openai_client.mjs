// The openai package for JavaScript against a server: node openai_client.mjs URL

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [
  { role: "system", content: "Go on with the story." },
  { role: "user", content: "The ferry left at six, an hour before the sun came over the hills." },
];
const settings = { model: "nano", max_tokens: 16, temperature: 0 };

const models = await client.models.list();
assert.equal(models.data[0].id, "nano");

const whole = await client.chat.completions.create({ ...settings, messages });
assert.equal(whole.choices[0].finish_reason, "length");
assert.equal(whole.usage.completion_tokens, 16);

let text = "";
let usage = null;
const stream = await client.chat.completions.create({
  ...settings,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, 16);
assert.ok(usage.prompt_tokens_details.cached_tokens > 0);

// the whole history again, and a new question
messages.push({ role: "assistant", content: text }, { role: "user", content: "And then?" });
const next = await client.chat.completions.create({ ...settings, messages });
assert.ok(next.usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens);

// a stream that is left early
const left = await client.chat.completions.create({ ...settings, max_tokens: 100000, messages, stream: true });
for await (const chunk of left) {
  if (chunk.choices[0]?.delta?.content) break;
}

await assert.rejects(client.chat.completions.create({ ...settings, messages: "Hello" }), (error) => {
  assert.equal(error.status, 400);
  assert.match(error.message, /messages/);
  return true;
});
await assert.rejects(client.models.retrieve("other"), { status: 404 });
console.log("ok");
