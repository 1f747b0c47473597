// Colours for code: comments, strings, numbers, keywords and called names, by one pattern per group of languages.

const LONGEST = 50000; // characters; longer code stays plain
const WORDS = {
  python:
    "and as assert async await break case class continue def del elif else except finally for from global if import in is " +
    "lambda match nonlocal not or pass raise return try while with yield None True False self",
  shell: "case do done elif else esac export fi for function if in local return then until while echo cd exit set",
  c:
    "abstract as async await auto bool boolean break byte case catch char class const constexpr continue default defer delete " +
    "do double dyn else enum export extends extern final finally float fn for from func function go goto if impl implements " +
    "import in instanceof int interface let long loop match mod module move mut namespace new nil null nullptr of override " +
    "package private protected pub public return select self short signed sizeof static string struct super switch template " +
    "this throw throws trait try type typedef typename typeof undefined union unsafe unsigned use using val var virtual void " +
    "volatile where while yield true false",
  sql:
    "add all alter and as asc between by case create delete desc distinct drop else end exists from full group having if in " +
    "index inner insert into is join key left like limit not null offset on or order outer primary right select set table then " +
    "union update values view when where with",
  data: "true false null yes no on off",
};
const GROUPS = {
  python: "python py python3 ipython",
  shell: "bash sh shell zsh console dockerfile makefile",
  sql: "sql postgresql sqlite mysql",
  data: "json jsonl yaml yml toml ini",
  c: "c cpp c++ cc h hpp cs csharp java js javascript jsx ts tsx typescript rust rs go kotlin swift php scala dart",
};
const COMMENTS = {
  python: "#[^\\n]*",
  shell: "(?<![\\w$])#[^\\n]*",
  data: "(?<!\\S)[#;][^\\n]*",
  sql: "--[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)",
  c: "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)",
};
const STRINGS =
  "[rbfuRBFU]{0,2}(?:\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$))|" +
  // Bounded, as an apostrophe that nothing closes would be searched for to the end of the code.
  "[rbfuRBFU]?\"(?:\\\\.|[^\"\\\\\\n])*\"?|[rbfuRBFU]?'(?:\\\\.|[^'\\\\\\n]){0,300}'|`(?:\\\\.|[^`\\\\]){0,2000}`";
const REST = "(\\b(?:0[xX][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)|([A-Za-z_$][\\w$]*)";

const languages = new Map(
  Object.entries(GROUPS).flatMap(([group, names]) => names.split(" ").map((name) => [name, group])),
);
const known = new Map();

function patternOf(group) {
  if (!known.has(group)) {
    known.set(group, {
      pattern: new RegExp(`(${COMMENTS[group]})|(${STRINGS})|${REST}`, "g"),
      words: new Set(WORDS[group].split(" ")),
    });
  }
  return known.get(group);
}

/** Code as nodes: text, and spans with the classes comment, string, number, keyword, call. */
export function highlighted(code, language) {
  const group = languages.get(language.toLowerCase());
  if (!group || code.length > LONGEST) return [document.createTextNode(code)];
  const { pattern, words } = patternOf(group);
  const nodes = [];
  let plain = 0;
  for (const match of code.matchAll(pattern)) {
    const [text, comment, string, number, word] = match;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : kindOf(word, words, code, match.index, group);
    if (!kind) continue;
    if (match.index > plain) nodes.push(document.createTextNode(code.slice(plain, match.index)));
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    nodes.push(span);
    plain = match.index + text.length;
  }
  if (plain < code.length) nodes.push(document.createTextNode(code.slice(plain)));
  return nodes;
}

function kindOf(word, words, code, at, group) {
  if (words.has(group === "sql" ? word.toLowerCase() : word)) return "keyword";
  return code[at + word.length] === "(" ? "call" : "";
}
