/** The page: which conversation is shown, and what the user does with it. */

import { Api, apiKey } from "./api.js";
import { Composer } from "./composer.js";
import { ConflictError, Conversations } from "./conversations.js";
import { ask } from "./dialogs.js";
import { announce } from "./dom.js";
import { isAsking, parseTools } from "./messages.js";
import { loadSettings, saveSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { showStatus } from "./status.js";
import { Thread } from "./thread.js";
import { Turn } from "./turn.js";

const READING_MS = 1000;
const SAID = 1000; // characters of a finished answer that a screen reader is given to say

const $ = (id) => document.getElementById(id);
const api = new Api(askKey);
const sidebar = new Sidebar();
const composer = new Composer({ send, stop: () => shown.turn?.stop() });
const thread = new Thread({ edit, regenerate, retry, results });
const server = { model: "", cache: {}, recalls: false };
const chats = new Map(); // id -> those shown or being answered: a record of the store, with messages, turn and problem
let shown = newChat();
let store;
let statusFrame = 0;
let isWatching = false;

start();

async function start() {
  thread.show(shown);
  try {
    store = await Conversations.open();
  } catch (error) {
    showBanner(`This browser does not keep data for this page, so there can be no conversations: ${error.message}`);
    $("composer").inert = true;
    return;
  }
  store.listen(changedElsewhere);
  addEventListener("hashchange", route);
  document.addEventListener("visibilitychange", saveTurns);
  document.addEventListener("visibilitychange", watchReading);
  addEventListener("pagehide", saveTurns);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]")) shown.turn?.stop();
  });
  $("rename").addEventListener("click", rename);
  $("delete").addEventListener("click", remove);
  $("settings").addEventListener("click", changeSettings);
  $("forget-key").addEventListener("click", () => {
    apiKey.forget();
    $("forget-key").hidden = true;
  });
  $("system").addEventListener("change", changeSystem);
  $("tools").addEventListener("change", changeTools);
  $("begin").addEventListener("click", () => composer.focus());
  await route();
  await connect();
}

function newChat() {
  return { id: null, title: "", system: "", tools: "", messages: [], turn: null, problem: null };
}

/* The server */

async function connect() {
  $("banner").hidden = true;
  try {
    const props = await api.props();
    const { window, sink, kv_bytes } = props.lminf ?? {}; // the rest is not about a conversation
    server.cache = { window, sink, kv_bytes };
    server.recalls = Boolean(props.lminf?.recall);
    server.model = props.model_alias || (await api.models())[0];
    $("model").textContent = server.model;
    refreshStatus();
    watchReading();
  } catch (error) {
    showBanner(error.message, connect);
  }
}

function showBanner(text, retry) {
  $("banner").hidden = false;
  $("banner-text").textContent = text;
  $("banner-retry").hidden = !retry;
  $("banner-retry").onclick = retry;
}

async function askKey(why) {
  $("key-error").textContent = why;
  const answer = await ask("key-dialog");
  if (answer) apiKey.set(answer.key.trim(), answer.remember === "on");
  return Boolean(answer);
}

/* Which conversation is shown: the one that the address names */

async function route() {
  const id = location.hash.slice(1);
  sidebar.close();
  let chat;
  if (id && id !== "new") chat = await load(id);
  if (location.hash.slice(1) !== id) return; // the user went on
  if (!chat) chat = newChat();
  if (id && id !== "new" && !chat.id) {
    history.replaceState(null, "", "#new");
    chat.problem = { text: "This browser has no such conversation. It may have been deleted." };
  }
  if (shown.id && !shown.turn) chats.delete(shown.id);
  if (chat.id) chats.set(chat.id, chat);
  shown = chat;
  composer.open(chat.id);
  $("system").value = chat.system;
  $("tools").value = chat.tools;
  $("tools-problem").textContent = "";
  $("system-prompt").open = $("tools-prompt").open = false;
  thread.show(chat);
  refresh();
  watchReading();
  composer.focus();
}

async function load(id) {
  if (chats.has(id)) return chats.get(id);
  const stored = await store.load(id);
  return stored && withNotice({ ...newChat(), ...stored });
}

/** After a reload, or an answer that was stopped early, the last message may be without an answer. */
function withNotice(chat) {
  if (isAsking(chat.messages.at(-1))) chat.problem ??= { text: "This message has no answer yet.", retry: "Ask again" };
  return chat;
}

/** Shows the state of things. */
function refresh() {
  const { id, title, turn } = shown;
  $("title").textContent = title || "New conversation";
  document.title = title ? `${title} – lminf-edge` : "lminf-edge";
  $("actions").hidden = !id;
  composer.busy = Boolean(turn);
  thread.refresh();
  refreshStatus();
  refreshList();
}

function refreshStatus() {
  statusFrame = 0;
  showStatus({ ...server.cache, ...shown.turn?.cache, ...(shown.turn ?? shown).stats, reading: shown.reading });
}

/**
 * Shows how far the server is with reading what it skipped of the conversation, until it has: after an answer, and when the
 * conversation or the page is opened again. Asks once if there is nothing to be read, and never while nobody can see it.
 */
async function watchReading() {
  if (isWatching) return;
  isWatching = true;
  for (let chat = null; server.recalls && shown.id && !shown.turn && !document.hidden; ) {
    chat = shown;
    const told = (await api.props(chat.id).catch(() => null))?.lminf?.conversation;
    if (chat !== shown || chat.turn) continue; // the user went on
    if (told) {
      const { position, skipped, archived } = told;
      chat.stats = { skipped, ...chat.stats, position, archived, estimated: false }; // skipped: for the last answer
    }
    chat.reading = told?.unread ? { n_read: told.n_read, n_tokens: told.position } : null;
    refreshStatus();
    if (!chat.reading) break;
    await new Promise((resolve) => setTimeout(resolve, READING_MS));
  }
  isWatching = false;
}

async function refreshList() {
  const writing = new Set([...chats.values()].filter(({ turn }) => turn).map(({ id }) => id));
  sidebar.render(await store.list(), shown.id, writing);
}

/** Another tab changed something. An answer being written here finds out when it is saved. */
async function changedElsewhere({ id, revision, index, message }) {
  if (!message) refreshList();
  if (id !== shown.id || shown.turn || thread.isEditing) return;
  if (message && revision === shown.revision + 1) {
    shown.revision = revision;
    shown.messages[index] = message;
    thread.update();
  } else await reload(shown);
}

/** Takes a conversation from the store again. */
async function reload(chat) {
  const stored = await store.load(chat.id);
  if (stored) Object.assign(chat, stored, { problem: null });
  else chats.delete(chat.id);
  if (chat !== shown) return;
  if (stored) {
    refresh();
    return;
  }
  const text = composer.text;
  await route();
  composer.text ||= text;
}

/* Asking and answering */

async function send(text, files) {
  const chat = shown;
  if (await commit(chat, chat.messages.length, [userMessage(text, files)])) {
    if (chat === shown) composer.sent(chat.id);
    answer(chat);
  }
}

async function edit(index, text) {
  const chat = shown;
  if (chat.turn) return;
  const isKept = await commit(chat, index, [userMessage(text, chat.messages[index].files)]);
  composer.focus();
  if (isKept) answer(chat);
  else composer.text = [composer.text, text].filter(Boolean).join("\n\n"); // nothing that was typed is lost
}

/** What the model's calls returned, as the user says. */
async function results(messages) {
  const chat = shown;
  if (await commit(chat, chat.messages.length, messages)) answer(chat);
}

const userMessage = (content, files) => ({ role: "user", content, ...(files?.length ? { files } : {}) });

/** Puts messages in the place of all from `index` on. Returns whether that could be kept. */
async function commit(chat, index, messages) {
  if (chat.turn || chat.isCommitting) return false;
  chat.isCommitting = true;
  try {
    const fields = index === 0 && !chat.isRenamed ? { title: titleOf(messages[0]) } : {};
    if (!chat.id) {
      Object.assign(chat, await store.create({ ...fields, system: chat.system, tools: chat.tools }));
      if (chat === shown) {
        chats.set(chat.id, chat);
        history.replaceState(null, "", `#${chat.id}`);
      }
    }
    chat.revision = await store.replaceTail(chat.id, chat.revision, index, messages, fields);
    Object.assign(chat, fields);
  } catch (error) {
    await failed(chat, error);
    return false;
  } finally {
    chat.isCommitting = false;
  }
  chat.messages.splice(index, Infinity, ...messages);
  return true;
}

/** The first words, or the name of a file. */
function titleOf({ content, files }) {
  const words = (content.trim() ? content : files[0].name).slice(0, 500).trim().replace(/\s+/g, " ");
  if (words.length <= 50) return words;
  const end = words.lastIndexOf(" ", 50);
  return `${words.slice(0, end > 20 ? end : 50)}…`;
}

/** Asks for an answer; `previous` is the one it replaces, which stays if none comes. */
async function answer(chat, previous = null) {
  const turn = new Turn(store, chat);
  chat.turn = turn;
  chat.problem = chat.reading = null;
  chats.set(chat.id, chat);
  if (chat === shown) {
    refresh();
    thread.scrollToEnd();
  }
  await turn.run(api, { model: server.model, ...loadSettings() }, () => {
    if (chat !== shown) return;
    thread.update();
    statusFrame ||= requestAnimationFrame(refreshStatus);
  });
  chat.turn = null;
  if (chat !== shown) chats.delete(chat.id);
  if (!turn.answer && previous) chat.messages.push(previous);
  if (turn.answer) chat.stats = turn.stats;
  Object.assign(server.cache, turn.cache);
  if (turn.error) await failed(chat, turn.error);
  else if (turn.answer) await store.update(chat.id, { stats: chat.stats });
  else if (!turn.stopped) chat.problem = { text: "The model has nothing to say to this.", retry: "Ask again" };
  withNotice(chat);
  if (chat !== shown) {
    refreshList();
    return;
  }
  refresh();
  watchReading();
  if (turn.answer) announce(`${turn.stopped ? "Stopped. " : ""}${saidBy(turn.answer)}`);
}

function saidBy({ content, tool_calls }) {
  return [content.slice(0, SAID), ...(tool_calls ?? []).map(({ name }) => `Called ${name}.`)].filter(Boolean).join(" ");
}

async function failed(chat, error) {
  if (error instanceof ConflictError) {
    await reload(chat);
    chat.problem = { text: `${error.message} This is how it is now.`, isError: true };
  } else chat.problem = { text: error.message, isError: true, retry: chat.messages.length > 0 && "Try again" };
  if (chat === shown) refresh();
}

function regenerate() {
  if (shown.turn || shown.messages.at(-1)?.role !== "assistant") return;
  composer.focus();
  answer(shown, shown.messages.pop());
}

function retry() {
  if (shown.messages.at(-1)?.role === "assistant") regenerate();
  else if (!shown.turn) {
    composer.focus();
    answer(shown);
  }
}

function saveTurns() {
  for (const { turn } of chats.values()) turn?.save();
}

/* The rest of what can be done with a conversation */

async function rename() {
  const chat = shown;
  const fields = await ask("rename-dialog", { title: chat.title });
  if (!fields?.title.trim()) return;
  Object.assign(chat, { title: fields.title.trim(), isRenamed: true });
  await store.update(chat.id, { title: chat.title, isRenamed: true });
  refresh();
}

async function remove() {
  const chat = shown;
  $("delete-title").textContent = chat.title;
  if (!(await ask("delete-dialog"))) return;
  chat.turn?.stop();
  await store.remove(chat.id);
  chats.delete(chat.id);
  shown = newChat();
  history.replaceState(null, "", "#new");
  await route();
  announce("Deleted");
}

async function changeSystem() {
  shown.system = $("system").value;
  if (shown.id) await store.update(shown.id, { system: shown.system });
}

async function changeTools() {
  shown.tools = $("tools").value;
  $("tools-problem").textContent = "";
  try {
    parseTools(shown.tools);
  } catch (error) {
    $("tools-problem").textContent = error.message;
  }
  if (shown.id) await store.update(shown.id, { tools: shown.tools });
}

async function changeSettings() {
  $("forget-key").hidden = !apiKey.get();
  const fields = await ask("settings-dialog", loadSettings());
  if (fields) saveSettings(fields);
}
