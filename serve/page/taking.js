// The three ways in for a picture: choosing a file, dropping one anywhere on the page, pasting one.

/** Calls `take(file)` for every file that comes in for the picture, `refuse()` for what is dropped and is no file. */
export function takePictures(input, take, refuse) {
  onFile(input, take);
  document.addEventListener("dragover", (event) => {
    if (isForControl(event)) return;
    event.preventDefault(); // else the browser leaves the page for what is dropped
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dropping"); // out of the window
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (isForControl(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
    else refuse();
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (!file) return; // text, for the control that has the focus
    event.preventDefault();
    take(file);
  });
}

/** A file over the control of the mask, or text over a box to write in: the browser does what is meant. */
function isForControl({ target, dataTransfer }) {
  const controls = dataTransfer.types.includes("Files") ? "input[type=file]" : "input, textarea";
  return target instanceof Element && target.matches(controls);
}

/** Calls `take(file)` when one is chosen, also when it is the same one again. */
export function onFile(input, take) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = "";
    if (file) take(file);
  });
}
