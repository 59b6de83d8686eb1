/** The worker: loads the models once, then enlarges one picture after the other, without any further request. */

import type { FromWorker, ToWorker } from "./messages";
import { decode, encode } from "./pictures";
import { startRuntime, type Network, type Runtime } from "./runtime";
import { enlarge } from "./sample";

class Cancelled extends Error {}

let runtime: Runtime;
let files: Uint8Array[];
let networks = new Map<number, Promise<Network>>();
let work = Promise.resolve();
const cancelled = new Set<number>();

const tell = (message: FromWorker) => (self as unknown as Worker).postMessage(message);
const sentence = (error: unknown) => (error instanceof Error ? error.message : String(error));

self.onmessage = ({ data }: MessageEvent<ToWorker>) => {
  if (data.type === "cancel") cancelled.add(data.job);
  else if (data.type === "load") work = work.then(() => start(data));
  else work = work.then(() => run(data));
};

async function start({ models, base, backend }: Extract<ToWorker, { type: "load" }>): Promise<void> {
  try {
    files = await Promise.all(models.map(async ({ file }) => {
      const response = await fetch(new URL(file, base));
      if (!response.ok) throw new Error(`${file} could not be loaded (${response.status})`);
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
  await withoutGpu(() => load(0));
  tell({ type: "ready", backend: runtime.name });
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
    console.warn(`WebAssembly replaces WebGPU: ${sentence(error)}`);
    await begin("wasm");
    return action();
  }
}

async function run({ job, model, picture }: Extract<ToWorker, { type: "enlarge" }>): Promise<void> {
  try {
    const breathe = async (done: number, total: number) => {
      tell({ type: "progress", job, done, total });
      await new Promise((resolve) => setTimeout(resolve)); // so that a message to cancel is received
      if (cancelled.delete(job)) throw new Cancelled();
    };
    const { settings } = await withoutGpu(() => load(model));
    const { rgb, alpha } = await decode(picture, settings.scale);
    await breathe(0, 1);
    const started = performance.now();
    const large = await withoutGpu(async () => enlarge(rgb, settings, (await load(model)).predict, breathe));
    const seconds = (performance.now() - started) / 1000;
    const { width, height } = large;
    tell({ type: "done", job, picture: await encode(large, alpha), width, height, seconds });
  } catch (error) {
    tell(error instanceof Cancelled ? { type: "cancelled", job } : { type: "failed", job, message: sentence(error) });
  }
}
