// Settings: kept in localStorage, validated when they are read and when they are typed.

const STORED = "monoblock.settings";
const MOST_STOPS = 4;

/** Number fields of a request. An empty one is not sent. */
export const PARAMETERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, hint: "0: always the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.05, hint: "the likeliest tokens that sum up to p" },
  { name: "top_k", label: "Top k", min: 0, max: 1000000, integer: true, hint: "the k likeliest tokens; 0: all" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "at least p times the likeliest" },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 1000000, integer: true, hint: "of a reply" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, integer: true, hint: "the same seed, the same reply" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, hint: "once per used token" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, hint: "for each use of a token" },
  {
    name: "repetition_penalty", label: "Repetition penalty", min: 0.001, max: 1000, step: 0.05,
    hint: "above 1: fewer repetitions",
  },
];

export const DEFAULTS = {
  model: "",
  system: "",
  theme: "system",
  enterSends: true,
  stop: [],
  parameters: {},
};

/** The number that a text stands for, null for an empty one; RangeError in words for anything else. */
export function numberOf(parameter, text) {
  if (!text.trim()) return null;
  const value = Number(text);
  const kind = parameter.integer ? "an integer" : "a number";
  const fits = parameter.integer ? Number.isSafeInteger(value) : Number.isFinite(value);
  if (!fits || value < parameter.min || value > parameter.max) {
    throw new RangeError(
      `${parameter.label} must be ${kind} from ${parameter.min} to ${parameter.max.toLocaleString("en")}.`,
    );
  }
  return value;
}

/** Stop strings of a text with one per line; RangeError if there are too many. */
export function stopsOf(text) {
  const found = text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replaceAll("\\n", "\n"));
  if (found.length > MOST_STOPS) throw new RangeError(`There can be at most ${MOST_STOPS} stop strings.`);
  return found;
}

export function textOfStops(stops) {
  return stops.map((stop) => stop.replaceAll("\n", "\\n")).join("\n");
}

export function load() {
  const found = structuredClone(DEFAULTS);
  let stored;
  try {
    stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return found;
  }
  for (const name of ["model", "system"]) if (typeof stored[name] === "string") found[name] = stored[name];
  if (["system", "light", "dark"].includes(stored.theme)) found.theme = stored.theme;
  if (typeof stored.enterSends === "boolean") found.enterSends = stored.enterSends;
  if (Array.isArray(stored.stop) && stored.stop.every((stop) => typeof stop === "string" && stop))
    found.stop = stored.stop.slice(0, MOST_STOPS);
  if (stored.parameters && typeof stored.parameters === "object") {
    found.parameters = {};
    for (const parameter of PARAMETERS) {
      const value = stored.parameters[parameter.name];
      try {
        if (typeof value === "number") found.parameters[parameter.name] = numberOf(parameter, String(value));
      } catch {
        // Out of range, perhaps of an older version of the page: the default.
      }
    }
  }
  return found;
}

export function save(settings) {
  try {
    localStorage.setItem(STORED, JSON.stringify(settings));
  } catch {
    // No storage: the settings last until the page is left.
  }
}

/** The sampling fields of a request; an empty one is left to the server. */
export function sampling(settings) {
  const fields = { ...settings.parameters };
  if (settings.stop.length) fields.stop = settings.stop;
  return fields;
}

// ---------------------------------------------------------------- the form

/** Connect the form to the settings; `changed` is called after each valid change. */
export function connect(settings, changed) {
  const get = (id) => document.getElementById(id);
  const grid = get("parameters");
  for (const parameter of PARAMETERS) grid.append(numberField(parameter, settings, changed));
  const text = (id, name) =>
    get(id).addEventListener("input", (event) => {
      settings[name] = event.target.value;
      changed();
    });
  text("system", "system");
  get("stop-strings").addEventListener("input", (event) =>
    checked(event.target, get("stop-strings-hint"), () => {
      settings.stop = stopsOf(event.target.value);
      changed();
    }),
  );
  get("theme-choice").addEventListener("change", (event) => {
    settings.theme = event.target.value;
    changed();
  });
  get("enter-sends").addEventListener("change", (event) => {
    settings.enterSends = event.target.checked;
    changed();
  });
  get("reset").addEventListener("click", () => {
    const { model } = settings;
    Object.assign(settings, structuredClone(DEFAULTS), { model });
    changed();
    show(settings);
  });
  // A wrong value keeps the sheet open, with the focus on it.
  get("settings-form").addEventListener("submit", (event) => {
    const wrong = get("settings-form").querySelector("[aria-invalid=true]");
    if (!wrong) return;
    event.preventDefault();
    wrong.focus();
  });
  // Esc closes; what was wrong is not kept.
  get("settings").addEventListener("close", () => show(settings));
}

/** Write the settings into the form. */
export function show(settings) {
  const get = (id) => document.getElementById(id);
  get("system").value = settings.system;
  get("stop-strings").value = textOfStops(settings.stop);
  get("theme-choice").value = settings.theme;
  get("enter-sends").checked = settings.enterSends;
  for (const { name } of PARAMETERS) get(`parameter-${name}`).value = settings.parameters[name] ?? "";
  for (const field of get("settings-form").querySelectorAll("[aria-invalid]")) valid(field);
}

function numberField(parameter, settings, changed) {
  const id = `parameter-${parameter.name}`;
  const field = document.createElement("div");
  field.className = "field";
  const label = document.createElement("label");
  label.htmlFor = id;
  label.textContent = parameter.label;
  const input = document.createElement("input");
  Object.assign(input, { id, type: "text", inputMode: parameter.integer ? "numeric" : "decimal", placeholder: "default" });
  input.autocomplete = "off";
  input.setAttribute("aria-describedby", `${id}-hint`);
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.id = `${id}-hint`;
  hint.textContent = parameter.hint;
  input.addEventListener("input", () =>
    checked(input, hint, () => {
      const value = numberOf(parameter, input.value);
      if (value === null) delete settings.parameters[parameter.name];
      else settings.parameters[parameter.name] = value;
      changed();
    }),
  );
  field.append(label, input, hint);
  return field;
}

/** Apply a change; its RangeError is shown beside the field. */
function checked(field, hint, apply) {
  try {
    apply();
    valid(field);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    field.setAttribute("aria-invalid", "true");
    let note = document.getElementById(`${field.id}-error`);
    if (!note) {
      note = document.createElement("p");
      note.id = `${field.id}-error`;
      note.className = "error-text";
      note.setAttribute("role", "alert");
      hint.after(note);
    }
    note.textContent = error.message;
    field.setAttribute("aria-errormessage", note.id);
  }
}

function valid(field) {
  field.removeAttribute("aria-invalid");
  field.removeAttribute("aria-errormessage");
  document.getElementById(`${field.id}-error`)?.remove();
}
