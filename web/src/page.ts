// The page: what the user opens, sees, changes and takes away. Everything heavy happens in the worker.

import { Camera, CameraError } from "./camera.js";
import { Client, Refused } from "./client.js";
import { drawFrame, drawMask, drawOverlay } from "./draw.js";
import { encodeMask, maskOf, summarize, type Summary } from "./mask.js";
import type { Engine, EngineName, Frame, PageFacts } from "./messages.js";
import type { Size } from "./resize.js";
import { csv, DISCLAIMER, percent, pixels, qualityWords, resultWords } from "./words.js";

/** Their results are kept at the model's size, so that the table follows the slider: 0.3 to 0.4 MB each. */
const MOST_PICTURES = 300;
const PICTURE_NAME = /\.(jpe?g|png|webp|bmp|tiff?|gif|heic|avif)$/i;

interface Item {
  key: number;
  name: string;
  file: Blob;
  state: "waiting" | "done" | "refused";
  message?: string;
  size?: Size;
  summary?: Summary;
  /** The threshold of the summary. */
  threshold?: number;
}

interface Shown {
  name: string;
  frame: Frame;
  mask: Uint8Array;
  summary: Summary;
}

function element<T extends HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

const ui = {
  view: element("view"),
  frame: element<HTMLCanvasElement>("frame"),
  overlay: element<HTMLCanvasElement>("overlay"),
  mask: element<HTMLCanvasElement>("mask"),
  files: element<HTMLInputElement>("files"),
  folders: element<HTMLInputElement>("folders"),
  threshold: element<HTMLInputElement>("threshold"),
  camera: element<HTMLButtonElement>("camera"),
  freeze: element<HTMLButtonElement>("freeze"),
  device: element<HTMLSelectElement>("device"),
  keys: element<HTMLDialogElement>("keys"),
};

let facts: PageFacts;
let ready = false;
let items: Item[] = [];
let chosen = -1;
let shown: Shown | null = null;
let lastKey = 0;
/** Counts what was asked for last: an answer to an older question is not shown. */
let turn = 0;
/** Keys of the pictures that the worker has in hand. */
const inHand = new Set<number>();
let camera: Camera | null = null;
let frozen = false;

function threshold(): number {
  return Number(ui.threshold.value);
}

function say(id: string, words: string): void {
  const place = element(id);
  if (place.textContent !== words) place.textContent = words;
}

function complain(words: string | null): void {
  element("error").hidden = words === null;
  say("error", words ?? "");
}

/** What the page remembers; a browser that forbids it forgets. */
function recall(name: string): string | null {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function remember(name: string, value: string): void {
  try {
    localStorage.setItem(name, value);
  } catch {
    // asked again next time
  }
}

// Loading --------------------------------------------------------------------------------------------------

const query = new URLSearchParams(location.search);
const REMEMBERED = "polypseg-engine";

const client = new Client({
  loading(done, total) {
    element<HTMLProgressElement>("progress").value = done / total;
    say("engine", `Loading the model: ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
  },
  ready(engine, milliseconds) {
    ready = true;
    element("progress").hidden = true;
    performance.mark("ready", { detail: milliseconds });
    tellEngine(engine);
    if (chosen >= 0) void showChosen();
    void proceed();
    void keepOffline();
  },
  engine(engine) {
    remember(REMEMBERED, `${engine.name} ${facts.version}`);
    tellEngine(engine);
  },
  failed(message) {
    element("progress").hidden = true;
    say("engine", "The model is not loaded.");
    complain(`The model cannot be loaded: ${message}. Reload the page; an old browser may need an update.`);
  },
});

function tellEngine(engine: Engine): void {
  const threads = engine.threads === 1 ? "1 thread" : `${engine.threads} threads`;
  say("engine", engine.name === "webgpu" ? "Runs on the graphics card (WebGPU)." : `Runs on the processor (WASM, ${threads}).`);
  document.documentElement.dataset.engine = `${engine.name} ${engine.threads}`;
}

async function begin(): Promise<void> {
  const response = await fetch("page.json");
  if (!response.ok) throw new Error(`page.json: ${response.status}`);
  facts = (await response.json()) as PageFacts;
  ui.threshold.value = String(facts.threshold);
  showThreshold();
  say("quality", qualityWords(facts));
  say("model", `${facts.model.name}, ${facts.model.precision}, license ${facts.model.license}`);
  say("lesions-name", `Lesions (≥ ${facts.min_area} px)`);
  const asked = query.get("engine");
  const remembered = recall(REMEMBERED) === `webgpu ${facts.version}`;
  const engine: EngineName = asked === "webgpu" || (remembered && asked !== "wasm") ? "webgpu" : "wasm";
  client.start(facts, engine);
}

/** Register the service worker once the large files are here, so that each travels once. */
async function keepOffline(): Promise<void> {
  try {
    if (!("serviceWorker" in navigator)) throw new Error("no service workers");
    await navigator.serviceWorker.register("service_worker.js");
    await navigator.serviceWorker.ready;
    void navigator.storage?.persist?.();
    const threads = self.crossOriginIsolated ? "" : " It uses more threads after a reload.";
    say("offline", `Works without a network from now on.${threads}`);
    document.documentElement.dataset.offline = "ready";
  } catch {
    say("offline", "This browser does not keep the page for use without a network.");
  }
  if (!query.has("engine") && !recall(REMEMBERED)?.endsWith(facts.version)) client.tryGpu();
}

// Files ----------------------------------------------------------------------------------------------------

function open(files: readonly File[]): void {
  const pictures = files.filter((file) => files.length === 1 || PICTURE_NAME.test(file.name));
  if (!files.length) return;
  stopCamera();
  complain(null);
  if (!pictures.length) {
    complain(`None of the ${files.length} files is a picture: open JPEG, PNG, WebP or BMP files.`);
    return;
  }
  const byName = new Intl.Collator("en", { numeric: true });
  const sorted = pictures.sort((a, b) => byName.compare(pathOf(a), pathOf(b)));
  if (sorted.length > MOST_PICTURES) {
    complain(`The page takes ${MOST_PICTURES} pictures at a time: the first ${MOST_PICTURES} of ${sorted.length} are open. \`polypseg segment\` takes any number.`);
  }
  client.forget();
  items = sorted.slice(0, MOST_PICTURES).map((file) => ({ key: ++lastKey, name: pathOf(file), file, state: "waiting" }));
  buildRows();
  choose(0);
  void proceed();
}

function pathOf(file: File): string {
  return file.webkitRelativePath || file.name;
}

function choose(index: number): void {
  if (index < 0 || index >= items.length) return;
  chosen = index;
  markChosen();
  void showChosen();
}

async function showChosen(): Promise<void> {
  const item = items[chosen];
  const mine = ++turn;
  ui.view.setAttribute("aria-busy", "true");
  say("live", ready ? "Looking at the picture." : "The picture is shown as soon as the model is loaded.");
  if (!ready) return;
  inHand.add(item.key);
  try {
    const began = performance.now();
    const { frame, summary } = await client.file(item.file, { key: item.key, threshold: threshold() });
    if (items.includes(item)) finish(item, frame, summary, threshold());
    if (mine !== turn) return;
    complainUnlessLimited();
    show({ name: item.name, frame, mask: maskOf(frame.logits, threshold()), summary });
    performance.mark("mask");
    tellTime(performance.now() - began);
  } catch (error) {
    refuse(item, error);
    if (mine !== turn) return;
    clear();
    complain(`${item.name}: ${item.message}`);
    say("live", "This picture was refused.");
  } finally {
    inHand.delete(item.key);
  }
}

/** Keep the word on too many pictures; take any other away. */
function complainUnlessLimited(): void {
  if (!element("error").textContent?.startsWith("The page takes")) complain(null);
}

function finish(item: Item, size: Size, summary: Summary, at: number): void {
  item.state = "done";
  item.size = { width: size.width, height: size.height };
  item.summary = summary;
  item.threshold = at;
  fillRow(item);
}

function refuse(item: Item, error: unknown): void {
  if (!(error instanceof Refused)) throw error;
  item.state = "refused";
  item.message = error.message;
  fillRow(item);
}

let proceeding = false;

/** Segment what waits, one after the other; the chosen picture goes first. */
async function proceed(): Promise<void> {
  if (!ready || proceeding) return;
  proceeding = true;
  try {
    for (;;) {
      const item = items.find((one) => one.state === "waiting" && !inHand.has(one.key));
      if (!item) break;
      const at = threshold();
      try {
        const { summary, size } = await client.measureFile(item.file, { key: item.key, threshold: at });
        if (items.includes(item)) finish(item, size, summary, at);
      } catch (error) {
        refuse(item, error);
      }
    }
  } finally {
    proceeding = false;
  }
  void measureAgain();
}

/** Bring the table's figures to the slider's threshold. */
async function measureAgain(): Promise<void> {
  for (const item of items) {
    const at = threshold();
    if (item.state !== "done" || item.threshold === at) continue;
    const summary = await client.measure(item.key, at);
    if (!items.includes(item)) return;
    finish(item, item.size as Size, summary, at);
  }
}

// The table ------------------------------------------------------------------------------------------------

function buildRows(): void {
  element("list").hidden = items.length < 2;
  const rows = element("rows");
  rows.replaceChildren(
    ...items.map((item, index) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = item.name;
      button.addEventListener("click", () => choose(index));
      head.append(button);
      row.append(head);
      return row;
    }),
  );
  items.forEach(fillRow);
}

function fillRow(item: Item): void {
  const index = items.indexOf(item);
  const row = element("rows").children[index];
  const open = items.filter((one) => one.state === "waiting").length;
  const refused = items.filter((one) => one.state === "refused").length;
  const rest = [open ? `${open} to do` : "", refused ? `${refused} refused` : ""].filter(Boolean);
  say("list-title", `${items.length} pictures${rest.length ? `, ${rest.join(", ")}` : ""}`);
  element<HTMLButtonElement>("save-table").disabled = items.length < 2 || open > 0;
  if (!row) return;
  while (row.children.length > 1) row.lastElementChild?.remove();
  const { summary } = item;
  const cells = summary
    ? [percent(summary.fraction), String(summary.regions.length), summary.maxProbability.toFixed(2)]
    : ["…", "", ""];
  if (item.state === "refused") {
    const cell = document.createElement("td");
    cell.colSpan = 3;
    cell.className = "refused";
    cell.textContent = item.message ?? "";
    row.append(cell);
    return;
  }
  for (const words of cells) {
    const cell = document.createElement("td");
    cell.textContent = words;
    row.append(cell);
  }
}

function markChosen(): void {
  for (const [index, row] of Array.from(element("rows").children).entries()) {
    if (index === chosen) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
    if (index === chosen) row.scrollIntoView({ block: "nearest" });
  }
}

// Showing --------------------------------------------------------------------------------------------------

function viewName(): string {
  return (document.querySelector('input[name="view"]:checked') as HTMLInputElement).value;
}

function show(result: Shown): void {
  shown = result;
  ui.view.removeAttribute("aria-busy");
  draw();
  const { frame, name } = result;
  say("caption", `${name}, ${frame.width} × ${frame.height} px`);
  const notes = element("notes");
  notes.hidden = !frame.notes.length;
  notes.replaceChildren(
    ...frame.notes.map((words) => {
      const line = document.createElement("li");
      line.textContent = words;
      return line;
    }),
  );
}

function draw(): void {
  if (!shown) return;
  const { frame, mask, summary } = shown;
  const view = viewName();
  ui.view.dataset.view = view;
  if (view === "both") drawFrame(ui.frame, frame);
  if (view === "mask") drawMask(ui.mask, mask, frame);
  else drawOverlay(ui.overlay, frame, mask);
  const words = resultWords(summary, threshold());
  ui.overlay.setAttribute("aria-label", `The frame with the outline. ${words}`);
  ui.mask.setAttribute("aria-label", `The mask. ${words}`);
  if (!camera || frozen) say("live", words);
  say("fraction", percent(summary.fraction));
  say("area", pixels(summary.area));
  say("lesions", String(summary.regions.length));
  say("highest", summary.maxProbability.toFixed(2));
  for (const id of ["save-mask", "save-overlay"]) element<HTMLButtonElement>(id).disabled = false;
}

function clear(): void {
  shown = null;
  ui.view.dataset.view = "empty";
  ui.view.removeAttribute("aria-busy");
  for (const id of ["fraction", "area", "lesions", "highest", "time"]) say(id, "–");
  say("caption", "");
  element("notes").hidden = true;
  for (const id of ["save-mask", "save-overlay"]) element<HTMLButtonElement>(id).disabled = true;
}

function tellTime(milliseconds: number): void {
  say("time-name", "Time");
  say("time", milliseconds < 1000 ? `${milliseconds.toFixed(0)} ms` : `${(milliseconds / 1000).toFixed(1)} s`);
}

function showThreshold(): void {
  say("threshold-value", threshold().toFixed(2));
  ui.threshold.setAttribute("aria-valuetext", `probability ${threshold().toFixed(2)}`);
}

let redraw = 0;
let remeasure = 0;

function thresholdChanged(): void {
  showThreshold();
  cancelAnimationFrame(redraw);
  redraw = requestAnimationFrame(() => {
    if (!shown) return;
    shown.mask = maskOf(shown.frame.logits, threshold());
    shown.summary = summarize(shown.mask, shown.frame.logits, shown.frame, facts.min_area);
    draw();
  });
  clearTimeout(remeasure);
  remeasure = window.setTimeout(() => void measureAgain(), 250);
}

function moveThreshold(by: number): void {
  ui.threshold.value = String(threshold() + by);
  thresholdChanged();
}

// The camera -----------------------------------------------------------------------------------------------

async function startCamera(device: string | null): Promise<void> {
  stopCamera();
  complain(null);
  try {
    camera = await Camera.open(device);
  } catch (error) {
    complain(error instanceof CameraError ? error.message : `The camera cannot be used: ${String(error)}.`);
    return;
  }
  const running = camera;
  running.onEnd(() => {
    if (camera !== running) return;
    stopCamera();
    complain("The camera was disconnected: connect it and start it again.");
  });
  items = [];
  chosen = -1;
  element("list").hidden = true;
  ui.camera.setAttribute("aria-pressed", "true");
  ui.camera.textContent = "Stop camera";
  ui.freeze.hidden = false;
  void offerDevices(running);
  say("live", "The camera is on.");
  await watch(running);
}

async function offerDevices(running: Camera): Promise<void> {
  const cameras = await Camera.list();
  if (camera !== running) return;
  element("device-label").hidden = cameras.length < 2;
  ui.device.replaceChildren(...cameras.map(({ id, name }) => new Option(name, id, false, id === running.device)));
}

async function watch(running: Camera): Promise<void> {
  let speed = 0;
  let last = performance.now();
  let spoken = last;
  while (camera === running) {
    if (!ready || frozen) {
      await new Promise((resolve) => setTimeout(resolve, 60));
      last = performance.now();
      continue;
    }
    try {
      const at = threshold();
      const { frame, summary } = await client.camera(await running.grab(), at);
      if (camera !== running || frozen) continue;
      const mask = maskOf(frame.logits, threshold());
      const current = at === threshold() ? summary : summarize(mask, frame.logits, frame, facts.min_area);
      show({ name: cameraName(), frame, mask, summary: current });
      const now = performance.now();
      speed = speed ? 0.8 * speed + 200 / (now - last) : 1000 / (now - last);
      last = now;
      say("time-name", "Speed");
      say("time", `${speed.toFixed(1)} frames/s`);
      if (now - spoken > 4000) {
        spoken = now; // a screen reader is not told every frame
        say("live", resultWords(current, threshold()));
      }
      document.documentElement.dataset.cameraFrames = String(Number(document.documentElement.dataset.cameraFrames ?? 0) + 1);
    } catch (error) {
      if (camera !== running) return;
      stopCamera();
      complain(error instanceof Refused ? error.message : `The camera's picture cannot be read: ${String(error)}.`);
    }
  }
}

function cameraName(): string {
  return `camera_${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}`;
}

function setFrozen(value: boolean): void {
  frozen = value;
  ui.freeze.setAttribute("aria-pressed", String(value));
  ui.freeze.textContent = value ? "Go on" : "Freeze";
  if (value) draw();
}

function stopCamera(): void {
  camera?.close();
  camera = null;
  setFrozen(false);
  ui.camera.setAttribute("aria-pressed", "false");
  ui.camera.textContent = "Camera";
  ui.freeze.hidden = true;
  element("device-label").hidden = true;
}

// Downloads ------------------------------------------------------------------------------------------------

function download(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function stem(name: string): string {
  return (name.split("/").pop() as string).replace(/\.[^.]*$/, "");
}

async function saveMask(): Promise<void> {
  if (shown) download(await encodeMask(shown.mask, shown.frame), `${stem(shown.name)}_mask.png`);
}

function saveOverlay(): void {
  if (!shown) return;
  const name = `${stem(shown.name)}_overlay.png`;
  const canvas = document.createElement("canvas");
  const words = `${facts.model.name}, probability above ${threshold().toFixed(2)}. ${qualityWords(facts)} ${DISCLAIMER}`;
  drawOverlay(canvas, shown.frame, shown.mask, [words]);
  canvas.toBlob((blob) => blob && download(blob, name), "image/png");
}

async function saveTable(): Promise<void> {
  await measureAgain();
  const head = ["name", "width", "height", "threshold", "polyp_pixels", "polyp_share", "lesions", "max_probability", "refused"];
  const rows = items.map(({ name, size, summary, message, threshold: at }) =>
    summary && size
      ? [name, size.width, size.height, at ?? "", summary.area, summary.fraction.toFixed(6), summary.regions.length, summary.maxProbability.toFixed(4), ""]
      : [name, "", "", "", "", "", "", "", message ?? ""],
  );
  download(new Blob([csv([head, ...rows])], { type: "text/csv" }), "polypseg_frames.csv");
}

// Mouse, keys, theme ---------------------------------------------------------------------------------------

function on(id: string, work: () => unknown): void {
  element(id).addEventListener("click", work);
}

on("open", () => ui.files.click());
on("folder", () => ui.folders.click());
on("camera", () => (camera ? stopCamera() : void startCamera(null)));
on("freeze", () => setFrozen(!frozen));
on("previous", () => choose(chosen - 1));
on("next", () => choose(chosen + 1));
on("save-mask", saveMask);
on("save-overlay", saveOverlay);
on("save-table", saveTable);
on("help", () => ui.keys.showModal());
on("reset", () => moveThreshold(facts.threshold - threshold()));
on("theme", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  remember(THEME, document.documentElement.dataset.theme as string);
});
ui.device.addEventListener("change", () => void startCamera(ui.device.value));
ui.threshold.addEventListener("input", thresholdChanged);
element("views").addEventListener("change", draw);
for (const input of [ui.files, ui.folders]) {
  input.addEventListener("change", () => {
    open(Array.from(input.files ?? []));
    input.value = "";
  });
}

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  ui.view.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) ui.view.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  ui.view.classList.remove("over");
  void droppedFiles(event.dataTransfer).then(open);
});
document.addEventListener("paste", (event) => open(Array.from(event.clipboardData?.files ?? [])));

/** The files of a drop, those inside of dropped folders too. */
async function droppedFiles(transfer: DataTransfer | null): Promise<File[]> {
  const entries = Array.from(transfer?.items ?? [], (item) => item.webkitGetAsEntry?.() ?? null);
  const plain = Array.from(transfer?.files ?? []);
  const nested = await Promise.all(entries.map((entry) => (entry?.isDirectory ? filesBelow(entry as FileSystemDirectoryEntry) : [])));
  return [...plain.filter((_, index) => !entries[index]?.isDirectory), ...nested.flat()];
}

async function filesBelow(folder: FileSystemDirectoryEntry): Promise<File[]> {
  const reader = folder.createReader();
  const found: FileSystemEntry[] = [];
  for (;;) {
    const part = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!part.length) break;
    found.push(...part);
  }
  const files = await Promise.all(
    found.map((entry) =>
      entry.isDirectory
        ? filesBelow(entry as FileSystemDirectoryEntry)
        : new Promise<File[]>((resolve, reject) => (entry as FileSystemFileEntry).file((file) => resolve([file]), reject)),
    ),
  );
  return files.flat();
}

const KEYS: Record<string, () => unknown> = {
  o: () => ui.files.click(),
  f: () => ui.folders.click(),
  c: () => ui.camera.click(),
  m: saveMask,
  d: saveOverlay,
  "1": () => setView("outline"),
  "2": () => setView("mask"),
  "3": () => setView("both"),
  ArrowLeft: () => choose(chosen - 1),
  ArrowRight: () => choose(chosen + 1),
  "-": () => moveThreshold(-0.05),
  "+": () => moveThreshold(0.05),
  "=": () => moveThreshold(0.05),
  "?": () => ui.keys.showModal(),
};

function setView(name: string): void {
  (document.querySelector(`input[name="view"][value="${name}"]`) as HTMLInputElement).checked = true;
  draw();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ui.keys.open) return;
  const target = event.target as HTMLElement;
  const ownArrows = target.matches("input, select");
  if (event.key.startsWith("Arrow") && ownArrows) return;
  if (event.key === " " && camera && !target.matches("button, input, select, summary")) {
    event.preventDefault();
    setFrozen(!frozen);
    return;
  }
  const work = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!work) return;
  event.preventDefault();
  work();
});

const THEME = "polypseg-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(name: string): void {
  document.documentElement.dataset.theme = name;
  element("theme").textContent = name === "dark" ? "Light" : "Dark";
}

function followSystem(): void {
  setTheme(recall(THEME) ?? (dark.matches ? "dark" : "light"));
}

followSystem();
dark.addEventListener("change", followSystem);
window.addEventListener("pagehide", () => camera?.close());

begin().catch((error: unknown) => {
  element("progress").hidden = true;
  say("engine", "The model is not loaded.");
  complain(`The page cannot start: ${error instanceof Error ? error.message : String(error)}. Reload it.`);
});
