// What went wrong, and what is being waited for. Both places are live regions: what appears in them is read out.

const element = (id) => document.getElementById(id);

/** Show errors in words, each once, with the request ids that the server's log knows them by. */
export function showProblems(problems) {
  const shown = new Map(problems.map((problem) => [problem.message, problem.requestId]));
  const boxes = [...shown].map(([message, requestId]) => box(message, requestId));
  element("problem").replaceChildren(...boxes);
  if (boxes.length) element("problem").scrollIntoView({ block: "nearest" }); // on a phone it may be out of sight
}

export function clearProblems() {
  element("problem").replaceChildren();
}

/** Say what is waited for; `onStop` adds a button that gives up. The countdown is seen but not read out. */
export function showWait(message, onStop = null, requestId = "") {
  const notice = box(message, requestId);
  const countdown = paragraph("");
  countdown.id = "countdown";
  countdown.setAttribute("aria-hidden", "true");
  notice.append(countdown);
  if (onStop) notice.append(stopButton(onStop));
  element("wait").replaceChildren(notice);
}

export function showCountdown(ms) {
  element("countdown").textContent = `Next try in ${Math.max(0, Math.ceil(ms / 1000))} s`;
}

export function clearWait() {
  element("wait").replaceChildren();
}

function box(message, requestId) {
  const notice = document.createElement("div");
  notice.className = "notice";
  notice.append(paragraph(message));
  if (requestId) notice.append(paragraph(`Request id: ${requestId}`, "hint"));
  return notice;
}

function paragraph(text, className = "") {
  return Object.assign(document.createElement("p"), { textContent: text, className });
}

function stopButton(onStop) {
  const button = document.createElement("button");
  button.type = "button";
  button.id = "stop-trying";
  button.textContent = "Stop trying";
  button.addEventListener("click", onStop);
  return button;
}
