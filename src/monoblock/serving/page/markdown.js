// Markdown to DOM nodes. Text of a model becomes text nodes only, never HTML; links keep safe schemes only.

import { highlighted } from "./highlight.js";

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const DEEPEST = 12; // nested quotes and lists; deeper ones are text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|[ \t]*$|(?= {5}))/;
const DELIMITER_ROW = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const URL_START = /https?:\/\/[^\s<>"'`]+/y;

/** Show `text` in `container`. Blocks that did not change since the last call keep their nodes. */
export function render(container, text) {
  const found = split(text.replace(/\r\n?/g, "\n").split("\n"), 0);
  const shown = container.shownBlocks ?? [];
  let same = 0;
  while (same < found.length && same < shown.length && shown[same] === found[same].source) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of found.slice(same)) container.append(block.make());
  container.shownBlocks = found.map((block) => block.source);
}

// ---------------------------------------------------------------- blocks

/** Lines as blocks, {source, make, kind}: `make` builds the element. */
function split(lines, depth) {
  const blocks = [];
  let at = 0;
  const add = (end, kind, make) => {
    blocks.push({ source: `${kind}\n${lines.slice(at, end).join("\n")}`, kind, make });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) at++;
    else if ((match = FENCE.exec(line))) {
      const end = fenceEnd(lines, at, match[1]);
      const indent = line.search(/\S/);
      const closed = end - 1 > at && closes(lines[end - 1], match[1]);
      const code = lines.slice(at + 1, closed ? end - 1 : end).map((one) => unindented(one, indent));
      add(end, "code", () => codeBlock(code.join("\n"), match[2].trim().split(/\s+/)[0]));
    } else if (/^(?: {4}|\t)/.test(line)) {
      let end = at;
      while (end < lines.length && (/^(?: {4}|\t)/.test(lines[end]) || !lines[end].trim())) end++;
      while (!lines[end - 1].trim()) end--;
      const code = lines.slice(at, end).map((one) => one.replace(/^(?: {4}|\t)/, ""));
      add(end, "code", () => codeBlock(code.join("\n"), ""));
    } else if ((match = HEADING.exec(line))) {
      // The page has an h1 and an h2 of its own.
      const element = `h${Math.min(6, match[1].length + 2)}`;
      add(at + 1, "heading", () => filled(element, match[2] ?? ""));
    } else if (RULE.test(line)) add(at + 1, "rule", () => document.createElement("hr"));
    else if (QUOTE.test(line) && depth < DEEPEST) {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !starts(lines, end))) end++;
      const inner = lines.slice(at, end).map((one) => one.replace(QUOTE, ""));
      add(end, "quote", () => holding("blockquote", split(inner, depth + 1)));
    } else if ((match = ITEM.exec(line)) && depth < DEEPEST) {
      const list = readList(lines, at);
      add(list.end, "list", () => listElement(list, depth));
    } else if (line.includes("|") && at + 1 < lines.length && isTable(line, lines[at + 1])) {
      let end = at + 2;
      while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end++;
      const rows = lines.slice(at, end);
      add(end, "table", () => tableElement(rows));
    } else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !starts(lines, end)) end++;
      const text = lines.slice(at, end).map((one) => one.replace(/^[ \t]+/, "")).join("\n");
      add(end, "paragraph", () => filled("p", text));
    }
  }
  return blocks;
}

/** Whether a line ends the paragraph before it. */
function starts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return (
    FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) ||
    (item !== null && item[3] !== undefined) ||
    (line.includes("|") && at + 1 < lines.length && isTable(line, lines[at + 1]))
  );
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length) && line.search(/\S/) < 4;
}

/** The index after a fenced block; without a closing fence, which may still come, the end. */
function fenceEnd(lines, at, fence) {
  for (let end = at + 1; end < lines.length; end++) if (closes(lines[end], fence)) return end + 1;
  return lines.length;
}

function unindented(line, most) {
  return line.slice(Math.min(most, Math.max(0, line.search(/\S|$/))));
}

/** A list from line `at`: its items as lines, and whether blank lines are between them. */
function readList(lines, at) {
  const first = ITEM.exec(lines[at])[2];
  const kind = first.at(-1);
  const list = { ordered: /\d/.test(first), start: Number.parseInt(first, 10), items: [], loose: false, end: at };
  let blank = false;
  let item = null;
  let width = 0;
  while (list.end < lines.length) {
    const line = lines[list.end];
    const indent = line.search(/\S/);
    const match = ITEM.exec(line);
    if (indent < 0) blank = true;
    // Models often indent an inner list by two spaces, whatever the width of the marker.
    else if (item && indent >= Math.min(width, 2)) {
      if (blank) {
        item.push("");
        list.loose = true;
      }
      item.push(unindented(line, width));
      blank = false;
    } else if (match && match[2].at(-1) === kind && !RULE.test(line)) {
      if (blank && item) list.loose = true;
      blank = false;
      width = match[0].length + (match[3] ? 0 : 1);
      item = [line.slice(match[0].length)];
      list.items.push(item);
    } else if (!blank && item && !starts(lines, list.end)) item.push(line.trimStart());
    else break;
    list.end++;
  }
  while (!lines[list.end - 1].trim()) list.end--;
  return list;
}

function listElement(list, depth) {
  const element = document.createElement(list.ordered ? "ol" : "ul");
  if (list.ordered && list.start !== 1) element.start = list.start;
  for (const lines of list.items) {
    const item = document.createElement("li");
    for (const block of split(lines, depth + 1)) {
      const made = block.make();
      if (block.kind === "paragraph" && !list.loose) item.append(...made.childNodes);
      else item.append(made);
    }
    element.append(item);
  }
  return element;
}

function cells(row) {
  const found = [];
  let cell = "";
  const text = row.trim().replace(/^\|/, "");
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (text[i] === "|") {
      found.push(cell.trim());
      cell = "";
    } else cell += text[i];
  }
  if (cell.trim()) found.push(cell.trim());
  return found;
}

function isTable(head, row) {
  return row.includes("-") && DELIMITER_ROW.test(row) && cells(head).length === cells(row).length;
}

function tableElement(rows) {
  const sides = cells(rows[1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "start",
  );
  const table = document.createElement("table");
  rows.forEach((row, number) => {
    if (number === 1) return;
    const line = (number ? (table.tBodies[0] ?? table.createTBody()) : table.createTHead()).insertRow();
    const texts = cells(row);
    sides.forEach((side, column) => {
      const cell = filled(number ? "td" : "th", texts[column] ?? "");
      if (!number) cell.scope = "col";
      cell.style.textAlign = side;
      line.append(cell);
    });
  });
  // Wide tables scroll by themselves, also with the keyboard.
  const box = document.createElement("div");
  box.className = "table";
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "Table");
  box.append(table);
  return box;
}

function codeBlock(code, language) {
  const box = document.createElement("div");
  box.className = "code";
  const bar = document.createElement("div");
  bar.className = "code-bar";
  const name = document.createElement("span");
  name.textContent = language || "text";
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "small";
  copy.dataset.copy = "";
  copy.textContent = "Copy";
  copy.setAttribute("aria-label", "Copy the code");
  bar.append(name, copy);
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  const inner = document.createElement("code");
  inner.append(...highlighted(code, language ?? ""));
  pre.append(inner);
  box.append(bar, pre);
  return box;
}

function holding(name, blocks) {
  const element = document.createElement(name);
  element.append(...blocks.map((block) => block.make()));
  return element;
}

function filled(name, text) {
  const element = document.createElement(name);
  element.append(...inline(text));
  return element;
}

// ---------------------------------------------------------------- inside a block

/** Text of one block as nodes. */
export function inline(text, links = true) {
  const items = [];
  let plain = "";
  let at = 0;
  const unclosed = new Set(); // lengths of backtick runs that nothing closes
  const flush = () => {
    if (plain) items.push(document.createTextNode(plain));
    plain = "";
  };
  const push = (node, next) => {
    flush();
    items.push(node);
    at = next;
  };
  while (at < text.length) {
    const character = text[at];
    if (character === "\\" && at + 1 < text.length && (PUNCTUATION.test(text[at + 1]) || text[at + 1] === "\n")) {
      if (text[at + 1] === "\n") push(document.createElement("br"), at + 2);
      else {
        plain += text[at + 1];
        at += 2;
      }
    } else if (character === "`") {
      const run = runLength(text, at);
      const end = unclosed.has(run) ? -1 : closingRun(text, at + run, run);
      if (end < 0) {
        unclosed.add(run);
        plain += text.slice(at, at + run);
        at += run;
      } else push(codeSpan(text.slice(at + run, end)), end + run);
    } else if (character === "\n") {
      // A single line end is kept: models mean it.
      plain = plain.replace(/ +$/, "");
      push(document.createElement("br"), at + 1);
    } else if (links && (character === "[" || (character === "!" && text[at + 1] === "["))) {
      const link = readLink(text, character === "!" ? at + 1 : at);
      if (link) push(linkElement(link.url, inline(link.label, false)), link.end);
      else {
        plain += character;
        at++;
      }
    } else if (links && (character === "h" || character === "<") && bare(text, at)) {
      const { url, end } = bare(text, at);
      push(linkElement(url, [document.createTextNode(url)]), end);
    } else if (character === "*" || character === "_" || (character === "~" && text[at + 1] === "~")) {
      const run = runLength(text, at);
      push(delimiter(text, at, run), at + run);
    } else {
      plain += character;
      at++;
    }
  }
  flush();
  return emphasised(items);
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

function closingRun(text, from, run) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    const length = runLength(text, at);
    if (length === run) return at;
    at += length;
  }
  return -1;
}

function codeSpan(text) {
  const code = document.createElement("code");
  const flat = text.replaceAll("\n", " ");
  code.textContent = /^ .*[^ ].* $/.test(flat) ? flat.slice(1, -1) : flat;
  return code;
}

/** `[label](url "title")` at `at`; null for anything else. */
function readLink(text, at) {
  let depth = 0;
  let end = at;
  for (; end < Math.min(text.length, at + 1000); end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "[") depth++;
    else if (text[end] === "]" && --depth === 0) break;
  }
  if (text[end] !== "]" || text[end + 1] !== "(") return null;
  const rest = /^\(\s*(<[^<>\n]*>|(?:[^\s()\\]|\\.|\([^\s()]*\))*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(
    text.slice(end + 1, end + 3000),
  );
  if (!rest) return null;
  const url = rest[1].replace(/^<|>$/g, "").replace(/\\(.)/g, "$1");
  return { label: text.slice(at + 1, end), url, end: end + 1 + rest[0].length };
}

/** A URL in plain text or in <...>. */
function bare(text, at) {
  const angle = text[at] === "<";
  if (!angle && at > 0 && /\w/.test(text[at - 1])) return null;
  URL_START.lastIndex = at + (angle ? 1 : 0);
  const match = URL_START.exec(text);
  if (!match) return null;
  if (angle) return text[URL_START.lastIndex] === ">" ? { url: match[0], end: URL_START.lastIndex + 1 } : null;
  let url = match[0].replace(/[.,:;!?*_~\]]+$/, "");
  while (url.endsWith(")") && url.split(")").length > url.split("(").length) url = url.slice(0, -1);
  return { url, end: at + url.length };
}

/** A link if the URL is absolute and its scheme is safe; else the label and the URL as text. */
function linkElement(url, label) {
  let parsed = null;
  try {
    parsed = new URL(url);
  } catch {
    // Relative, or no URL at all.
  }
  if (!parsed || !SCHEMES.has(parsed.protocol)) {
    const text = document.createElement("span");
    text.append(...label, ` (${url})`);
    return text;
  }
  const link = document.createElement("a");
  link.href = parsed.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  link.append(...label);
  return link;
}

/** A run of * _ or ~, with CommonMark's rules for what it may open or close. */
function delimiter(text, at, count) {
  const before = text[at - 1] ?? " ";
  const after = text[at + count] ?? " ";
  const space = (c) => /\s/.test(c);
  const mark = (c) => /[\p{P}\p{S}]/u.test(c);
  const left = !space(after) && (!mark(after) || space(before) || mark(before));
  const right = !space(before) && (!mark(before) || space(after) || mark(after));
  const word = text[at] === "_";
  return {
    character: text[at],
    count,
    open: left && (!word || !right || mark(before)),
    close: right && (!word || !left || mark(after)),
  };
}

/** Items with their delimiters paired to elements; the rest of them is text. */
function emphasised(items) {
  const out = [];
  const openers = []; // indices of delimiters in `out` that may open
  const open = { "*": 0, _: 0, "~": 0 };
  for (const item of items) {
    if (item instanceof Node) {
      out.push(item);
      continue;
    }
    const rest = { ...item };
    while (item.close && rest.count && open[item.character]) {
      let top = openers.pop();
      while (out[top].character !== item.character) {
        open[out[top].character]--;
        top = openers.pop();
      }
      const opener = out[top];
      const used = Math.min(2, rest.count, opener.count);
      const name = item.character === "~" ? "del" : used === 2 ? "strong" : "em";
      const element = document.createElement(name);
      element.append(...out.splice(top + 1).map(asNode));
      opener.count -= used;
      rest.count -= used;
      if (opener.count) openers.push(top);
      else {
        out.splice(top);
        open[item.character]--;
      }
      out.push(element);
    }
    if (!rest.count) continue;
    if (item.open) {
      openers.push(out.length);
      open[item.character]++;
    }
    out.push(rest);
  }
  return out.map(asNode);
}

function asNode(item) {
  return item instanceof Node ? item : document.createTextNode(item.character.repeat(item.count));
}
