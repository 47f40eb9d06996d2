/** The only way this page makes elements: names and attributes from the code, everything else as text. */

/** An element; attributes that are false or undefined are left out. Children: nodes, strings (text), lists of them. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) node.append(child);
  return node;
}

/** An icon of those in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function button(label, onclick, attributes = {}) {
  const node = el("button", { type: "button", ...attributes }, label);
  node.addEventListener("click", onclick);
  return node;
}

export function iconButton(name, label, onclick, attributes = {}) {
  return button(icon(name), onclick, { class: "icon-button", "aria-label": label, title: label, ...attributes });
}

/** A button that copies what `text()` returns. */
export function copyButton(label, text) {
  const node = iconButton("copy", label, copy, { "data-testid": "copy" });
  return node;

  async function copy() {
    const done = await copyText(text());
    announce(done ? "Copied" : "Could not be copied");
    node.replaceChildren(icon(done ? "check" : "close"));
    setTimeout(() => node.replaceChildren(icon("copy")), 1500);
  }
}

async function copyText(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  // Without HTTPS, on another address than this machine's own, browsers offer the old way only.
  const focused = document.activeElement;
  const area = el("textarea", { class: "visually-hidden", readonly: true, "aria-label": "Copied text" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** Lets a screen reader say something when it is done with what it says. */
export function announce(text) {
  const live = document.getElementById("announcer");
  live.textContent = "";
  setTimeout(() => (live.textContent = text), 100);
}

/** Enter submits, Shift+Enter breaks the line; while an input method composes, Enter is its own. */
export function submitOnEnter(textarea) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    textarea.form.requestSubmit();
  });
}

/** Makes a text area as high as its text (CSS sets the limits), in browsers that cannot do it by themselves. */
export function growWithText(textarea) {
  if (CSS.supports("field-sizing", "content")) return;
  const grow = () => {
    textarea.style.height = "auto";
    textarea.style.height = `${textarea.scrollHeight + textarea.offsetHeight - textarea.clientHeight}px`;
  };
  textarea.addEventListener("input", grow);
  requestAnimationFrame(grow);
}
