// The page: a conversation with a model of this server.

import { ApiError, key, models, stream } from "./api.js";
import { AttentionView } from "./attention.js";
import { Conversation } from "./conversation.js";
import { render } from "./markdown.js";
import * as settingsForm from "./settings.js";

const TEXT_TOKENS = 128; // new ones of a plain text by default; the API's own default is 16

const EXAMPLES = {
  chat: [
    "Explain in two sentences what a KV cache is.",
    "Write a Python function that counts the words of a text.",
    "Compare a list and a tuple in a table.",
  ],
  text: ["def fibonacci(n):\n", "Once upon a time", "import json\n\n\ndef load(path):\n"],
};

const get = (id) => document.getElementById(id);
const settings = settingsForm.load();
const conversation = new Conversation();
const attention = new AttentionView((error) => error.status === 401 && askForKey(() => {}));
let available = []; // the models that generate
let running = null; // {controller, node} while a reply comes
let afterKey = null; // what to do again with a key

// ---------------------------------------------------------------- models

const currentModel = () => available.find((model) => model.id === settings.model) ?? available[0];

/** Whether a model has a chat template; one without continues plain text. */
const isChat = () => currentModel()?.chat_template !== false;

async function loadModels() {
  const select = get("model");
  try {
    available = (await models()).filter((model) => (model.kind ?? "generate") === "generate");
  } catch (error) {
    select.replaceChildren(new Option("No model"));
    if (error.status === 401) askForKey(loadModels);
    else report(error, loadModels);
    return;
  }
  clearReport();
  if (!available.length) {
    select.replaceChildren(new Option("No model"));
    report(new ApiError("This server has no model that generates text."));
    return;
  }
  select.replaceChildren(...available.map((model) => new Option(model.id, model.id)));
  select.value = currentModel().id;
  select.disabled = false;
  showMode();
  draw();
}

function showMode() {
  const chat = isChat();
  document.body.dataset.mode = chat ? "chat" : "text";
  get("prompt-label").textContent = chat ? "Message" : "Text to continue";
  get("prompt").placeholder = chat ? "Write a message" : "Write the beginning of a text";
  get("system-field").hidden = !chat;
  get("new").querySelector("span").textContent = chat ? "New chat" : "New text";
  get("new").title = chat ? "New chat" : "New text";
  get("hint").textContent = enterSends() ? "Enter sends · Esc stops" : "Ctrl+Enter sends · Esc stops";
  get("empty-title").textContent = chat ? "What would you like to know?" : "Begin a text";
  get("empty-text").textContent = chat
    ? `${currentModel()?.id ?? "The model"} is ready.`
    : `${currentModel().id} has no chat template: it continues the text that you write.`;
  get("examples").replaceChildren(
    ...EXAMPLES[chat ? "chat" : "text"].map((text) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.className = "example";
      button.textContent = text.trim();
      button.addEventListener("click", () => {
        get("prompt").value = text;
        fit(get("prompt"));
        get("prompt").focus();
      });
      item.append(button);
      return item;
    }),
  );
}

/** On a touch screen, and in a plain text, Enter begins a line. */
const enterSends = () => settings.enterSends && isChat() && !matchMedia("(pointer: coarse)").matches;

// ---------------------------------------------------------------- requests

/** Neighbours of the same role as one message: templates want the roles to alternate. */
function messagesOf(path) {
  const found = [];
  if (settings.system.trim()) found.push({ role: "system", content: settings.system });
  for (const { role, content } of path) {
    if (found.at(-1)?.role === role) found.at(-1).content += `\n\n${content}`;
    else found.push({ role, content });
  }
  return found;
}

const plainText = (path) => path.map((node) => node.content).join("");

/** The default of new tokens after a plain text, as far as there is room. */
function textTokens(path) {
  const size = currentModel().max_model_len;
  if (!size) return TEXT_TOKENS;
  const at = path.findLastIndex((node) => node.usage);
  const known = at < 0 ? 0 : path[at].usage.prompt_tokens + path[at].usage.completion_tokens;
  const more = plainText(path.slice(at + 1)).length; // a token has at least one character
  return Math.max(1, Math.min(TEXT_TOKENS, size - known - more - 1));
}

const input = (path) => (isChat() ? { messages: messagesOf(path) } : { prompt: plainText(path) });

/** Reply to the message `parent`, as a new version; with `begun`, one that continues the text of that reply. */
async function reply(parent, begun = null) {
  if (running) return;
  clearReport();
  const chat = isChat();
  const start = begun?.content ?? "";
  const node = conversation.add(parent, { role: "assistant", content: start, model: currentModel().id });
  const path = conversation.before(node);
  const controller = new AbortController();
  running = { controller, node };
  draw();
  toEnd();
  const body = {
    model: currentModel().id,
    ...input(begun ? [...path, node] : path),
    ...(begun ? { add_generation_prompt: false, continue_final_message: true } : {}),
    ...(chat ? {} : { max_tokens: textTokens(path) }),
    ...settingsForm.sampling(settings),
    stream: true,
    stream_options: { include_usage: true },
  };
  const speech = new Speech();
  const begin = performance.now();
  let first = 0;
  let last = 0;
  let failed = null;
  say("Writing …");
  try {
    for await (const event of stream(chat ? "v1/chat/completions" : "v1/completions", body, controller.signal)) {
      if (event.usage) node.usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      const text = (chat ? choice.delta?.content : choice.text) ?? "";
      if (text) {
        last = performance.now();
        first ||= last;
        node.content += text;
        speech.add(text);
        drawLater(node);
      }
      if (choice.finish_reason) node.finish = choice.finish_reason;
    }
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else failed = error;
  }
  running = null;
  node.seconds = (performance.now() - begin) / 1000;
  if (first) node.wait = (first - begin) / 1000;
  if (node.usage?.completion_tokens > 1 && last > first)
    node.speed = ((node.usage.completion_tokens - 1) / (last - first)) * 1000;
  if (failed && !node.finish) node.finish = "failed";
  if (node.content === start && node.finish !== "stop" && node.finish !== "length") drop(node);
  conversation.save();
  draw();
  speech.end();
  if (!failed) say(node.finish === "stopped" ? "Stopped." : `Reply complete. ${countOf(node)}`);
  else if (failed.status === 401) askForKey(() => reply(parent, begun));
  else if (failed.code === "no_chat_template") {
    // A model that was not loaded yet, so that the list of models could not tell.
    currentModel().chat_template = false;
    showMode();
    draw();
    reply(parent);
  }
  else report(failed, () => reply(parent, begun));
}

/** Take back a reply that has no text of its own, so that an earlier version of it shows again. */
function drop(node) {
  const parent = conversation.parent(node);
  parent.children.splice(parent.children.indexOf(node.id), 1);
  parent.chosen = Math.max(0, parent.children.length - 1);
  conversation.nodes.pop(); // the newest
}

function stop() {
  if (!running) return false;
  running.controller.abort();
  get("prompt").focus();
  return true;
}

function send() {
  const field = get("prompt");
  const text = isChat() ? field.value.trim() : field.value;
  const last = conversation.last();
  if (running || !available.length) return;
  // In a plain text, an empty field continues what is there; in a chat, it answers an unanswered message.
  const open = isChat() ? last.role === "user" : last !== conversation.root;
  if (!text) {
    if (open) reply(last);
    return;
  }
  field.value = "";
  fit(field);
  reply(conversation.add(last, { role: "user", content: text }));
}

function newConversation() {
  stop();
  conversation.clear();
  conversation.save();
  clearReport();
  draw();
  get("prompt").focus();
}

// ---------------------------------------------------------------- drawing

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function tool(name, label, act) {
  const button = element("button", "tool");
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.dataset.tool = name;
  button.append(icon(name));
  button.addEventListener("click", () => act(button));
  return button;
}

function draw() {
  const path = conversation.path();
  const list = get("messages");
  const shown = new Map([...list.children].map((item) => [Number(item.dataset.id), item]));
  const items = path.map((node) => {
    const old = shown.get(node.id);
    const item = old && !old.matches(".editing") && old.node === node ? old : messageItem(node);
    fill(item, node);
    return item;
  });
  const focused = document.activeElement?.closest?.("#messages") ? document.activeElement : null;
  list.replaceChildren(...items);
  if (focused?.isConnected) focused.focus();
  get("empty").hidden = path.length > 0 || !available.length;
  const busy = running !== null;
  get("send").hidden = busy;
  get("stop").hidden = !busy;
  for (const button of list.querySelectorAll("[data-tool=edit], [data-tool=retry], [data-tool=continue], [data-tool=attention]"))
    button.disabled = busy;
  for (const button of list.querySelectorAll("[data-step]")) button.disabled ||= busy;
  showSend();
  showContext(path);
}

function showSend() {
  const empty = !get("prompt").value.trim();
  const last = conversation.last();
  const open = isChat() ? last.role === "user" : last !== conversation.root;
  get("send").disabled = !available.length || (empty && !open);
  const name = empty && open ? (isChat() ? "Answer the last message" : "Continue the text") : "Send";
  get("send-name").textContent = name;
  get("send").title = name;
}

function showContext(path) {
  const usage = path.findLast((node) => node.usage)?.usage;
  const size = currentModel()?.max_model_len;
  if (!usage) get("context").textContent = "";
  else {
    const used = usage.prompt_tokens + usage.completion_tokens;
    const of = size ? ` of ${size.toLocaleString("en")}` : "";
    get("context").textContent = `${used.toLocaleString("en")}${of} tokens`;
  }
}

function messageItem(node) {
  const item = element("li", `message ${node.role}`);
  item.dataset.id = node.id;
  item.node = node;
  item.append(element("span", "hidden", node.role === "user" ? "You:" : "Reply:"));
  item.append(element("div", "body"), element("div", "tools"));
  return item;
}

/** Content and tools of a message. */
function fill(item, node) {
  const active = running?.node === node;
  const body = item.querySelector(".body");
  item.classList.toggle("active", active);
  item.setAttribute("aria-busy", String(active));
  fillBody(body, node);
  const tools = item.querySelector(".tools");
  const held = tools.contains(document.activeElement) ? document.activeElement.dataset.tool : null;
  tools.replaceChildren();
  if (active) return;
  tools.append(...versionTools(node), tool("copy", "Copy", (button) => copy(node.content, button)));
  tools.append(tool("edit", "Edit", () => edit(item, node)));
  tools.append(
    tool("retry", node.role === "user" ? "Answer again" : "Try again", () =>
      reply(node.role === "user" ? node : conversation.parent(node)),
    ),
  );
  if (node.role === "assistant") {
    if (isChat() && node === conversation.last() && (node.edited || ["length", "stopped", "failed"].includes(node.finish)))
      tools.append(tool("continue", "Continue the reply", () => reply(conversation.parent(node), node)));
    tools.append(tool("attention", "Show what the last token attends to", () => showAttention(node)));
    const meta = element("span", "meta", metaOf(node));
    meta.title = detailsOf(node);
    tools.append(meta);
  }
  if (held) tools.querySelector(`[data-tool=${held}]`)?.focus();
}

function fillBody(body, node) {
  if (node.role === "assistant" && isChat()) {
    body.classList.add("prose");
    render(body, node.content);
  } else {
    body.classList.remove("prose");
    body.shownBlocks = undefined;
    if (body.textContent !== node.content || body.childElementCount) body.textContent = node.content;
  }
}

function countOf(node) {
  const count = node.usage?.completion_tokens;
  return count === undefined ? "" : count === 1 ? "1 token" : `${count.toLocaleString("en")} tokens`;
}

function metaOf(node) {
  const parts = [];
  if (node.usage) parts.push(countOf(node));
  if (node.speed) parts.push(`${node.speed.toFixed(node.speed < 100 ? 1 : 0)} tokens/s`);
  if (node.finish === "length") parts.push("at the limit of tokens");
  if (node.finish === "stopped") parts.push("stopped");
  if (node.finish === "failed") parts.push("incomplete");
  if (node.edited) parts.push("edited");
  if (available.length > 1) parts.push(node.model);
  return parts.join(" · ");
}

function detailsOf(node) {
  const parts = [];
  const count = node.usage?.prompt_tokens;
  const cached = node.usage?.prompt_tokens_details?.cached_tokens;
  if (count) parts.push(`prompt: ${count.toLocaleString("en")} tokens${cached ? `, ${cached.toLocaleString("en")} of them cached` : ""}`);
  if (node.wait) parts.push(`first token after ${node.wait.toFixed(2)} s`);
  if (node.seconds) parts.push(`${node.seconds.toFixed(1)} s in all`);
  return parts.join("; ");
}

function versionTools(node) {
  const { index, count } = conversation.versions(node);
  if (count < 2) return [];
  const step = (name, label, by) => {
    const button = tool(name, label, () => {
      const other = conversation.choose(node, by);
      conversation.save();
      draw();
      const item = get("messages").querySelector(`[data-id="${other.id}"]`);
      (item.querySelector(`[data-tool=${name}]:not(:disabled)`) ?? item.querySelector("[data-step]:not(:disabled)")).focus();
    });
    button.dataset.step = by;
    button.disabled = index + by < 0 || index + by >= count;
    return button;
  };
  const label = element("span", "versions", `${index + 1}/${count}`);
  label.setAttribute("aria-label", `Version ${index + 1} of ${count}`);
  return [step("left", "Earlier version", -1), label, step("right", "Later version", 1)];
}

let wanted = null;

/** Show new text with the next frame. */
function drawLater(node) {
  if (wanted) return;
  wanted = requestAnimationFrame(() => {
    wanted = null;
    const item = get("messages").querySelector(`[data-id="${node.id}"]`);
    if (!item || running?.node !== node) return;
    const follow = atEnd();
    fillBody(item.querySelector(".body"), node);
    if (follow) toEnd();
    else get("to-end").hidden = false;
  });
}

const atEnd = () => get("scroll").scrollHeight - get("scroll").scrollTop - get("scroll").clientHeight < 60;

function toEnd() {
  get("scroll").scrollTop = get("scroll").scrollHeight;
  get("to-end").hidden = true;
}

// ---------------------------------------------------------------- tools of a message

function edit(item, node) {
  const body = item.querySelector(".body");
  const form = element("form", "edit");
  const field = element("textarea");
  field.value = node.content;
  field.setAttribute("aria-label", node.role === "user" ? "Your message" : "The reply");
  const row = element("div", "row end");
  const cancel = element("button", "plain", "Cancel");
  cancel.type = "button";
  const save = element("button", "primary", node.role === "user" ? "Save and send" : "Save");
  row.append(cancel, save);
  form.append(field, row);
  item.classList.add("editing");
  body.replaceChildren(form);
  body.shownBlocks = undefined;
  item.querySelector(".tools").replaceChildren();
  const close = () => {
    draw();
    get("messages").querySelector(`[data-id="${node.id}"] [data-tool=edit]`)?.focus();
  };
  cancel.addEventListener("click", close);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const content = node.role === "user" && isChat() ? field.value.trim() : field.value;
    if (!content) return;
    const parent = conversation.parent(node);
    if (node.role === "user") {
      reply(conversation.add(parent, { role: "user", content }));
      get("prompt").focus();
      return;
    }
    if (content !== node.content)
      conversation.add(parent, { role: "assistant", content, model: node.model, edited: true });
    conversation.save();
    draw();
    get("prompt").focus();
  });
  field.addEventListener("input", () => fit(field));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  fit(field);
  field.focus();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Only https and localhost have the clipboard's interface.
    const field = element("textarea", "hidden", text);
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  say("Copied.");
  const old = button.querySelector("use");
  if (!old) {
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
    return;
  }
  old.setAttribute("href", "#i-done");
  setTimeout(() => old.setAttribute("href", "#i-copy"), 1500);
}

function showAttention(node) {
  attention.open({ model: node.model, ...input([...conversation.before(node), node]) });
}

// ---------------------------------------------------------------- messages of the page

function say(text) {
  get("status").textContent = text;
}

/** An error in words, with a button that tries again. */
function report(error, again) {
  const box = element("div", "report");
  const message = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
  box.append(element("p", "", message));
  if (again) {
    const button = element("button", "plain", "Try again");
    button.type = "button";
    button.addEventListener("click", () => {
      clearReport();
      again();
    });
    box.append(button);
  }
  get("alert").replaceChildren(box);
  say("");
  toEnd();
}

function clearReport() {
  get("alert").replaceChildren();
}

function askForKey(again) {
  afterKey = again;
  get("key-text").textContent = key.get()
    ? "The server did not accept this key."
    : "This server answers only with a key.";
  get("key-value").value = "";
  if (!get("key").open) get("key").showModal();
}

/** A reply for screen readers: sentence by sentence, as it comes. */
class Speech {
  constructor() {
    this.rest = "";
    get("spoken").replaceChildren();
  }

  add(text) {
    this.rest += text;
    const end = Math.max(this.rest.lastIndexOf("\n"), this.rest.lastIndexOf(". "), this.rest.lastIndexOf("? "));
    if (end > 0) {
      this.put(this.rest.slice(0, end + 1));
      this.rest = this.rest.slice(end + 1);
    }
  }

  put(text) {
    const plain = text.replace(/[*_`#|~]+/g, " ").trim();
    if (plain) get("spoken").append(element("p", "", plain));
  }

  end() {
    this.put(this.rest);
  }
}

// ---------------------------------------------------------------- events

function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

function applyTheme() {
  if (settings.theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
  const names = { system: "as the system", light: "light", dark: "dark" };
  get("theme-name").textContent = `Theme: ${names[settings.theme]}`;
  get("theme").title = `Theme: ${names[settings.theme]}`;
}

function settingsChanged() {
  settingsForm.save(settings);
  applyTheme();
  showMode();
}

function listen() {
  const prompt = get("prompt");
  get("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", () => {
    fit(prompt);
    showSend();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    if (event.ctrlKey || event.metaKey || (enterSends() && !event.shiftKey)) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]") && stop()) event.preventDefault();
  });
  get("stop").addEventListener("click", stop);
  get("new").addEventListener("click", newConversation);
  get("to-end").addEventListener("click", () => {
    toEnd();
    prompt.focus();
  });
  get("scroll").addEventListener("scroll", () => {
    if (atEnd()) get("to-end").hidden = true;
  });
  get("model").addEventListener("change", (event) => {
    settings.model = event.target.value;
    settingsChanged();
    draw();
  });
  get("theme").addEventListener("click", () => {
    // From the system's theme to the other one, and back.
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const shown = settings.theme === "system" ? (dark ? "dark" : "light") : settings.theme;
    settings.theme = shown === "dark" ? "light" : "dark";
    settingsForm.show(settings);
    settingsChanged();
  });
  get("open-settings").addEventListener("click", () => {
    get("forget-key").hidden = !key.get();
    get("settings").showModal();
  });
  for (const dialog of document.querySelectorAll("dialog"))
    dialog.addEventListener("click", (event) => {
      // A click beside the dialog is one on the dialog element itself.
      const box = dialog.getBoundingClientRect();
      const inside =
        event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
      if (event.target === dialog && !inside) dialog.close();
    });
  get("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(get("key-value").value.trim());
    get("key").close();
    const again = afterKey;
    afterKey = null;
    again?.();
  });
  get("key-cancel").addEventListener("click", () => get("key").close());
  get("key").addEventListener("close", () => {
    if (afterKey) report(new ApiError("Without a key, this server does not answer."), afterKey);
    afterKey = null;
    // Chromium gives the focus back to the field, but its text cannot be edited before it gets the focus again.
    prompt.blur();
    prompt.focus();
  });
  get("forget-key").addEventListener("click", () => {
    key.forget();
    get("forget-key").hidden = true;
  });
  get("messages").addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (button) copy(button.closest(".code").querySelector("code").textContent, button);
  });
}

settingsForm.connect(settings, settingsChanged);
settingsForm.show(settings);
applyTheme();
conversation.load();
listen();
showSend();
draw();
toEnd();
get("prompt").focus();
loadModels().then(toEnd);
