/** The dialogs of index.html, asked as questions. */

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("[data-cancel]").addEventListener("click", () => dialog.close());
}

/** Opens a dialog with its fields filled in; returns their values, or null if it was closed without the main button. */
export function ask(id, values = {}) {
  const dialog = document.getElementById(id);
  const form = dialog.querySelector("form");
  form.reset();
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
  return new Promise((resolve) => {
    let answer = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      answer = Object.fromEntries(new FormData(form));
      dialog.close();
    };
    dialog.onclose = () => resolve(answer);
    dialog.showModal();
  });
}
