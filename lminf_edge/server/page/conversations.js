/**
 * The conversations, kept in this browser's IndexedDB: a record per conversation and one per message, so that a save
 * costs what is new.
 *
 * Several tabs may be open. Every change of a conversation's messages names the revision it was made from; if the
 * stored one is another, it is refused (ConflictError) and nothing is written. Every change is told to the other tabs.
 */

export class ConflictError extends Error {}

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const finished = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });

const from = (id, index) => IDBKeyRange.bound([id, index], [id, Infinity]); // a conversation's messages

export class Conversations {
  #db;
  #channel = new BroadcastChannel("lminf-edge");

  static async open() {
    const request = indexedDB.open("lminf-edge", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages"); // key: [conversation, index]
    };
    const store = new Conversations();
    store.#db = await result(request);
    store.#db.onversionchange = () => store.#db.close(); // a newer page wants to upgrade it
    return store;
  }

  /** Calls `changed({id, revision?, index?, message?})` after each change that another tab made; `message` has grown. */
  listen(changed) {
    this.#channel.onmessage = ({ data }) => changed(data);
  }

  /** All conversations without their messages, the last used first. */
  async list() {
    const all = await result(this.#db.transaction("conversations").objectStore("conversations").getAll());
    return all.sort((a, b) => b.updated - a.updated);
  }

  /** A conversation with its messages, or undefined. */
  async load(id) {
    const transaction = this.#db.transaction(["conversations", "messages"]);
    const [conversation, messages] = await Promise.all([
      result(transaction.objectStore("conversations").get(id)),
      result(transaction.objectStore("messages").getAll(from(id, 0))),
    ]);
    return conversation && { ...conversation, messages };
  }

  /** A new conversation, without messages. */
  async create(fields) {
    const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (n) => n.toString(16).padStart(2, "0")).join("");
    const conversation = { ...fields, id, revision: 0, updated: Date.now() };
    await this.#write(id, (conversations) => conversations.add(conversation));
    return conversation;
  }

  /** Changes fields other than the messages; does nothing if the conversation is gone. */
  update(id, fields) {
    return this.#write(id, async (conversations) => {
      const conversation = await result(conversations.get(id));
      if (conversation) conversations.put({ ...conversation, ...fields });
    });
  }

  /** Puts `messages` in the place of all from `index` on, and changes `fields` with them; returns the new revision. */
  async replaceTail(id, revision, index, messages, fields = {}) {
    await this.#write(id, async (conversations, stored) => {
      const conversation = await this.#expect(conversations, id, revision);
      conversations.put({ ...conversation, ...fields, revision: revision + 1, updated: Date.now() });
      stored.delete(from(id, index));
      messages.forEach((message, i) => stored.put(message, [id, index + i]));
    });
    return revision + 1;
  }

  /** Saves a message that has grown; returns the new revision. */
  async saveMessage(id, revision, index, message) {
    const change = async (conversations, stored) => {
      const conversation = await this.#expect(conversations, id, revision);
      conversations.put({ ...conversation, revision: revision + 1 });
      stored.put(message, [id, index]);
    };
    await this.#write(id, change, { revision: revision + 1, index, message });
    return revision + 1;
  }

  remove(id) {
    return this.#write(id, (conversations, stored) => {
      conversations.delete(id);
      stored.delete(from(id, 0));
    });
  }

  async #expect(conversations, id, revision) {
    const conversation = await result(conversations.get(id));
    if (conversation?.revision !== revision) throw new ConflictError("The conversation was changed in another tab.");
    return conversation;
  }

  async #write(id, change, news = {}) {
    const transaction = this.#db.transaction(["conversations", "messages"], "readwrite");
    const end = finished(transaction);
    end.catch(() => {}); // reported below, or by `change` first
    await change(transaction.objectStore("conversations"), transaction.objectStore("messages"));
    await end;
    this.#channel.postMessage({ id, ...news });
  }
}
