/** One answer being asked for: the request, what has arrived of it, and its way into the store. */

import { ConflictError } from "./conversations.js";
import { asSent, parseTools } from "./messages.js";

const SAVE_MS = 1000;

export class Turn {
  answer = null; // the message, once something of it has arrived
  progress = null; // {processed, total} while the server reads the prompt
  error = null;
  cache = {}; // {window, sink, kv_bytes}, when the server has said so
  #store;
  #chat;
  #index; // the answer's among the conversation's messages
  #abort = new AbortController();
  #timer = 0;
  #saving = Promise.resolve();
  #stored = false;
  #stats; // {position, skipped, archived, estimated, tokens_per_second}: what the server said last, and what came since
  #first = null; // {time, n}: when the first piece of text came, and how many have come after it

  /** `chat` has the messages so far; the answer is added to them. */
  constructor(store, chat) {
    this.#store = store;
    this.#chat = chat;
    this.#index = chat.messages.length;
    this.#stats = { position: chat.stats?.position, estimated: chat.stats?.estimated };
  }

  /** Whether it was stopped: by the user, or because it cannot be kept. */
  get stopped() {
    return this.#abort.signal.aborted;
  }

  /** What the status line shows; between two reports of the server, a piece of text counts as a token. */
  get stats() {
    const seconds = this.#first && (performance.now() - this.#first.time) / 1000;
    return { tokens_per_second: seconds > 0.5 ? this.#first.n / seconds : undefined, ...this.#stats };
  }

  stop() {
    this.#abort.abort();
  }

  /** Runs to the end, whatever that is; `error` and `stopped` then say how it went. `options`: model, temperature... */
  async run(api, options, changed) {
    const { id, system, messages, tools } = this.#chat;
    const history = messages.map(asSent);
    if (system) history.unshift({ role: "system", content: system });
    try {
      // the server may go on with a conversation that has a name, whatever part of it is sent
      const request = { ...options, messages: history, tools: parseTools(tools), prompt_cache_key: id };
      if (messages.at(-1)?.files) request.lminf = { prefill: "full" }; // a file is to be read, not only its end
      for await (const chunk of api.chat(request, this.#abort.signal)) {
        this.#take(chunk);
        changed();
      }
      if (this.answer) this.answer.state = "finished";
    } catch (error) {
      if (!this.stopped) this.error = error;
    }
    await this.save();
  }

  #take({ choices, prompt_progress, timings, lminf }) {
    if (prompt_progress) {
      this.progress = prompt_progress;
      Object.assign(this.#stats, { position: prompt_progress.processed, estimated: true });
    }
    const delta = choices?.[0]?.delta;
    if (delta?.content || delta?.reasoning_content || delta?.tool_calls) this.#grow(delta);
    if (choices?.[0]?.finish_reason && this.answer) this.answer.finish = choices[0].finish_reason;
    if (timings) this.#stats.tokens_per_second = timings.predicted_per_second;
    if (lminf) {
      const { position, skipped, archived, window, sink, kv_bytes } = lminf;
      this.cache = { window, sink, kv_bytes };
      Object.assign(this.#stats, { position, skipped, archived, estimated: false });
    }
  }

  #grow({ content, reasoning_content, tool_calls }) {
    if (!this.answer) {
      this.answer = { role: "assistant", content: "", state: "stopped" }; // what a reload finds
      this.#chat.messages.push(this.answer);
      this.#first = { time: performance.now(), n: -1 };
    }
    if (content) this.answer.content += content;
    if (reasoning_content) this.answer.reasoning = (this.answer.reasoning ?? "") + reasoning_content;
    for (const call of tool_calls ?? []) this.#growCall(call);
    this.#first.n++;
    if (this.#stats.position !== undefined) this.#stats.position++;
    this.#stats.estimated = true;
    // A long answer is saved less often: each save writes all of it.
    this.#timer ||= setTimeout(() => this.save(), SAVE_MS + this.answer.content.length / 100);
  }

  #growCall({ index, id, function: part }) {
    this.answer.tool_calls ??= [];
    const call = (this.answer.tool_calls[index] ??= { id, name: "", arguments: "" });
    call.name += part?.name ?? "";
    call.arguments += part?.arguments ?? "";
  }

  /** Saves what there is. If that fails, the answer ends here: it would be lost. */
  save() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#saving = this.#saving.then(() => this.#save()).catch((error) => {
      this.error = error;
      this.stop();
    });
    return this.#saving;
  }

  async #save() {
    if (!this.answer || this.error instanceof ConflictError) return;
    const { id, revision } = this.#chat;
    const answer = structuredClone(this.answer); // as it is now: it may grow meanwhile
    this.#chat.revision = this.#stored
      ? await this.#store.saveMessage(id, revision, this.#index, answer)
      : await this.#store.replaceTail(id, revision, this.#index, [answer]);
    this.#stored = true;
  }
}
