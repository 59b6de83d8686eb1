/** What a file of `binarize export` says about sampling, in its metadata entry "binarize.sampling". */

export interface Step {
  timestep: number;
  clean: [number, number];
  next: [number, number, number];
}

export interface Sampling {
  scale: number;
  size_multiple: number;
  residual_scale: number | null;
  residual_strength: number;
  overshoot?: number;
  sampler: { clip_range: number | null; steps: Step[] };
}

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
  let at = 0;
  const varint = (): number => {
    let value = 0;
    for (let place = 1; ; place *= 128) {
      if (at >= message.length) throw new Error("the model's file is cut off");
      const byte = message[at++]!;
      value += (byte & 127) * place;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const tag = varint();
    const wire = tag % 8;
    if (wire === 0) varint();
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else if (wire === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), message.subarray(at, at + length)];
      at += length;
    } else throw new Error("the model is no ONNX file");
  }
}
