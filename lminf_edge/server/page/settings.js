/** How answers are sampled, kept in this browser. What is empty is left to the server. */

const KEY = "lminf-edge.settings";

/** {temperature?, max_tokens?, seed?}: as the API takes them. */
export function loadSettings() {
  return JSON.parse(localStorage.getItem(KEY) ?? "{}");
}

/** `fields`: a form's values, all of them strings. */
export function saveSettings(fields) {
  const filled = Object.entries(fields).filter(([, value]) => value.trim() !== "");
  localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(filled.map(([name, value]) => [name, Number(value)]))));
}
