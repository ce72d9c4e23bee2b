// The three ways in for a picture: choosing a file, dropping one anywhere on the page, pasting one.

/** Calls `take(file)` for every file that comes in for the picture. */
export function takePictures(input, take) {
  onFile(input, take);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dropping"); // out of the window
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (event.target.closest?.("input[type=file]")) return; // the mask's own control
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (!file) return; // text, for the control that has the focus
    event.preventDefault();
    take(file);
  });
}

/** Calls `take(file)` when one is chosen, also when it is the same one again. */
export function onFile(input, take) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = "";
    if (file) take(file);
  });
}
