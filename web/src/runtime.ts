/** onnxruntime-web on WebGPU where the device has one, otherwise on WebAssembly, with threads where they are allowed. */

import type { InferenceSession } from "onnxruntime-web";
import gpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuCode from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import cpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import cpuCode from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

import { readSampling, type Sampling } from "./model";
import { gaussian } from "./noise";
import { mapPlaces, planes, type Planes } from "./planes";
import type { Predict } from "./sample";

const MAX_THREADS = 8;
const MOST_APART = 0.05; // mean difference by mean magnitude: 2e-6 if all is right, and more for each sign that flips

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
  const open = async (file: Uint8Array, provider: "webgpu" | "wasm"): Promise<[Predict, InferenceSession]> => {
    const options: InferenceSession.SessionOptions = { executionProviders: [provider], graphOptimizationLevel: "all" };
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
    return [predict, session];
  };
  const load = async (file: Uint8Array): Promise<Network> => {
    const settings = readSampling(file);
    const [predict, session] = await open(file, gpu ? "webgpu" : "wasm");
    if (gpu) {
      const [expected, other] = await open(file, "wasm");
      try {
        await compare(predict, expected, settings);
      } catch (error) {
        await session.release();
        throw error;
      } finally {
        await other.release();
      }
    }
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

/** Throw an error unless the GPU predicts what the CPU predicts, but for signs that rounding decides. */
async function compare(predict: Predict, expected: Predict, { size_multiple, sampler }: Sampling): Promise<void> {
  const side = size_multiple * Math.ceil(16 / size_multiple);
  const noise = { ...planes(3, side, side), data: gaussian(0)(3 * side * side) };
  const image = mapPlaces(3, side, side, (c, y, x) => ((x * (c + 1) + y * y) % 11) / 10);
  const at = sampler.steps[0]!.timestep;
  const [found, right] = [(await predict(noise, at, image)).data, (await expected(noise, at, image)).data];
  const size = (values: Float32Array) => values.reduce((sum, value) => sum + Math.abs(value), 0);
  const apart = size(found.map((value, i) => value - right[i]!)) / size(right);
  if (!(apart < MOST_APART)) throw new Error(`WebGPU's prediction differs by ${apart}; the limit is ${MOST_APART}`);
}

function paths(glue: string, code: string): { mjs: string; wasm: string } {
  return { mjs: new URL(glue, import.meta.url).href, wasm: new URL(code, import.meta.url).href };
}
