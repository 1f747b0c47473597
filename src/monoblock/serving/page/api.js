// The server's API: requests, errors in words, and streams of server-sent events.

const KEY = "monoblock.key";

/** An error with a message for people. `status` is 0 if no answer came; `code` is the server's. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    // Relative, so that the page also works behind a proxy with a prefix.
    answer = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

async function failure(answer) {
  let message = "";
  let code = null;
  try {
    const body = await answer.json();
    const detail = body.error ?? body.detail ?? body;
    message = typeof detail === "string" ? detail : (detail.message ?? "");
    code = detail.code ?? null;
  } catch {
    // Not JSON: the status alone is reported.
  }
  return new ApiError(inWords(answer.status, message, answer.headers.get("Retry-After")), answer.status, code);
}

/** What a status means, with the server's own message. */
export function inWords(status, message, retryAfter = null) {
  const own = message ? `: ${message.replace(/[.\s]+$/, "")}.` : ".";
  if (status === 401) return `The server needs an API key${own}`;
  if (status === 403) return `The server refuses this request${own}`;
  if (status === 404) return `The server does not have this${own}`;
  if (status === 413) return `The request is too large${own}`;
  if (status === 429) {
    const later = retryAfter ? ` Try again in ${retryAfter} seconds.` : " Try again in a moment.";
    return `The server has too many requests${own}${later}`;
  }
  if (status === 503) return `The server is not ready${own}`;
  if (status >= 500) return `The server failed${own}`;
  return `The server refused the request${own}`;
}

/** The models: [{id, ...}]. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** The JSON answer to a JSON body. */
export async function post(path, body, signal) {
  return (await request(path, { method: "POST", body: JSON.stringify(body), signal })).json();
}

/** The events of a streaming request, as parsed JSON. Throws if the stream ends before `[DONE]`. */
export async function* stream(path, body, signal) {
  const answer = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection to the server was lost before the reply was complete.");
      }
      if (part.done) throw new ApiError("The server ended the reply before it was complete.");
      buffer += part.value;
      const events = buffer.split(/\r?\n\r?\n/);
      buffer = events.pop();
      for (const event of events) {
        const data = event
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, ""))
          .join("\n");
        if (!data) continue; // a comment, which keeps the connection open
        if (data === "[DONE]") return;
        const parsed = JSON.parse(data);
        if (parsed.error) throw new ApiError(inWords(500, parsed.error.message ?? ""));
        yield parsed;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
