// What is asked: from the settings on the page to the fields of the server's form, checked before it is sent.

import { sizeInWords } from "./pictures.js";

export const PREVIEWS = 3;
export const MAX_SEED = 2 ** 32 - 1;
const MAX_GUIDANCE = 100;
const ROOM_FOR_WORDS = 16 * 1024; // bytes of a body beside its files

/** Something to mend on the page before anything is sent; `field` is the id of its control. */
export class Mistake extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Names and values of the text fields, as the server knows them; what is null is left to the server. */
export function textFields(settings, seed) {
  const fields = {
    prompt: settings.instruction,
    model: settings.model,
    seed,
    num_inference_steps: settings.steps,
    guidance_scale: settings.guidance,
    image_guidance_scale: settings.imageGuidance,
    negative_prompt: settings.negativePrompt || null,
  };
  return Object.entries(fields).filter(([, value]) => value !== null);
}

/** The form of one streamed edit. */
export function editForm(settings, seed) {
  const form = new FormData();
  form.set("image", settings.picture.blob, settings.picture.name);
  if (settings.mask) form.set("mask", settings.mask.blob, settings.mask.name);
  for (const [name, value] of textFields(settings, seed)) form.set(name, value);
  form.set("stream", "true");
  form.set("partial_images", PREVIEWS);
  return form;
}

/** The seeds of all variants: `first` and those that follow, around the end as the server counts them. */
export function seedsFrom(first, variants) {
  return Array.from({ length: variants }, (_, place) => (first + place) % (MAX_SEED + 1));
}

export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** Throw a Mistake where the server would refuse the files. Without `limits` (not known yet) that is left to it. */
export function checkFiles(settings, limits) {
  if (!settings.picture) throw new Mistake("file-input", "Choose a picture first.");
  checkMask(settings);
  checkBody(settings, limits);
}

/** The same for words and numbers. */
export function checkWishes(settings, limits) {
  checkWords(settings, limits);
  checkGuidance("guidance", "Follow the instruction", settings.guidance);
  checkGuidance("image-guidance", "Keep the picture", settings.imageGuidance);
  checkWhole("steps", "Steps", settings.steps, 1, limits?.max_steps ?? Infinity);
  checkWhole("seed", "The seed", settings.seed, 0, MAX_SEED);
}

function checkMask({ picture, mask }) {
  if (!mask || (mask.width === picture.width && mask.height === picture.height)) return;
  const [found, wanted] = [mask, picture].map(({ width, height }) => `${width} × ${height}`);
  throw new Mistake(
    "mask-input",
    `The mask has ${found} pixels and the picture ${wanted}. Choose a mask of the picture’s size, or remove it.`,
  );
}

function checkWords({ instruction, negativePrompt }, limits) {
  if (!instruction) throw new Mistake("instruction", "Say what should change.");
  const most = limits?.max_prompt_chars ?? Infinity;
  for (const [field, text] of [["instruction", instruction], ["negative-prompt", negativePrompt]]) {
    const length = [...text].length; // characters, not UTF-16 units: that is what the server counts
    if (length > most) throw new Mistake(field, `This text has ${length} characters; at most ${most} are read.`);
  }
}

function checkGuidance(field, name, value) {
  if (value === null || (value >= 0 && value <= MAX_GUIDANCE)) return;
  throw new Mistake(field, `“${name}” must be a number from 0 to ${MAX_GUIDANCE}.`);
}

function checkWhole(field, name, value, least, most) {
  if (value === null || (Number.isInteger(value) && value >= least && value <= most)) return;
  const range = most === Infinity ? `of at least ${least}` : `from ${least} to ${most}`;
  throw new Mistake(field, `${name} must be a whole number ${range}.`);
}

function checkBody({ picture, mask }, limits) {
  const bytes = picture.blob.size + (mask?.blob.size ?? 0) + ROOM_FOR_WORDS;
  if (!limits || bytes <= limits.max_body_bytes) return;
  const files = mask ? "The picture and the mask together have" : "The picture has";
  const most = sizeInWords(limits.max_body_bytes);
  throw new Mistake("file-input", `${files} ${sizeInWords(bytes)}; the server takes at most ${most}. Make it smaller.`);
}
