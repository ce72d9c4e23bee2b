// Pictures in memory: a file, its address for <img>, and its size.

const MIN_SIDE = 8; // pixels; the server refuses smaller ones
const live = new Set();

/** A file that the browser shows as a picture. */
export class Picture {
  constructor(blob, name, width, height) {
    Object.assign(this, { blob, name, width, height, url: URL.createObjectURL(blob) });
    live.add(this);
  }

  get words() {
    return `${this.width} × ${this.height} pixels, ${sizeInWords(this.blob.size)}`;
  }
}

/** The picture in a file that somebody chose. Throws an Error with words for people. */
export async function readPicture(file, limits) {
  const name = file.name || "picture.png";
  if (limits && file.size > limits.max_body_bytes) {
    const most = sizeInWords(limits.max_body_bytes);
    throw new Error(`${name} has ${sizeInWords(file.size)}; the server takes at most ${most}. Make it smaller first.`);
  }
  if (!isKnownFormat(new Uint8Array(await file.slice(0, 12).arrayBuffer()))) {
    throw new Error(`${name} is not a PNG, JPEG or WebP picture. Save it as one of these first.`);
  }
  const [width, height] = await shownSize(file, name);
  checkPixels(name, width, height, limits);
  return new Picture(file, name, width, height);
}

/** The picture in a result: base64 of a PNG of `size`, "64x64". */
export function pictureFromBase64(text, name, size) {
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  return new Picture(new Blob([bytes], { type: "image/png" }), name, ...size.split("x").map(Number));
}

/** Give back the memory of all pictures but these. */
export function forgetAllBut(needed) {
  for (const picture of live) {
    if (needed.has(picture)) continue;
    URL.revokeObjectURL(picture.url);
    live.delete(picture);
  }
}

export function sizeInWords(bytes) {
  if (bytes < 1024) return `${bytes} bytes`;
  const [size, unit] = bytes < 2 ** 20 ? [bytes / 1024, "KB"] : [bytes / 2 ** 20, "MB"];
  return `${size.toFixed(size < 10 ? 1 : 0)} ${unit}`;
}

/** By the first bytes: a name's ending or a type that was claimed may be wrong, and the server looks here too. */
export function isKnownFormat(bytes) {
  const text = String.fromCharCode(...bytes);
  return text.startsWith("\x89PNG") || text.startsWith("\xff\xd8\xff") || /^RIFF[^]{4}WEBP/.test(text);
}

async function shownSize(file, name) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    return [image.naturalWidth, image.naturalHeight]; // upright, as the server turns it
  } catch {
    throw new Error(`${name} cannot be shown; the file may be damaged. Save it again.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

function checkPixels(name, width, height, limits) {
  if (Math.min(width, height) < MIN_SIDE) {
    throw new Error(`${name} has ${width} × ${height} pixels; at least ${MIN_SIDE} a side are needed.`);
  }
  if (limits && width * height > limits.max_pixels) {
    const [millions, most] = [width * height, limits.max_pixels].map((pixels) => (pixels / 1e6).toFixed(1));
    throw new Error(`${name} has ${millions} million pixels; the server takes at most ${most}. Make it smaller first.`);
  }
}
