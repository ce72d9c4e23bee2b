// Onto the clipboard, and into view: what is copied should be seen, and some browsers give no clipboard without https.

const element = (id) => document.getElementById(id);

/** Show `text` and copy it; says what came of that. */
export async function copyShown(text) {
  const box = element("command-text");
  box.hidden = false;
  box.value = text;
  element("copied").textContent = (await copied(text, box))
    ? "Copied. Put your key in place of YOUR_KEY; a server without keys takes any."
    : "This browser does not let pages copy. The text below is selected: copy it yourself.";
}

async function copied(text, box) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    box.focus();
    box.select();
    return document.execCommand("copy");
  }
}
