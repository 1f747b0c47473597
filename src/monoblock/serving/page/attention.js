// The attention view: the tokens that one token attends to, as shaded text and as a table.

import { post } from "./api.js";

const ROWS = 20; // of the table
const get = (id) => document.getElementById(id);

export class AttentionView {
  /** `failed` gets the errors of requests. */
  constructor(failed) {
    this.failed = failed;
    this.dialog = get("attention");
    this.question = null;
    this.position = null;
    this.controller = null;
    get("attention-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.controller?.abort());
    for (const id of ["attention-layer", "attention-head"]) get(id).addEventListener("change", () => this.load());
    get("attention-first").addEventListener("change", () => this.draw());
    get("attention-tokens").addEventListener("keydown", (event) => this.move(event));
    get("attention-tokens").addEventListener("click", (event) => {
      const token = event.target.closest("[data-index]");
      if (token) this.choose(Number(token.dataset.index));
    });
  }

  /** Show the weights of the last token of `question`: {model, messages} or {model, prompt}. */
  async open(question) {
    this.question = question;
    this.position = null;
    this.found = null;
    for (const id of ["attention-layer", "attention-head"]) get(id).replaceChildren(new Option("all", "mean"));
    get("attention-tokens").replaceChildren();
    get("attention-table").tBodies[0].replaceChildren();
    get("attention-text").textContent = "Computing …";
    this.dialog.showModal();
    await this.load();
  }

  choose(index) {
    this.position = index;
    return this.load(index);
  }

  async load(focus = null) {
    this.controller?.abort();
    const controller = (this.controller = new AbortController());
    get("attention-tokens").setAttribute("aria-busy", "true");
    const body = { ...this.question, layer: value("attention-layer"), head: value("attention-head") };
    if (this.position !== null) body.position = this.position;
    try {
      this.found = await post("attention", body, controller.signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      get("attention-text").textContent = error.message;
      this.failed(error);
      return;
    } finally {
      if (this.controller === controller) get("attention-tokens").setAttribute("aria-busy", "false");
    }
    options("attention-layer", this.found.layers, this.found.layer, "all (mean)");
    options("attention-head", this.found.heads, this.found.head, "all (mean)");
    this.draw();
    const current = get("attention-tokens").querySelector("[aria-current]");
    if (focus !== null) current?.focus();
    else current?.scrollIntoView({ block: "nearest" });
  }

  draw() {
    if (!this.found) return;
    const { tokens, weights, position, skipped } = this.found;
    // Many heads give most of their weight to the first token, beside which the others look alike.
    const from = get("attention-first").checked && weights.length > 1 ? 1 : 0;
    const most = Math.max(1e-9, ...weights.slice(from));
    get("attention-most").textContent = most.toPrecision(2);
    const left = skipped ? ` The first ${skipped.toLocaleString("en")} tokens are left out.` : "";
    get("attention-text").textContent =
      `The outlined token, ${position + 1} of ${tokens.length}, attends most to the tokens with the strongest colour. ` +
      `Choose another token to see what that one attends to.${left}`;
    get("attention-tokens").replaceChildren(
      ...tokens.map((label, index) => {
        // Not a button element, which cannot begin on one line and end on the next.
        const token = document.createElement("span");
        token.setAttribute("role", "button");
        token.className = "token";
        token.dataset.index = index;
        token.tabIndex = index === position ? 0 : -1;
        token.textContent = label.replaceAll("␣", " ").replaceAll("↵", "↵\n");
        const weight = weights[index];
        if (weight === undefined) token.classList.add("later");
        else {
          const share = index < from ? 0 : Math.min(1, weight / most);
          token.style.setProperty("--share", share.toFixed(3));
          if (share > 0.55) token.classList.add("strong");
        }
        const words = weight === undefined ? "comes later" : `weight ${weight.toFixed(4)}`;
        token.setAttribute("aria-label", `${label}, ${words}`);
        token.title = words;
        if (index === position) token.setAttribute("aria-current", "true");
        return token;
      }),
    );
    const order = weights.map((weight, index) => [weight, index]).sort((a, b) => b[0] - a[0]);
    get("attention-table").tBodies[0].replaceChildren(
      ...order.slice(0, ROWS).map(([weight, index]) => {
        const row = document.createElement("tr");
        for (const text of [index + 1, tokens[index], weight.toFixed(4)]) row.insertCell().textContent = text;
        return row;
      }),
    );
  }

  /** Arrow keys, Home and End move between the tokens, which are one stop of the Tab key; Enter chooses one. */
  move(event) {
    const all = [...get("attention-tokens").querySelectorAll(".token")];
    const at = all.indexOf(document.activeElement);
    if (at >= 0 && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      this.choose(at);
      return;
    }
    const targets = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 };
    const next = all[targets[event.key]];
    if (!next || at < 0) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function value(id) {
  const text = get(id).value;
  return text === "mean" ? text : Number(text);
}

function options(id, count, chosen, mean) {
  const numbers = Array.from({ length: count }, (_, index) => new Option(String(index), String(index)));
  get(id).replaceChildren(new Option(mean, "mean"), ...numbers);
  get(id).value = String(chosen);
}
