/** Server-sent events out of a byte stream (WHATWG HTML, section 9.2.6): the server's answers arrive as these. */

export class EventParser {
  #line = ""; // what has arrived of the line that is being received
  #data = [];
  #type = "";
  #afterCR = false; // the last piece ended in CR: an LF at the start of the next belongs to it

  /** Takes the next piece of text, cut anywhere; returns the events it completes, each {type, data}. */
  push(text) {
    const events = [];
    let start = this.#afterCR && text.startsWith("\n") ? 1 : 0;
    if (text) this.#afterCR = text.endsWith("\r");
    for (const end of text.matchAll(/\r\n|\r|\n/g)) {
      if (end.index < start) continue;
      this.#take(this.#line + text.slice(start, end.index), events);
      this.#line = "";
      start = end.index + end[0].length;
    }
    this.#line += text.slice(start);
    return events;
  }

  #take(line, events) {
    if (line === "") {
      if (this.#data.length) events.push({ type: this.#type || "message", data: this.#data.join("\n") });
      this.#data = [];
      this.#type = "";
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon); // "" for a comment
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#type = value;
  }
}

/** The events of a ReadableStream of UTF-8 bytes. Leaving the loop early cancels the stream. */
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event without its empty line is incomplete, and dropped
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
