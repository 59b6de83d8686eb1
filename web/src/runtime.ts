/** onnxruntime-web on WebGPU where the device has it, else on WebAssembly, with threads where they are allowed. */

import type { InferenceSession } from "onnxruntime-web";
import gpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuCode from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import cpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import cpuCode from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

import { drawingProbe } from "./draw";
import { enlargingProbe } from "./enlarge";
import { readSampling, type Predict, type Sampling } from "./model";

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
    const predict: Predict = async (...inputs) => {
      const tensors = inputs.map(([values, shape]) => values instanceof Float32Array
        ? new ort.Tensor("float32", values, shape) : new ort.Tensor("int64", values, shape));
      const feeds = Object.fromEntries(session.inputNames.map((name, i) => [name, tensors[i]!]));
      const output = (await session.run(feeds))[session.outputNames[0]!]!;
      const values = (await output.getData()) as Float32Array<ArrayBuffer>;
      if (!values.every(Number.isFinite)) throw new Error("the network's prediction is not finite");
      return values;
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
async function compare(predict: Predict, expected: Predict, settings: Sampling): Promise<void> {
  const inputs = "scale" in settings ? enlargingProbe(settings) : drawingProbe(settings);
  const [found, right] = [await predict(...inputs), await expected(...inputs)];
  const size = (values: Float32Array) => values.reduce((sum, value) => sum + Math.abs(value), 0);
  const apart = size(found.map((value, i) => value - right[i]!)) / size(right);
  if (!(apart < MOST_APART)) throw new Error(`WebGPU's prediction differs by ${apart}; the limit is ${MOST_APART}`);
}

function paths(glue: string, code: string): { mjs: string; wasm: string } {
  return { mjs: new URL(glue, import.meta.url).href, wasm: new URL(code, import.meta.url).href };
}
