/** What a file of `binarize export` says about sampling, in its metadata entry "binarize.sampling". */

import { BinaryReader, WireType } from "@bufbuild/protobuf/wire";

interface Sampler {
  clip_range: number | null;
  steps: { timestep: number; clean: [number, number]; next: [number, number, number] }[];
}

export interface Enlarging {
  scale: number;
  size_multiple: number;
  residual_scale: number | null;
  residual_strength: number;
  overshoot?: number;
  sampler: Sampler;
}

export interface Drawing {
  image_shape: [number, number, number];
  classes: string[] | null;
  guidance_scale: number;
  sampler: Sampler;
}

export type Sampling = Enlarging | Drawing;

/** An input of a network: its values and its shape. */
export type Input = [values: Float32Array<ArrayBuffer> | BigInt64Array<ArrayBuffer>, shape: number[]];
/** Run a network on its inputs, in the order of the file, and return the values of its output. */
export type Predict = (...inputs: Input[]) => Promise<Float32Array<ArrayBuffer>>;

const METADATA = 14; // the field metadata_props of ONNX's ModelProto, of entries with a key (1) and a value (2)

/** Return the settings in an ONNX file. onnxruntime-web does not give programs a model's metadata. */
export function readSampling(file: Uint8Array): Sampling {
  const text = new TextDecoder();
  for (const [field, entry] of fields(file)) {
    if (field !== METADATA) continue;
    const parts = new Map(fields(entry));
    if (text.decode(parts.get(1)) === "binarize.sampling") {
      const sampling = JSON.parse(text.decode(parts.get(2)));
      if (!sampling.sampler) throw new Error("the model's sampler is not DDIM");
      return sampling;
    }
  }
  throw new Error("the model was not written by `binarize export`");
}

/** Yield number and bytes of each field of a protobuf message that has a length: strings, bytes, messages. */
function* fields(message: Uint8Array): Generator<[number, Uint8Array]> {
  const reader = new BinaryReader(message);
  while (reader.pos < reader.len) {
    const [field, type] = reader.tag();
    if (type === WireType.LengthDelimited) yield [field, reader.bytes()];
    else reader.skip(type, field);
  }
}

/** Change x_t in place to the x of the next step. */
export function advance(x: Float32Array, output: Float32Array, sampler: Sampler, at: number): void {
  const [limit, { clean, next }] = [sampler.clip_range, sampler.steps[at]!];
  for (let i = 0; i < x.length; i++) {
    const [now, y] = [x[i]!, output[i]!];
    let x0 = clean[0] * now + clean[1] * y;
    if (limit !== null) x0 = Math.min(limit, Math.max(-limit, x0));
    x[i] = next[0] * now + next[1] * y + next[2] * x0;
  }
}
