// Making an edit in one or several variants, each a stream of its own, patient with a server that is busy.

import { editForm } from "./form.js";
import { ServerProblem, pause, streamEdit, untilReady } from "./server.js";

const BUSY = 429;
const NOT_READY = 503;
const SHORTEST_WAIT_MS = 500; // the server may ask for a millisecond; a busy one is not helped by that
const USUAL_WAIT_MS = 2000; // where it does not say

/**
 * Edit once a seed, all at the same time. Resolves when every variant has ended, with their errors.
 *
 * `told` hears of what happens: `preview(place, event)`, `done(place, event)`, `busy(place, problem, until)` with
 * `until` in `performance.now()` milliseconds, `loading(state)`, and `sending(place)` before each try.
 */
export async function editVariants(settings, seeds, told, signal) {
  const variants = seeds.map((seed, place) => editPatiently(settings, seed, place, told, signal));
  const ended = await Promise.allSettled(variants);
  return ended.filter(({ status }) => status === "rejected").map(({ reason }) => reason);
}

async function editPatiently(settings, seed, place, told, signal) {
  for (;;) {
    told.sending(place);
    try {
      return await editOnce(editForm(settings, seed), place, told, signal);
    } catch (problem) {
      if (!(problem instanceof ServerProblem)) throw problem;
      await untilWorthATry(problem, place, told, signal);
    }
  }
}

async function editOnce(form, place, told, signal) {
  for await (const { name, data } of streamEdit(form, signal)) {
    if (name === "image_edit.partial_image") told.preview(place, data);
    if (name === "image_edit.completed") return told.done(place, data);
  }
}

/** Wait out what passes by itself; throw everything else. */
async function untilWorthATry(problem, place, told, signal) {
  if (problem.status === BUSY) {
    const ms = Math.max(problem.retryAfterMs ?? USUAL_WAIT_MS, SHORTEST_WAIT_MS);
    told.busy(place, problem, performance.now() + ms);
    await pause(ms, signal);
  } else if (problem.status === NOT_READY) {
    await pause(SHORTEST_WAIT_MS, signal); // a server may say that it is ready and still refuse
    await untilReady(told.loading, signal);
  } else {
    throw problem;
  }
}
