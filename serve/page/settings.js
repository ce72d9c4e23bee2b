// The controls below the instruction: what they start from, and what they say.

import { randomSeed } from "./form.js";

const MOST_VARIANTS = 4;
const element = (id) => document.getElementById(id);

export class Settings {
  #models = new Map(); // what is known of each; guidance and image guidance once it has been loaded
  #own = {}; // the values of the chosen model, by control
  #usedSeed = null;

  constructor() {
    for (const id of ["guidance", "image-guidance"]) joinSlider(element(id), element(`${id}-range`));
    element("model").addEventListener("change", () => this.#followModel());
    element("seed").addEventListener("input", () => this.#markKept());
    element("keep-seed").addEventListener("change", ({ target }) => this.#keepSeed(target.checked));
    element("reset-settings").addEventListener("click", () => this.reset());
    this.#offerVariants(MOST_VARIANTS);
  }

  /** Take in what the server says of its models, the default one first. */
  learn(models) {
    // A model that had to make room in memory no longer says its values, but has not changed them.
    for (const model of models) this.#models.set(model.id, { ...this.#models.get(model.id), ...model });
    if (!element("model").options.length) {
      element("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
      element("model-row").hidden = models.length < 2;
    }
    this.#followModel();
  }

  /** Limits of the chosen model; undefined before any are known. */
  get limits() {
    return this.#models.get(element("model").value)?.limits;
  }

  /** Whether the chosen model has not said yet what its own values are. */
  get knowsTooLittle() {
    return this.#models.get(element("model").value)?.guidance_scale === undefined;
  }

  /** Null is the server's own value, NaN what is no number. */
  read() {
    return {
      model: element("model").value || null,
      guidance: numberIn(element("guidance")),
      imageGuidance: numberIn(element("image-guidance")),
      steps: numberIn(element("steps")),
      seed: wholeIn(element("seed").value.trim()),
      variants: Number(element("variants-count").value),
      negativePrompt: element("negative-prompt").value.trim(),
    };
  }

  /** The other way round. */
  write(settings) {
    if (settings.model) element("model").value = settings.model;
    this.#followModel();
    put("guidance", settings.guidance);
    put("image-guidance", settings.imageGuidance);
    put("steps", settings.steps);
    put("seed", settings.seed);
    element("variants-count").value = settings.variants;
    element("negative-prompt").value = settings.negativePrompt;
    this.#markKept();
  }

  /** Back to what the model starts from. */
  reset() {
    for (const [id, value] of Object.entries(this.#own)) put(id, value);
    put("seed", null);
    element("variants-count").value = 1;
    element("negative-prompt").value = "";
    this.#markKept();
  }

  /** The seed of the picture that is looked at, which can be kept. */
  used(seed) {
    this.#usedSeed = seed;
    element("used-seed").textContent = `Used last: ${seed}`;
    this.#markKept();
  }

  /** The seed to repeat: the one that is kept, else the one that is looked at, else a new one. */
  get seedToRepeat() {
    return this.read().seed ?? this.#usedSeed ?? randomSeed();
  }

  #keepSeed(kept) {
    put("seed", kept ? this.#usedSeed : null);
  }

  #markKept() {
    const written = element("seed").value !== "";
    element("keep-seed").checked = written;
    element("keep-seed").disabled = !written && this.#usedSeed === null;
  }

  /** What nobody has changed becomes the chosen model's own. */
  #followModel() {
    const model = this.#models.get(element("model").value) ?? {};
    const own = {
      guidance: model.guidance_scale ?? null,
      "image-guidance": model.image_guidance_scale ?? null,
      steps: model.limits?.default_steps ?? null,
    };
    for (const [id, value] of Object.entries(own)) {
      if (numberIn(element(id)) === (this.#own[id] ?? null)) put(id, value);
    }
    this.#own = own;
    if (model.limits) this.#obey(model.limits);
  }

  #obey({ max_steps: maxSteps, max_n: maxVariants }) {
    element("steps").max = maxSteps;
    this.#offerVariants(Math.min(MOST_VARIANTS, maxVariants));
  }

  #offerVariants(most) {
    const select = element("variants-count");
    if (select.options.length === most) return;
    select.replaceChildren(...Array.from({ length: most }, (_, place) => new Option(place + 1, place + 1)));
  }
}

/** The number is what counts, and may lie beyond the slider's ends. */
function joinSlider(number, range) {
  range.addEventListener("input", () => {
    number.value = range.value;
  });
  number.addEventListener("input", () => {
    if (number.value !== "") range.value = number.value;
  });
}

function put(id, value) {
  element(id).value = value ?? "";
  element(id).dispatchEvent(new Event("input"));
}

function numberIn(input) {
  if (input.validity.badInput) return Number.NaN;
  return input.value === "" ? null : Number(input.value);
}

function wholeIn(text) {
  if (text === "") return null;
  return /^\d{1,10}$/.test(text) ? Number(text) : Number.NaN;
}
