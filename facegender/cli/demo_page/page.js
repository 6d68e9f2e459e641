"use strict";

const COLOURS = { female: [217, 95, 2], male: [27, 108, 168], uncertain: [85, 85, 85] };
const element = (id) => document.getElementById(id);
let answer = null; // what the server said of the picture
let chosen = 0; // index of the face that is shown
let asked = 0; // requests so far: only the last one's answer is shown

const rgba = (label, alpha) => `rgba(${COLOURS[label].join(",")},${alpha})`;
const labelOf = (face) =>
  face.confidence < Number(element("abstain").value) ? "uncertain" : face.label;

async function post(address, body) {
  const response = await fetch(address, { method: "POST", body });
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

async function load(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

async function send(blob, files = 1) {
  const request = ++asked;
  stopCamera();
  element("status").textContent = "Looking ...";
  element("answer").hidden = true;
  try {
    const content = await post("/predict", blob);
    content.image = await load(content.picture);
    for (const face of content.faces) face.image = await load(face.crop);
    if (request !== asked) return;
    answer = content;
    element("status").textContent = [
      content.faces.length ? "" : "no face", files > 1 ? `the first of ${files} files` : "",
    ].filter(Boolean).join(", ");
    element("threshold").textContent = `From P(male) = ${content.threshold} on the label is male.`;
    fitSlider(content.threshold);
    element("left-out").textContent =
      content.left_out ? `${content.left_out} smaller faces are not shown.` : "";
    element("answer").hidden = false;
    choose(0);
  } catch (error) {
    if (request === asked) element("status").textContent = `Not judged: ${error.message}`;
  }
}

// At its left end, the slider makes no label uncertain: none has a lower probability.
function fitSlider(threshold) {
  const slider = element("abstain");
  const isAtLeft = slider.value === slider.min;
  slider.min = Math.min(threshold, 1 - threshold);
  if (isAtLeft) slider.value = slider.min;
}

function choose(index) {
  chosen = index;
  show();
  const face = answer.faces[index];
  for (const figure of document.querySelectorAll("figure")) figure.hidden = !face;
  if (!face) return;
  drawn("crop", face.image);
  drawn("map", face.image);
  element("strength").textContent = "";
  showMap(face);
}

function show() {
  element("below").textContent = Number(element("abstain").value).toFixed(2);
  const list = element("faces");
  const hadFocus = list.contains(document.activeElement);
  list.replaceChildren(...answer.faces.map(line));
  if (hadFocus) list.querySelector('[aria-pressed="true"]').focus();
  const pen = drawn("picture", answer.image);
  const scale = answer.image.naturalWidth / answer.width;
  const size = Math.max(pen.canvas.width, pen.canvas.height);
  pen.font = `${Math.max(12, size / 36)}px sans-serif`;
  pen.textBaseline = "top";
  answer.faces.forEach((face, index) => {
    if (!face.box) return;
    const [left, top, width, height] =
      ["left", "top", "width", "height"].map((name) => face.box[name] * scale);
    const text = `${index + 1} ${labelOf(face)}`;
    pen.lineWidth = (index === chosen ? 2 : 1) * Math.max(1, size / 400);
    pen.strokeStyle = pen.fillStyle = rgba(labelOf(face), 1);
    pen.strokeRect(left, top, width, height);
    const measured = pen.measureText(text);
    const [x, y] = [Math.max(left, 0), Math.max(top, 0)];
    pen.fillRect(x, y, measured.width + 6, measured.fontBoundingBoxDescent + 4);
    pen.fillStyle = "#fff";
    pen.fillText(text, x + 3, y + 2);
  });
}

function line(face, index) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const label = document.createElement("span");
  label.className = label.textContent = labelOf(face);
  const where = face.box
    ? `${Math.round(face.box.width)}x${Math.round(face.box.height)} pixels, ` +
      `score of the detector ${face.box.score.toFixed(2)}`
    : "the whole picture";
  button.append(label, ` P(male) = ${face.probability.toFixed(4)}, ${where}`);
  button.type = "button";
  button.setAttribute("aria-pressed", String(index === chosen));
  button.addEventListener("click", () => choose(index));
  item.append(button);
  return item;
}

function drawn(id, image) {
  const canvas = element(id);
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  return pen;
}

async function showMap(face) {
  try {
    face.map ??= (await post("/map", bytes(face.crop))).map;
  } catch (error) {
    element("strength").textContent = `No map: ${error.message}`;
    return;
  }
  if (answer.faces[chosen] !== face) return;
  const pen = drawn("map", face.image);
  const largest = Math.max(...face.map.flat().map(Math.abs));
  face.map.forEach((row, y) => row.forEach((value, x) => {
    const side = pen.canvas.width / row.length;
    pen.fillStyle = rgba(value > 0 ? "male" : "female", (0.75 * Math.abs(value)) / (largest || 1));
    pen.fillRect(x * side, y * side, side, side);
  }));
  element("strength").textContent =
    `Covered with grey, no square moves P(male) by more than ${largest.toFixed(4)}.`;
}

function bytes(address) {
  return Uint8Array.from(atob(address.split(",")[1]), (letter) => letter.charCodeAt(0));
}

function stopCamera() {
  for (const track of element("video").srcObject?.getTracks() ?? []) track.stop();
  element("video").srcObject = null;
  element("video").hidden = element("take").hidden = true;
  element("camera").textContent = "Use the camera";
}

element("file").addEventListener("change", (event) => {
  if (event.target.files.length) send(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
element("camera").addEventListener("click", async () => {
  try {
    const video = element("video");
    if (video.srcObject) return stopCamera();
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    video.hidden = false;
    await video.play();
    element("take").hidden = false;
    element("camera").textContent = "Stop the camera";
  } catch (error) {
    element("status").textContent = `The camera cannot be used: ${error.message}`;
  }
});
element("take").addEventListener("click", () => {
  const video = element("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  stopCamera();
  canvas.toBlob((blob) => send(blob), "image/png");
});
element("abstain").addEventListener("input", show);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind !== "drop") return;
    const files = event.dataTransfer.files;
    if (files.length) send(files[0], files.length);
    else element("status").textContent = "Not judged: what was dropped is not a file.";
  });
}
