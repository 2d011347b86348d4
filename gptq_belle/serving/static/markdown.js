// Markdown to DOM nodes. What a model writes becomes text nodes only: no markup of its, no handler, no picture ever
// reaches the document, and links lead to http and https alone.

const INLINE = [
  [/^(`+)([^`][\s\S]*?)\1(?!`)/, (m) => element("code", text(m[2].trim() || m[2]))],
  [/^\*\*(?=\S)([\s\S]*?\S)\*\*/, (m) => element("strong", ...inline(m[1]))],
  [/^\*(?=\S)([^*\n]*[^*\s])\*(?!\*)/, (m) => element("em", ...inline(m[1]))],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (m) => element("del", ...inline(m[1]))],
  [/^\[([^\[\]\n]+)\]\(\s*(https?:\/\/[^\s()<>"]+)\s*\)/i, (m) => link(m[2], inline(m[1]))],
  [/^https?:\/\/[^\s<>"'`，。；：！？）】》]+[^\s<>"'`，。；：！？）】》.,;:!?)\]]/i, (m) => link(m[0], [text(m[0])])],
];

const BLOCK = [
  [/^(```+|~~~+)[^\n]*\n([\s\S]*?)(?:\n\1[^\n]*(?:\n|$)|$)/, (m) => element("pre", element("code", text(m[2])))],
  [/^(#{1,6})[ \t]+([^\n]+?)[ \t#]*(?:\n|$)/, (m) => element(`h${Math.min(6, m[1].length + 2)}`, ...inline(m[2]))],
  [/^(?:[-*_][ \t]*){3,}(?:\n|$)/, () => element("hr")],
  [/^(?:>[^\n]*(?:\n|$))+/, (m) => element("blockquote", ...blocks(m[0].replace(/^> ?/gm, "")))],
  [/^\|[^\n]+\|[ \t]*\n\|[ \t:|-]+\|[ \t]*(?:\n|$)(?:\|[^\n]*\|?[ \t]*(?:\n|$))*/, (m) => table(m[0])],
  [/^(?:[-*+][ \t]+[^\n]*(?:\n(?![-*+][ \t]|\d{1,9}[.)][ \t]|\n)[^\n]+)*(?:\n+(?=[-*+][ \t])|\n|$))+/,
    (m) => list("ul", m[0], /^[-*+][ \t]+/)],
  [/^(?:\d{1,9}[.)][ \t]+[^\n]*(?:\n(?![-*+][ \t]|\d{1,9}[.)][ \t]|\n)[^\n]+)*(?:\n+(?=\d{1,9}[.)][ \t])|\n|$))+/,
    (m) => list("ol", m[0], /^\d{1,9}[.)][ \t]+/)],
  [/^(?:(?!```|~~~|#{1,6}[ \t]|>|[-*+][ \t]|\d{1,9}[.)][ \t])[^\n]+(?:\n|$))+|^[^\n]+(?:\n|$)/,
    (m) => element("p", ...inline(m[0].trimEnd()))],
];
const DEEPEST = 8; // nested quotes and lists; deeper, text stays text
let depth = 0;

/** The nodes of a Markdown text. */
export function render(source) {
  return blocks(source.replace(/\r\n?/g, "\n"));
}

function blocks(source) {
  if (depth >= DEEPEST) return [element("p", text(source))];
  depth += 1;
  try {
    return scan(source, BLOCK, (rest) => rest.match(/^\n*/)[0].length || 1);
  } finally {
    depth -= 1;
  }
}

function inline(source) {
  return scan(source, INLINE, (rest) => {
    const next = rest.slice(1).search(/[`*~[]|https?:\/\//i);
    return next < 0 ? rest.length : next + 1;
  }, true);
}

function scan(source, rules, skip, keep = false) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) lines(plain).forEach((node) => nodes.push(node));
    plain = "";
  };
  while (source) {
    let length = 0;
    for (const [pattern, make] of rules) {
      const match = pattern.exec(source);
      if (match && match[0]) {
        flush();
        nodes.push(make(match));
        length = match[0].length;
        break;
      }
    }
    if (!length) {
      length = skip(source);
      if (keep) plain += source.slice(0, length);
    }
    source = source.slice(length);
  }
  flush();
  return nodes;
}

function lines(source) {
  return source.split("\n").flatMap((line, place) => (place ? [element("br"), text(line)] : [text(line)]));
}

function list(tag, source, marker) {
  const items = source.trimEnd().split(new RegExp(`\\n+(?=${marker.source.slice(1)})`));
  const node = element(tag, ...items.map((item) => element("li", ...inline(item.replace(marker, "").trim()))));
  const first = parseInt(source, 10);
  if (tag === "ol" && first > 1) node.start = first;
  return node;
}

function table(source) {
  const [head, , ...rows] = source.trim().split("\n").map(
    (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim()));
  const row = (cells, tag) => element("tr", ...cells.map((cell) => element(tag, ...inline(cell))));
  return element("table", element("thead", row(head, "th")), element("tbody", ...rows.map((cells) => row(cells, "td"))));
}

function link(address, children) {
  const node = element("a", ...children);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}

function text(content) {
  return document.createTextNode(content);
}

function element(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}
