// Server-sent events out of the body of an answer. The browser's own EventSource can only GET.

const BETWEEN_EVENTS = /\r?\n\r?\n/;

/** The events of a stream of bytes, as `{name, data}` with `data` parsed. Comments are left out. */
export async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (text + value).split(BETWEEN_EVENTS);
      text = blocks.pop(); // not whole yet
      yield* blocks.map(eventOf).filter(Boolean);
    }
  } finally {
    reader.cancel().catch(() => {}); // it fails where the connection has: nobody listens any more either way
  }
}

function eventOf(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "event") name = value;
    if (field === "data") data.push(value);
  }
  return data.length ? { name, data: JSON.parse(data.join("\n")) } : null;
}
