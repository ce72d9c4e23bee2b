// The edits of this session, newest first, to go back to.

const KEPT = 30;

export class History {
  #edits = [];

  /** `list`: the <ul> that shows them, hidden with `section` as long as it is empty. */
  constructor(section, list, onRestore) {
    Object.assign(this, { section, list, onRestore });
  }

  add(edit) {
    this.#edits = [edit, ...this.#edits].slice(0, KEPT);
    this.draw();
  }

  /** After an edit's choice of variant has changed, too. */
  draw() {
    this.section.hidden = this.#edits.length === 0;
    this.list.replaceChildren(...this.#edits.map((edit) => this.#item(edit)));
  }

  /** All pictures that going back may show. */
  pictures() {
    return this.#edits.flatMap(picturesOf);
  }

  #item(edit) {
    const { picture, facts } = edit.results[edit.chosen];
    const button = document.createElement("button");
    button.type = "button";
    const { instruction } = edit.settings;
    button.append(thumb(edit.before), thumb(picture), words("strong", instruction), words("small", facts));
    button.addEventListener("click", () => this.onRestore(edit));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }
}

export function picturesOf({ before, results, settings }) {
  return [before, settings.mask, ...results.map(({ picture }) => picture)];
}

function thumb(picture) {
  const image = new Image(64, 64);
  image.src = picture.url;
  image.alt = ""; // the instruction beside it says what it is
  return image;
}

function words(tag, text) {
  const line = document.createElement(tag);
  line.textContent = text;
  return line;
}
