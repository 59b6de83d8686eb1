/** What the tasks share: the worker, and what the page says of its work. */

import type { Done, FromWorker, ModelFile, Job, ToWorker } from "./messages";
import type { Sampling } from "./model";

export const byId = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const status = byId("status");
const error = byId("error");
const download = byId<HTMLAnchorElement>("download");
const progress = byId<HTMLProgressElement>("progress");

const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
const tell = (message: ToWorker) => worker.postMessage(message);
let loaded = false;
let job = 0;
let running = false;

function say(message: string, problem = ""): void {
  status.textContent = message;
  error.textContent = problem;
}

function setRunning(now: boolean): void {
  running = now;
  byId("work").hidden = !now;
  progress.value = 0;
}

const cancel = () => running && tell({ type: "cancel", job });

/** Run a model, by its place in the list; a job that runs is cancelled. */
export function run(request: Job, model: number, message: string): void {
  if (!loaded) return;
  cancel();
  setRunning(true);
  byId("result").hidden = true;
  say(message);
  tell({ type: "run", job: ++job, model, request });
}

/** Show a picture in an image, in place of the one that it showed, and return its address. */
export function show(picture: Blob, image: HTMLImageElement): string {
  URL.revokeObjectURL(image.src);
  return (image.src = URL.createObjectURL(picture));
}

export interface Task {
  name: string; // of its form, and of the file that lists its models
  listed?: (models: ModelFile[]) => void;
  ready?: (settings: Sampling) => void; // of the first model
  finished: (result: Done) => { figures: string; file: string; address: string }; // the result and its download
}

/** Show the form of a task and load its models. */
export function start({ name, listed, ready, finished }: Task): void {
  const form = byId<HTMLFormElement>(name);
  form.hidden = false;
  document.title = form.querySelector("h1")!.textContent!;
  worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
    if (data.type === "ready") {
      byId("backend").textContent = `Computed with ${data.backend}.`;
      ready?.(data.settings);
      document.documentElement.dataset.ready = "";
      if (!running) say("Ready.");
    } else if (data.type === "unusable") {
      for (const control of form.elements) control.toggleAttribute("disabled", true);
      [loaded, job] = [false, job + 1];
      setRunning(false);
      say("", `The network could not be loaded. ${data.message}`);
    } else if (data.job !== job) return; // of a job that another one has replaced
    else if (data.type === "progress") progress.value = data.done / data.total;
    else {
      setRunning(false);
      if (data.type === "failed") return say("", data.message);
      if (data.type === "cancelled") return say("Cancelled.");
      const { figures, file, address } = finished(data.result);
      [byId("figures").textContent, download.download, download.href] = [figures, file, address];
      byId("result").hidden = false;
      say("Done.");
    }
  };
  worker.onerror = ({ message = "its code could not be loaded" }) => {
    [loaded, job] = [false, job + 1];
    setRunning(false);
    say("", `The network stopped: ${message}. Reload the page, and try something smaller.`);
  };
  byId("cancel").addEventListener("click", cancel);
  load(`${name}.json`, listed).catch((reason: Error) => say("", `The page could not be loaded: ${reason.message}.`));
}

async function load(file: string, listed: Task["listed"]): Promise<void> {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file} (${response.status})`);
  const models: ModelFile[] = await response.json();
  tell({ type: "load", models, base: document.baseURI, backend: new URLSearchParams(location.search).get("backend") });
  loaded = true;
  listed?.(models);
}
