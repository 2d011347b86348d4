// Small helpers for nodes of the document.

export const $ = (id) => document.getElementById(id);

/** A new node with properties (names with a dash are attributes) and children. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** A button that is no submit button. */
export function button(label, action, properties = {}) {
  return element("button", { type: "button", textContent: label, onclick: action, ...properties });
}

/** Copy a text; whether it was copied. Browsers offer the clipboard interface only on https and on this machine. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const field = element("textarea", { value: text, className: "unseen", readOnly: true });
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

/** A button that copies what `text()` returns and reports the result in its label for a moment. */
export function copyButton(words, text) {
  const node = button(words.copy, async () => {
    node.textContent = (await copy(text())) ? words.copied : words.not_copied;
    setTimeout(() => (node.textContent = words.copy), 2000);
  }, { className: "copy" });
  return node;
}
