// Before and after on top of each other, with a line between them that can be dragged, or moved by arrow keys.

const TINY_SIDE = 128; // pixels; such pictures are enlarged with their pixels showing

export class Compare {
  constructor(figure) {
    this.figure = figure;
    this.before = figure.querySelector("#before-image");
    this.after = figure.querySelector("#result-image");
    this.range = figure.querySelector("input");
    this.range.addEventListener("input", () => this.#draw());
    for (const image of [this.before, this.after]) image.addEventListener("load", () => markTiny(image));
    this.after.addEventListener("load", () => this.#fit());
    this.#followPointers();
    this.#draw();
  }

  /** Show `afterUrl` over `beforeUrl`; without a slider as long as it is only a preview. */
  show(beforeUrl, afterUrl, isResult) {
    if (this.before.src !== beforeUrl) this.before.src = beforeUrl;
    if (this.after.src !== afterUrl) this.after.src = afterUrl;
    this.figure.classList.toggle("preview", !isResult);
    this.range.disabled = !isResult;
  }

  #draw() {
    this.figure.style.setProperty("--split", `${this.range.value}%`);
    this.range.setAttribute("aria-valuetext", `${Math.round(this.range.value)} percent before`);
  }

  #fit() {
    this.figure.style.setProperty("--ratio", this.after.naturalWidth / this.after.naturalHeight);
  }

  // The range itself takes keys only: by touch, browsers disagree on what a press beside its thumb does.
  #followPointers() {
    this.figure.addEventListener("pointerdown", (event) => {
      if (this.range.disabled || event.button !== 0) return;
      this.figure.setPointerCapture(event.pointerId);
      this.#moveTo(event.clientX);
    });
    this.figure.addEventListener("pointermove", (event) => {
      if (this.figure.hasPointerCapture(event.pointerId)) this.#moveTo(event.clientX);
    });
    this.figure.addEventListener("click", () => this.range.focus({ preventScroll: true }));
  }

  #moveTo(x) {
    const { left, width } = this.figure.getBoundingClientRect();
    this.range.value = (100 * (x - left)) / width;
    this.#draw();
  }
}

/** Enlarged pixels are honest for a drawing of 64 pixels and ugly for a photograph. */
export function markTiny(image) {
  image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= TINY_SIDE);
}
