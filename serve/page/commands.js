// The same edit from a shell and from Python, with every text quoted so that it arrives as it was typed.

import { seedsFrom, textFields } from "./form.js";

const KEY = "YOUR_KEY";

/** One POSIX shell command, or a loop over the seeds of the variants. `url`: of the edit route. */
export function curlCommand(settings, seed, url) {
  const seeds = seedsFrom(seed, settings.variants);
  if (seeds.length === 1) return curlCall(settings, url, `-F seed=${seed}`, "out.png", "");
  const call = curlCall(settings, url, '-F "seed=$seed"', '"out-$seed.png"', "  ");
  return `for seed in ${seeds.join(" ")}; do\n${call}\ndone`;
}

/** A Python program for OpenAI's own client. `api`: the address that the client adds its routes to. */
export function pythonProgram(settings, seed, api) {
  const { prompt, model, ...extra } = Object.fromEntries(textFields(settings, seed));
  const named = { model, image: opened(settings.picture), mask: settings.mask && opened(settings.mask) };
  const lines = [
    model && `model=${pythonText(model)}`,
    `image=${named.image}`,
    named.mask && `mask=${named.mask}`,
    `prompt=${pythonText(prompt)}`,
    settings.variants > 1 && `n=${settings.variants}`,
    `extra_body={\n${pythonItems(extra)}    }`,
  ].filter(Boolean);
  return [
    "import base64",
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonText(api)}, api_key=${pythonText(KEY)})`,
    "answer = client.images.edit(",
    ...lines.map((line) => `    ${line},`),
    ")",
    ...saving(settings, seed),
    "",
  ].join("\n");
}

function curlCall(settings, url, seed, output, indent) {
  const parts = [
    `curl --fail-with-body ${shellText(url)}`,
    `-H ${shellText(`Authorization: Bearer ${KEY}`)}`,
    `-H ${shellText("Accept: image/png")}`,
    `-F ${shellText(`image=@${curlFile(settings.picture)}`)}`,
    ...(settings.mask ? [`-F ${shellText(`mask=@${curlFile(settings.mask)}`)}`] : []),
    ...textFields(settings, null).map(curlField),
    seed,
    `-o ${output}`,
  ];
  return indent + parts.join(` \\\n${indent}  `);
}

/** With -F, curl takes a text that begins with @ or < for a file's name. */
function curlField([name, value]) {
  return typeof value === "number" ? `-F ${name}=${value}` : `--form-string ${shellText(`${name}=${value}`)}`;
}

/** curl reads a bare name up to the next `,` or `;`. */
function curlFile({ name }) {
  return `"${name.replace(/["\\]/g, "\\$&")}"`;
}

function shellText(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** JSON's escapes in a text are all Python's too. */
function pythonText(text) {
  return JSON.stringify(text);
}

function pythonItems(values) {
  return Object.entries(values)
    .map(([name, value]) => `        ${pythonText(name)}: ${JSON.stringify(value)},\n`)
    .join("");
}

function opened({ name }) {
  return `open(${pythonText(name)}, "rb")`;
}

function saving({ variants }, seed) {
  if (variants === 1) return ['Path("out.png").write_bytes(base64.b64decode(answer.data[0].b64_json))'];
  return [
    `for seed, picture in zip([${seedsFrom(seed, variants).join(", ")}], answer.data):`,
    '    Path(f"out-{seed}.png").write_bytes(base64.b64decode(picture.b64_json))',
  ];
}
