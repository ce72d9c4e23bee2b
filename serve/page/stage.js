// Where the edit appears: its previews, then the result beside what it came from, and the variants to choose from.

import { Compare } from "./compare.js";
import { PREVIEWS } from "./form.js";

const element = (id) => document.getElementById(id);

export class Stage {
  #looks = []; // one a variant: what it looks like now, and how far it is
  #chosen = 0;

  /** `onChoose(place)`: another variant is looked at. */
  constructor(onChoose) {
    this.root = element("stage");
    this.compare = new Compare(element("compare"));
    this.onChoose = onChoose;
  }

  /** An edit of `before` begins. */
  begin(before, seeds) {
    this.before = before;
    this.#looks = seeds.map((seed) => ({ seed, url: before.url, previews: 0, picture: null }));
    this.#chosen = 0;
    this.#enter("running");
    this.say("");
    this.elapsed(0);
    this.#drawVariants();
    this.#draw();
  }

  /** A try of one variant begins, perhaps again. */
  sending(place) {
    Object.assign(this.#looks[place], { url: this.before.url, previews: 0 });
    this.#drawLook(place);
  }

  preview(place, url) {
    const look = this.#looks[place];
    Object.assign(look, { url, previews: look.previews + 1 });
    this.#drawLook(place);
  }

  done(place, picture) {
    Object.assign(this.#looks[place], { url: picture.url, previews: PREVIEWS + 1, picture });
    this.#drawLook(place);
  }

  /** Show what an edit came to: its results, and the one of them that was chosen. */
  show({ before, results, chosen }) {
    this.before = before;
    this.#looks = results.map(({ seed, picture }) => ({ seed, url: picture.url, previews: PREVIEWS + 1, picture }));
    this.#chosen = chosen;
    this.#enter("done");
    this.#drawVariants();
    this.#draw();
    this.#describe(results[chosen]);
  }

  /** The seed of the variant that is looked at. */
  get chosenSeed() {
    return this.#looks[this.#chosen].seed;
  }

  clear() {
    this.#enter("empty");
  }

  say(words) {
    element("status").textContent = words;
  }

  elapsed(ms) {
    element("elapsed").textContent = `${(ms / 1000).toFixed(1)} s`;
  }

  #enter(state) {
    this.root.dataset.state = state;
    this.root.setAttribute("aria-busy", state === "running");
  }

  #choose(place) {
    this.#chosen = place;
    this.#draw();
    this.onChoose(place);
  }

  #drawLook(place) {
    this.#thumbs()[place]?.querySelector("img").setAttribute("src", this.#looks[place].url);
    this.#draw();
  }

  #draw() {
    const look = this.#looks[this.#chosen];
    this.compare.show(this.before.url, look.url, look.picture !== null);
    element("progress").value = this.#share();
    this.#thumbs().forEach((thumb, place) => thumb.setAttribute("aria-pressed", place === this.#chosen));
  }

  #share() {
    const seen = this.#looks.reduce((sum, look) => sum + look.previews, 0);
    return seen / (this.#looks.length * (PREVIEWS + 1));
  }

  #drawVariants() {
    const several = this.#looks.length > 1 ? this.#looks : [];
    element("variants").replaceChildren(...several.map((look, place) => this.#variant(look, place)));
  }

  #variant(look, place) {
    const button = document.createElement("button");
    button.type = "button";
    const image = new Image();
    image.src = look.url;
    image.alt = `Variant ${place + 1}, seed ${look.seed}`;
    button.append(image);
    button.addEventListener("click", () => this.#choose(place));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  #thumbs() {
    return [...element("variants").querySelectorAll("button")];
  }

  #describe({ picture, facts }) {
    element("result-facts").textContent = `${facts} · ${picture.words}`;
    Object.assign(element("download"), { href: picture.url, download: picture.name });
  }
}
