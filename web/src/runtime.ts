/** onnxruntime-web on WebGPU where the device has one, otherwise on WebAssembly, with threads where they are allowed. */

import type { InferenceSession } from "onnxruntime-web";
import gpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuCode from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import cpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import cpuCode from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

import { readSampling, type Sampling } from "./model";
import type { Planes } from "./planes";
import type { Predict } from "./sample";

const MAX_THREADS = 8;

export interface Network {
  settings: Sampling;
  predict: Predict;
}

export interface Runtime {
  name: string; // for people
  gpu: boolean;
  load: (file: Uint8Array) => Promise<Network>;
}

/** Start a runtime: "webgpu" or "wasm", or null for the best one. */
export async function startRuntime(backend: string | null): Promise<Runtime> {
  const gpu = backend === "wasm" ? false : await hasGpu(backend === "webgpu");
  const ort = gpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = gpu ? paths(gpuGlue, gpuCode) : paths(cpuGlue, cpuCode);
  const options: InferenceSession.SessionOptions = {
    executionProviders: [gpu ? "webgpu" : "wasm"],
    graphOptimizationLevel: "all",
  };
  const load = async (file: Uint8Array): Promise<Network> => {
    const settings = readSampling(file);
    const session = await ort.InferenceSession.create(file, options);
    const [sample, timestep, condition] = session.inputNames as [string, string, string];
    const tensor = ({ data, height, width }: Planes) => new ort.Tensor("float32", data, [1, 3, height, width]);
    const predict: Predict = async (x, at, image) => {
      const feeds = {
        [sample]: tensor(x),
        [timestep]: new ort.Tensor("float32", [at], [1]),
        [condition]: tensor(image),
      };
      const output = (await session.run(feeds))[session.outputNames[0]!]!;
      return { ...x, data: (await output.getData()) as Float32Array<ArrayBuffer> };
    };
    return { settings, predict };
  };
  const cores = threads === 1 ? "1 thread" : `${threads} threads`;
  return { gpu, name: gpu ? "WebGPU" : `WebAssembly, ${cores}`, load };
}

/** A software adapter is slower than WebAssembly, and is used only if the address asks for WebGPU. */
async function hasGpu(software: boolean): Promise<boolean> {
  const adapter = await navigator.gpu?.requestAdapter();
  return !!adapter && (software || !adapter.info.isFallbackAdapter);
}

function paths(glue: string, code: string): { mjs: string; wasm: string } {
  return { mjs: new URL(glue, import.meta.url).href, wasm: new URL(code, import.meta.url).href };
}
