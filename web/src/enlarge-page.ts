import "img-comparison-slider";
import "img-comparison-slider/dist/styles.css";

import type { FromWorker, ModelFile, ToWorker } from "./messages";
import "./style.css";

const byId = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const file = byId<HTMLInputElement>("file");
const status = byId("status");
const error = byId("error");
const work = byId("work");
const progress = byId<HTMLProgressElement>("progress");
const result = byId("result");
const slider = byId<HTMLElement & { value: number }>("slider");
const before = byId<HTMLImageElement>("before");
const after = byId<HTMLImageElement>("after");
const download = byId<HTMLAnchorElement>("download");

const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
const tell = (message: ToWorker) => worker.postMessage(message);
let picture: File | null = null;
let job = 0;
let running = false;

function say(message: string, problem = ""): void {
  status.textContent = message;
  error.textContent = problem;
}

function setRunning(now: boolean): void {
  running = now;
  work.hidden = !now;
  progress.value = 0;
}

function cancel(): void {
  if (running) tell({ type: "cancel", job });
}

function enlarge(): void {
  if (picture === null) return;
  cancel();
  const chosen = document.querySelector<HTMLInputElement>("input[name=model]:checked")!;
  setRunning(true);
  result.hidden = true;
  say(`Enlarging ${picture.name}…`);
  tell({ type: "enlarge", job: ++job, model: Number(chosen.value), picture });
}

function choose(files: FileList | undefined): void {
  const [chosen] = files ?? [];
  if (chosen === undefined) return;
  picture = chosen;
  enlarge();
}

function describeDivider(): void {
  const share = Math.round(slider.value);
  slider.setAttribute("aria-valuenow", String(share));
  slider.setAttribute("aria-valuetext", `${share}% original`);
}

function show(url: string, image: HTMLImageElement): void {
  URL.revokeObjectURL(image.src);
  image.src = url;
}

function finished({ picture: large, width, height, seconds }: Extract<FromWorker, { type: "done" }>): void {
  const megapixels = (width * height) / 1e6;
  for (const image of [before, after]) [image.width, image.height] = [width, height];
  byId("comparison").style.maxInlineSize = `max(20rem, ${width}px)`;
  slider.value = 50;
  describeDivider();
  show(URL.createObjectURL(picture!), before);
  show(URL.createObjectURL(large), after);
  download.href = after.src;
  download.download = `${picture!.name.replace(/\.[^.]*$/, "")}_${width}x${height}.png`;
  const rate = (megapixels / seconds).toPrecision(2);
  byId("figures").textContent = `${width}×${height} pixels in ${seconds.toFixed(1)} s, ${rate} megapixels a second.`;
  result.hidden = false;
  say(`Enlarged to ${width}×${height} pixels.`);
}

worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
  if (data.type === "ready") {
    byId("backend").textContent = `Computed with ${data.backend}.`;
    document.documentElement.dataset.ready = "";
    if (!running) say("Ready.");
    return;
  }
  if (data.type === "unusable") {
    file.disabled = true;
    setRunning(false);
    say("", `The network could not be loaded: ${data.message}.`);
    return;
  }
  if (data.job !== job) return; // of a picture that another one has replaced
  if (data.type === "progress") {
    progress.value = data.done / data.total;
    return;
  }
  setRunning(false);
  if (data.type === "done") finished(data);
  else if (data.type === "failed") say("", data.message);
  else say("Cancelled.");
};
worker.onerror = (event) => {
  setRunning(false);
  say("", `The network stopped: ${event.message}. Reload the page, and try a smaller picture.`);
};

byId("cancel").addEventListener("click", cancel);
file.addEventListener("change", () => {
  choose(file.files ?? undefined);
  file.value = ""; // so that the same picture can be chosen again
});
slider.addEventListener("slide", describeDivider);
document.addEventListener("paste", (event) => choose(event.clipboardData?.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  choose(event.dataTransfer?.files);
});

async function start(): Promise<void> {
  const response = await fetch("models.json");
  if (!response.ok) throw new Error(`models.json (${response.status})`);
  const models: ModelFile[] = await response.json();
  models.forEach(({ name }, index) => {
    const radio = Object.assign(document.createElement("input"), {
      type: "radio", name: "model", value: String(index), checked: index === 0,
    });
    radio.addEventListener("change", enlarge);
    const label = document.createElement("label");
    label.append(radio, ` ${name}`);
    byId("models").append(label);
  });
  tell({ type: "load", models, base: document.baseURI, backend: new URLSearchParams(location.search).get("backend") });
}

start().catch((reason: Error) => say("", `The page could not be loaded: ${reason.message}.`));
