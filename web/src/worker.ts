/** The worker: loads the models once, then does one job after the other, without any further request. */

import { draw } from "./draw";
import { enlarge } from "./enlarge";
import type { FromWorker, ToWorker } from "./messages";
import { decode, encode } from "./pictures";
import { startRuntime, type Network, type Runtime } from "./runtime";

class Cancelled extends Error {}

let runtime: Runtime;
let files: Uint8Array[];
let networks = new Map<number, Promise<Network>>();
let work = Promise.resolve();
const cancelled = new Set<number>();

const tell = (message: FromWorker) => (self as unknown as Worker).postMessage(message);
const sentence = (error: unknown) => {
  const text = error instanceof Error ? error.message : String(error);
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
};

self.onmessage = ({ data }: MessageEvent<ToWorker>) => {
  if (data.type === "cancel") cancelled.add(data.job);
  else if (data.type === "load") work = work.then(() => start(data));
  else work = work.then(() => run(data));
};

async function start({ models, base, backend }: Extract<ToWorker, { type: "load" }>): Promise<void> {
  try {
    files = await Promise.all(models.map(async ({ file }) => {
      const response = await fetch(new URL(file, base));
      if (!response.ok) throw new Error(`the file ${file} could not be loaded (${response.status})`);
      return new Uint8Array(await response.arrayBuffer());
    }));
    await begin(backend);
  } catch (error) {
    tell({ type: "unusable", message: sentence(error) });
  }
}

async function begin(backend: string | null): Promise<void> {
  runtime = await startRuntime(backend);
  networks = new Map();
  const { settings } = await withoutGpu(() => load(0));
  tell({ type: "ready", backend: runtime.name, settings });
}

function load(model: number): Promise<Network> {
  if (!networks.has(model)) networks.set(model, runtime.load(files[model]!));
  return networks.get(model)!;
}

/** Do something, and if a GPU fails at it, do it again with WebAssembly, now and from now on. */
async function withoutGpu<T>(action: () => Promise<T>): Promise<T> {
  try {
    return await action();
  } catch (error) {
    if (!runtime.gpu || error instanceof Cancelled) throw error;
    console.warn("WebAssembly replaces WebGPU:", error);
    await begin("wasm");
    return action();
  }
}

async function run({ job, model, request }: Extract<ToWorker, { type: "run" }>): Promise<void> {
  try {
    const breathe = async (done: number, total: number) => {
      tell({ type: "progress", job, done, total });
      await new Promise((resolve) => setTimeout(resolve)); // so that a message to cancel is received
      if (cancelled.delete(job)) throw new Cancelled();
    };
    const { settings } = await withoutGpu(() => load(model));
    const low = "picture" in request && "scale" in settings ? await decode(request.picture, settings.scale) : null;
    await breathe(0, 1);
    const started = performance.now();
    const image = await withoutGpu(async () => {
      const { settings, predict } = await load(model);
      if (low && "scale" in settings) return enlarge(low.rgb, settings, predict, breathe);
      if ("count" in request && "classes" in settings) return draw(request, settings, predict, breathe);
      throw new Error("this model is for another page");
    });
    const seconds = (performance.now() - started) / 1000;
    const picture = await encode(image, low && low.alpha);
    tell({ type: "done", job, result: { picture, width: image.width, height: image.height, seconds } });
  } catch (error) {
    tell(error instanceof Cancelled ? { type: "cancelled", job } : { type: "failed", job, message: sentence(error) });
  }
}
