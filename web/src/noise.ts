/** The noise of PyTorch's `torch.randn` on a CPU, so that the same seed gives the picture that Python gives. */

import { mersenne } from "pure-rand/generator/mersenne";

/** Return a function that gives arrays of unit Gaussian noise; it continues where its last call ended. */
export function gaussian(seed: number): (count: number) => Float32Array<ArrayBuffer> {
  const source = mersenne(seed);
  const uniform = () => (source.next() & 0xffffff) / 0x1000000; // a float32 is drawn with 24 bits
  return (count) => {
    // Box and Muller's transform of blocks of 16; the last block of an odd size is drawn anew. PyTorch has another
    // rule for less than 16 values.
    const out = new Float32Array(Math.max(count, 16)).map(uniform);
    for (let first = 0; first + 16 <= out.length; first += 16) transform(out, first);
    if (out.length % 16) {
      const last = out.length - 16;
      for (let i = last; i < out.length; i++) out[i] = uniform();
      transform(out, last);
    }
    return out.slice(0, count);
  };
}

function transform(values: Float32Array, first: number): void {
  for (let i = first; i < first + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[i]!));
    const angle = 2 * Math.PI * values[i + 8]!;
    values[i] = radius * Math.cos(angle);
    values[i + 8] = radius * Math.sin(angle);
  }
}
