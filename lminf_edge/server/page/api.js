/** The server's HTTP interface, as far as the page needs it, and the API key. */

import { readEvents } from "./sse.js";

const KEY = "lminf-edge.key";

export class ApiError extends Error {}

/** The key is kept for this tab, or for this browser if the user says so. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY),
  set(key, remember) {
    this.forget();
    (remember ? localStorage : sessionStorage).setItem(KEY, key);
  },
  forget() {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  },
};

export class Api {
  #askKey;
  #asking = null; // one question at a time, whatever number of requests need the key

  /** `askKey(why)` asks the user for a key, keeps it, and tells whether there is one now. */
  constructor(askKey) {
    this.#askKey = askKey;
  }

  /** The server's properties; with the id of a conversation also where that is, `lminf.conversation`. */
  async props(id) {
    return (await this.#fetch("props", id ? { headers: { "X-Conversation-Id": id } } : {})).json();
  }

  async models() {
    const { data } = await (await this.#fetch("v1/models")).json();
    return data.map((model) => model.id);
  }

  /** The chunks of a streamed answer; aborting `signal` makes the server stop. */
  async *chat(request, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        ...request,
        stream: true,
        stream_options: { include_usage: true },
        return_progress: true,
        timings_per_token: true,
      }),
      signal,
    });
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      throw new ApiError("What answers here is not a lminf-edge server.");
    }
    try {
      for await (const { data } of readEvents(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message);
        yield chunk;
      }
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
      throw new ApiError("The connection broke off.", { cause: error });
    }
    throw new ApiError("The connection ended before the answer did.");
  }

  async #fetch(path, init = {}) {
    for (;;) {
      const key = apiKey.get();
      const headers = key ? { ...init.headers, Authorization: `Bearer ${key}` } : init.headers;
      let response;
      try {
        response = await fetch(path, { ...init, headers, cache: "no-store" });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The server cannot be reached.", { cause: error });
      }
      if (response.ok) return response;
      const error = await errorOf(response);
      if (response.status !== 401) throw error;
      if (apiKey.get() !== key) continue; // another request has asked meanwhile
      this.#asking ??= this.#askKey(key ? error.message : "").finally(() => (this.#asking = null));
      if (!(await this.#asking)) throw error;
    }
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return new ApiError(body?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`);
}
