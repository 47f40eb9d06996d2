/** The status line: where the stream is, and what it costs. */

const UNKNOWN = "–";

const fields = Object.fromEntries(
  ["position", "skipped", "archived", "reading", "window", "kv-memory", "speed"].map((name) => [name, document.getElementById(name)]),
);

/**
 * All as far as they are known, `skipped` and `archived` only if there are any, and `reading` ({n_read, n_tokens}) while that lasts;
 * `estimated`: the position and the speed are.
 */
export function showStatus({ position, skipped, archived, reading, window, sink, kv_bytes, tokens_per_second, estimated }) {
  const about = estimated ? "≈ " : "";
  fields.position.textContent = known(position) ? about + count(position) : UNKNOWN;
  for (const [name, n] of Object.entries({ skipped, archived })) {
    fields[name].parentElement.hidden = !n;
    fields[name].textContent = known(n) ? count(n) : UNKNOWN;
  }
  fields.reading.parentElement.hidden = !reading;
  fields.reading.textContent = reading ? `${Math.floor((100 * reading.n_read) / reading.n_tokens)} %` : UNKNOWN;
  fields.window.textContent = known(window) ? (sink ? `${count(sink)} + ` : "") + count(window) : UNKNOWN;
  fields["kv-memory"].textContent = known(kv_bytes) ? bytes(kv_bytes) : UNKNOWN;
  fields.speed.textContent = known(tokens_per_second)
    ? about + tokens_per_second.toFixed(tokens_per_second < 100 ? 1 : 0)
    : UNKNOWN;
}

const known = (n) => Number.isFinite(n);

export const count = (n) => n.toLocaleString("en");

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; n >= 1024 && unit < units.length - 1; unit++) n /= 1024;
  return `${n.toFixed(unit && n < 100 ? 1 : 0)} ${units[unit]}`;
}
