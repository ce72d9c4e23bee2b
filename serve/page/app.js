// The page: what is on it now, and what its buttons do.

import { curlCommand, pythonProgram } from "./commands.js";
import { markTiny } from "./compare.js";
import { copyShown } from "./copying.js";
import { Mistake, checkFiles, checkWishes, randomSeed, seedsFrom } from "./form.js";
import { History, picturesOf } from "./history.js";
import { clearProblems, clearWait, showCountdown, showProblems, showWait } from "./notices.js";
import { forgetAllBut, pictureFromBase64, readPicture } from "./pictures.js";
import { editVariants } from "./run.js";
import { API, EDITS, fetchModels, untilReady } from "./server.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { onFile, takePictures } from "./taking.js";

const TICK_MS = 100;
const WAITING_FOR = {
  WARMING: "The server is loading the model. This can take a minute.",
  DRAINING: "The server is stopping. Waiting for one that starts.",
  UNREACHABLE: "The server does not answer. Waiting for it.",
};
const element = (id) => document.getElementById(id);

const settings = new Settings();
const stage = new Stage(chooseVariant);
const past = new History(element("past"), element("history"), restore);
let picture = null; // the one to edit
let mask = null;
let shown = null; // the edit on the stage: {before, settings, results: [{picture, seed, facts}], chosen}
let running = null; // the AbortController of the edit under way

// ---- pictures come in

/** Read a file and hand it to `set`, or say why it cannot be used. */
async function take(file, set) {
  try {
    set(await readPicture(file, settings.limits));
    clearProblems();
  } catch (error) {
    showProblems([error]);
  }
}

function refuseDrop() {
  showProblems([new Error("That is not a file. Save the picture first, then choose or drop it.")]);
}

function setPicture(taken) {
  picture = taken;
  element("input-image").src = taken.url;
  element("input-image").hidden = false;
  element("input-hint").textContent = "Choose, drop or paste another";
  element("input-facts").textContent = `${taken.name}, ${taken.words}`;
}

function setMask(taken) {
  mask = taken;
  element("mask-image").hidden = element("mask-remove").hidden = !taken;
  if (taken) element("mask-image").src = taken.url;
  element("mask-facts").textContent = taken
    ? `${taken.name}, ${taken.words}`
    : "A picture of the same size: white is edited, black is kept.";
}

// ---- one edit

/** All that is asked, as the page says it now. */
function wishes() {
  const instruction = element("instruction").value.trim().replace(/\s+/g, " "); // the lines of the box mean nothing
  return { ...settings.read(), instruction, picture, mask };
}

function begin() {
  clearProblems();
  const asked = wishes();
  try {
    checkFiles(asked, settings.limits);
    checkWishes(asked, settings.limits);
  } catch (mistake) {
    showMistake(mistake);
    return;
  }
  edit(asked);
}

async function edit(asked) {
  const seeds = seedsFrom(asked.seed ?? randomSeed(), asked.variants);
  const results = [];
  running = new AbortController();
  showRunning(true);
  stage.begin(asked.picture, seeds);
  element("stage").scrollIntoView({ block: "nearest" });
  const started = performance.now();
  const waits = new Map(); // of variants that the server was too busy for: until when
  const ticking = setInterval(() => tick(started, waits), TICK_MS);
  const problems = await editVariants(asked, seeds, listener(asked, seeds, results, waits), running.signal);
  clearInterval(ticking);
  showRunning(false);
  end(asked, results.filter(Boolean), problems, performance.now() - started);
}

/** What happens to the variants of an edit, onto the page. */
function listener(asked, seeds, results, waits) {
  return {
    sending(place) {
      waits.delete(place);
      if (!waits.size) clearWait();
      stage.sending(place);
    },
    preview: (place, { b64_json: base64 }) => stage.preview(place, `data:image/png;base64,${base64}`),
    done(place, event) {
      const name = resultName(asked.instruction, seeds[place]);
      const made = pictureFromBase64(event.b64_json, name, event.size);
      results[place] = { picture: made, seed: seeds[place], facts: factsOf(event.ip2p) };
      stage.done(place, made);
    },
    busy(place, problem, until) {
      waits.set(place, until);
      showWait(`The server is busy and will be asked again by itself: ${problem.message}`, stop, problem.requestId);
    },
    loading: (state) => showWait(WAITING_FOR[state], stop),
  };
}

function tick(started, waits) {
  const now = performance.now();
  stage.elapsed(now - started);
  if (waits.size) showCountdown(Math.min(...waits.values()) - now);
}

function end(asked, results, problems, ms) {
  showProblems(problems.filter(({ name }) => name !== "AbortError"));
  if (results.length) {
    const chosen = Math.max(0, results.findIndex(({ seed }) => seed === stage.chosenSeed));
    shown = { before: asked.picture, settings: asked, results, chosen };
    past.add(shown);
  }
  if (shown) show(shown);
  else stage.clear();
  stage.say(outcome(results, problems, ms));
  forgetUnused();
  learnModels().catch((problem) => showProblems([problem]));
}

function outcome(results, problems, ms) {
  const seconds = `${(ms / 1000).toFixed(1)} s`;
  if (!problems.length) return `Done in ${seconds}.`;
  if (problems.some(({ name }) => name === "AbortError")) return `Stopped after ${seconds}.`;
  return results.length ? `Done in ${seconds}, but not all of it.` : "";
}

function stop() {
  running.abort();
}

function showRunning(on) {
  if (!on) {
    running = null;
    clearWait();
  }
  element("edit-button").textContent = on ? "Stop" : "Edit";
  element("edit-button").classList.toggle("stops", on);
  element("past").inert = on; // going back would take the stage from the edit under way
}

function showMistake(mistake) {
  showProblems([mistake]);
  if (!(mistake instanceof Mistake)) throw mistake;
  const control = element(mistake.field);
  control.closest("details")?.setAttribute("open", "");
  control.focus();
}

// ---- results

function show(edit) {
  shown = edit;
  stage.show(edit);
  settings.used(edit.results[edit.chosen].seed);
}

function chooseVariant(place) {
  if (running) return; // only looked at: there is no result yet
  shown.chosen = place;
  show(shown);
  past.draw();
}

function restore(edit) {
  setPicture(edit.before);
  setMask(edit.settings.mask);
  element("instruction").value = edit.settings.instruction;
  settings.write(edit.settings);
  show(edit);
  stage.say("");
  clearProblems();
  forgetUnused();
  element("stage").scrollIntoView({ block: "nearest" });
}

function editResult() {
  setPicture(shown.results[shown.chosen].picture);
  element("instruction").focus();
  element("instruction").select();
}

function resultName(instruction, seed) {
  const words = instruction.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  return `${[...words, seed].join("-").slice(-60)}.png`;
}

function factsOf(made) {
  const scales = `follow ${made.guidance_scale} · keep ${made.image_guidance_scale}`;
  return `Seed ${made.seed} · ${scales} · ${made.steps} steps · ${made.model}`;
}

function forgetUnused() {
  forgetAllBut(new Set([picture, mask, ...past.pictures(), ...(shown ? picturesOf(shown) : [])]));
}

// ---- the same from a program

function copyCommand(command, address) {
  clearProblems();
  const asked = { ...wishes(), picture: picture ?? { name: "in.png" } };
  try {
    checkWishes(asked, settings.limits);
  } catch (mistake) {
    showMistake(mistake);
    return;
  }
  copyShown(command(asked, settings.seedToRepeat, address));
}

// ---- the server

/** What a model starts from is known only after it has been loaded. */
async function learnModels() {
  if (settings.knowsTooLittle) settings.learn(await fetchModels());
}

async function meetServer() {
  await learnModels().catch(() => {}); // for its limits; whether it can be asked at all shows below
  try {
    await untilReady((state) => showWait(WAITING_FOR[state]));
    await learnModels();
  } catch (problem) {
    showProblems([problem]);
  }
  if (!running) clearWait();
}

// ---- buttons and keys

element("edit-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else begin();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault(); // a button that has the focus would be pressed, too: Edit, which is Stop by then
  if (!running) begin();
});
element("examples").addEventListener("click", ({ target }) => {
  if (target.localName !== "button") return;
  element("instruction").value = target.textContent;
  element("instruction").focus();
});
element("edit-result").addEventListener("click", editResult);
element("mask-remove").addEventListener("click", () => setMask(null));
element("copy-curl").addEventListener("click", () => copyCommand(curlCommand, EDITS));
element("copy-python").addEventListener("click", () => copyCommand(pythonProgram, API));
for (const id of ["input-image", "mask-image"]) {
  element(id).addEventListener("load", ({ target }) => markTiny(target));
}
takePictures(element("file-input"), (file) => take(file, setPicture), refuseDrop);
onFile(element("mask-input"), (file) => take(file, setMask));
meetServer();
