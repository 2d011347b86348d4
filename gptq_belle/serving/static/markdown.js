// Markdown with formulas and highlighted code to nodes of the document. Model output is not trusted: its HTML is shown
// as text, its pictures are links, links lead to http and https only, and DOMPurify checks the result.
import { copyButton, element } from "./dom.js";

const { marked, DOMPurify, katex, hljs } = globalThis;
const ALLOWED = { RETURN_DOM_FRAGMENT: true, FORBID_TAGS: ["img", "form", "input", "style"], FORBID_ATTR: ["style"],
  ADD_ATTR: ["target"] };
const FORMULAS = { displayMode: false, throwOnError: true, trust: false, strict: "ignore", maxSize: 20 };
const WEB = /^https?:\/\//i;
const ADDRESS = /^https?:\/\/[^\s<>"'`，。；：！？）】》]*[^\s<>"'`，。；：！？）】》.,;:!?)\]*_~]/i;
const BLOCK_FORMULA = /^ {0,3}(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/;
// A single dollar opens a formula if no space comes after it and no digit after the closing one: $5 and $10 are prices.
const INLINE_FORMULA = /^(?:\$\$([^$\n]+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?!\s)((?:\\.|[^\\$\n])*(?:\\.|[^\\$\s]))\$(?!\d))/;

const escape = (text) => text.replace(/[&<>"']/g, (mark) => `&#${mark.charCodeAt(0)};`);

function formula(name, level, pattern, start) {
  return {
    name, level, start: (source) => source.match(start)?.index,
    tokenizer(source) {
      const match = pattern.exec(source);
      if (!match) return undefined;
      const display = level === "block" || match[1] !== undefined || match[2] !== undefined;
      return { type: name, raw: match[0], text: match.slice(1).find((part) => part !== undefined), display };
    },
    renderer: ({ raw, text, display }) => `<span class="formula" data-raw="${escape(raw.trim())}" `
      + `data-display="${display}">${escape(text)}</span>`,
  };
}

const renderer = {
  html: ({ text, block }) => (block ? `<div class="plain">${escape(text)}</div>` : escape(text)),
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  image: ({ href, text, raw }) => (WEB.test(href) ? anchor(href, escape(text || href)) : escape(raw)),
  link({ href, tokens, raw }) {
    return WEB.test(href) ? anchor(href, this.parser.parseInline(tokens)) : escape(raw);
  },
  heading({ tokens, depth }) { // the page's own heading is h1
    const level = Math.min(6, depth + 1);
    return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
  },
  code({ text, lang }) {
    const language = lang?.match(/^[\w+#.-]+/)?.[0] ?? "";
    const known = hljs.getLanguage(language);
    const inner = known ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escape(text);
    return `<pre data-language="${escape(language)}"><code>${inner}</code></pre>`;
  },
};
const tokenizer = {
  url(source) { // as GFM, but an address ends before Chinese punctuation
    const raw = ADDRESS.exec(source)?.[0];
    return raw && { type: "link", raw, href: raw, text: raw, tokens: [{ type: "text", raw, text: raw }] };
  },
};
const parser = new marked.Marked({
  gfm: true, breaks: true, renderer, tokenizer,
  extensions: [formula("formulaBlock", "block", BLOCK_FORMULA, /\$\$|\\\[/),
    formula("formulaInline", "inline", INLINE_FORMULA, /\$|\\[[(]/)],
});

function anchor(address, inner) {
  return `<a href="${escape(address)}" target="_blank" rel="noopener noreferrer">${inner}</a>`;
}

/** Show a Markdown text in a node. Blocks that have not changed since the last call keep their nodes, so that the
 * costs of a streamed answer, a selection and a focus stay in its last block. */
export function render(node, source, words) {
  let tokens;
  try {
    tokens = parser.lexer(source.replace(/\r\n?/g, "\n"));
  } catch { // too deeply nested
    node.replaceChildren(element("div", { className: "plain", textContent: source }));
    return;
  }
  const blocks = tokens.filter((token) => token.type !== "space" && token.type !== "def");
  blocks.forEach((token, place) => {
    const shown = node.children[place];
    if (shown?.markdown === token.raw) return;
    const block = element("div", { className: "block", markdown: token.raw });
    block.append(...nodes(token, words));
    if (shown) shown.replaceWith(block);
    else node.append(block);
  });
  while (node.children.length > blocks.length) node.lastElementChild.remove();
}

function nodes(token, words) {
  try {
    const fragment = DOMPurify.sanitize(parser.parser([token]), ALLOWED);
    fragment.querySelectorAll(".formula").forEach(typeset);
    fragment.querySelectorAll("pre").forEach((pre) => frame(pre, words));
    return [...fragment.childNodes];
  } catch { // too deeply nested
    return [element("div", { className: "plain", textContent: token.raw })];
  }
}

function typeset(node) {
  const { raw, display } = node.dataset;
  try {
    katex.render(node.textContent, node, { ...FORMULAS, displayMode: display === "true" });
  } catch { // no LaTeX, or not yet complete
    node.textContent = raw;
  }
}

/** Code with a line above it: the language and a button that copies. */
function frame(pre, words) {
  const title = element("span", { textContent: pre.dataset.language ?? "" });
  const box = element("div", { className: "code" }, element("div", { className: "title" }, title,
    copyButton(words, () => pre.textContent.replace(/\n$/, ""))));
  pre.tabIndex = 0; // keys can scroll it
  pre.replaceWith(box);
  box.append(pre);
}
