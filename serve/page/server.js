// Talking to the server that this page came from.

import { serverEvents } from "./events.js";

// Not document.baseURI: it may hold a name and a password, and fetch refuses such addresses.
export const API = location.origin + new URL("v1", location.href).pathname;
export const EDITS = `${API}/images/edits`;
const READY = location.origin + new URL("readyz", location.href).pathname;
const ASK_EVERY_MS = 1000;
const NEEDS_KEY =
  "This server needs a key. Load this page again; when the browser asks, give any name, and the key as the password.";

/** An answer that is an error, in the server's words. `status` 0: there was no answer. */
export class ServerProblem extends Error {
  constructor(message, { status = 0, requestId = "", retryAfterMs = null } = {}) {
    super(message);
    Object.assign(this, { status, requestId, retryAfterMs });
  }
}

/** The models, the default one first. */
export async function fetchModels() {
  const answer = await asked(`${API}/models`);
  return (await answer.json()).data;
}

/** Post a form as a stream and yield the events of the answer. */
export async function* streamEdit(form, signal) {
  const answer = await asked(EDITS, { method: "POST", body: form, signal });
  const requestId = answer.headers.get("x-request-id") ?? "";
  try {
    for await (const { name, data } of serverEvents(answer.body)) {
      if (name === "error") throw new ServerProblem(data.error.message, { requestId });
      yield { name, data };
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new ServerProblem("The connection broke during the edit.", { requestId });
  }
  throw new ServerProblem("The server ended the answer before the edit was done.", { requestId });
}

/** Wait until the server can edit. `told` gets its state as long as it cannot. */
export async function untilReady(told, signal) {
  for (;;) {
    const { status, problem } = await readiness(signal);
    if (status === "READY") return;
    if (status === "FAILED") throw new ServerProblem(`The model cannot be loaded: ${problem}`, { status: 503 });
    told(status);
    await pause(ASK_EVERY_MS, signal);
  }
}

async function readiness(signal) {
  try {
    const answer = await fetch(READY, { signal, cache: "no-store" });
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { status: "UNREACHABLE" }; // nobody answers, or a proxy that speaks no JSON
  }
}

/** Resolves after `ms`, rejects as soon as `signal` is aborted. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(resolve, ms);
    const giveUp = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal?.addEventListener("abort", giveUp, { once: true });
  });
}

async function asked(url, options = {}) {
  let answer;
  try {
    answer = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerProblem("The server cannot be reached. Is it running?");
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  const { headers, status } = answer;
  const body = await answer.json().catch(() => null);
  const said = body?.error?.message ?? `The server answered ${status} ${answer.statusText}`.trim();
  const message = status === 401 ? `${NEEDS_KEY} (${said})` : said;
  return new ServerProblem(message, {
    status,
    requestId: headers.get("x-request-id") ?? "",
    retryAfterMs: retryAfterMs(headers),
  });
}

function retryAfterMs(headers) {
  const ms = Number.parseFloat(headers.get("retry-after-ms"));
  const seconds = Number.parseFloat(headers.get("retry-after"));
  if (Number.isFinite(ms)) return ms;
  return Number.isFinite(seconds) ? seconds * 1000 : null;
}
