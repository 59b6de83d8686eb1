/** Generation: from noise to images, as in `binarize.models.GenerationPipeline`. */

import { advance, type Drawing, type Input, type Predict } from "./model";
import { gaussian } from "./noise";
import { planes, type Planes } from "./planes";

const BATCH = 16; // images that a network sees at once
const GAP = 2; // pixels between the images of a grid
const same = (count: number, value: number): Input => [new Float32Array(count).fill(value), [count]];

/** Draw images, the i-th from the noise of seed + i, and return their grid, whose values are from 0 to 1. */
export async function draw(
  { count, label, seed }: { count: number; label: number | null; seed: number },
  settings: Drawing, predict: Predict, breathe: (done: number, total: number) => Promise<void>,
): Promise<Planes> {
  const { image_shape: shape, classes, guidance_scale: scale, sampler } = settings;
  const [size, kinds] = [shape.reduce((a, b) => a * b), classes?.length ?? 0];
  const images = new Float32Array(count * size);
  for (let i = 0; i < count; i++) images.set(gaussian(seed + i)(size), i * size);
  let done = 0;
  for (let first = 0; first < count; first += BATCH) {
    const number = Math.min(BATCH, count - first);
    const x = images.slice(first * size, (first + number) * size);
    const labels = (of: (i: number) => number): Input[] =>
      kinds ? [[BigInt64Array.from({ length: number }, (_, i) => BigInt(of(first + i))), [number]]] : [];
    const [wanted, none] = [labels((i) => label ?? i % kinds), labels(() => kinds)];
    for (const [at, { timestep }] of sampler.steps.entries()) {
      const ask = (of: Input[]) => predict([x, [number, ...shape]], same(number, timestep), ...of);
      let output = await ask(wanted);
      if (scale !== 1) {
        const without = await ask(none);
        output = output.map((value, i) => without[i]! + scale * (value - without[i]!));
      }
      advance(x, output, sampler, at);
      await breathe(++done, sampler.steps.length * Math.ceil(count / BATCH));
    }
    images.set(x, first * size);
  }
  return grid(images, count, shape);
}

/** Arrange images from -1 to 1 in rows, as `binarize.models.grid` does. Grey images become RGB. */
function grid(images: Float32Array, count: number, [channels, height, width]: [number, number, number]): Planes {
  const columns = Math.ceil(Math.sqrt(count));
  const out = planes(3, Math.ceil(count / columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP);
  out.data.fill(1);
  for (let i = 0; i < count; i++)
    for (let c = 0; c < 3; c++)
      for (let y = 0; y < height; y++) {
        const from = ((i * channels + (c % channels)) * height + y) * width;
        const row = c * out.height + Math.floor(i / columns) * (height + GAP) + y;
        const line = images.subarray(from, from + width).map((value) => Math.min(1, Math.max(0, value / 2 + 0.5)));
        out.data.set(line, row * out.width + (i % columns) * (width + GAP));
      }
  return out;
}

/** Return inputs for which a GPU's prediction is compared with the CPU's. */
export function drawingProbe({ image_shape: shape, classes, sampler }: Drawing): Input[] {
  const noise: Input = [gaussian(0)(2 * shape.reduce((a, b) => a * b)), [2, ...shape]];
  const labels: Input[] = classes ? [[BigInt64Array.of(0n, BigInt(classes.length - 1)), [2]]] : [];
  return [noise, same(2, sampler.steps[0]!.timestep), ...labels];
}
