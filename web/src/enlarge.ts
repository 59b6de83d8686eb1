/** Sampling: from a picture to the enlarged picture, as in `binarize.models.SuperResolutionPipeline`. */

import { advance, type Enlarging, type Input, type Predict } from "./model";
import { gaussian } from "./noise";
import { cut, limitOvershoot, mapPlaces, pad, planes, upscaleBicubic, type Planes } from "./planes";
import { end, tileGrid } from "./tiles";

const inputs = (x: Planes, timestep: number, condition: Planes): Input[] => [
  [x.data, [1, 3, x.height, x.width]], [Float32Array.of(timestep), [1]], [condition.data, [1, 3, x.height, x.width]],
];

/** Enlarge an RGB image with values from 0 to 1. `breathe(done, total)` is awaited after each tile of each step. */
export async function enlarge(
  low: Planes, settings: Enlarging, predict: Predict, breathe: (done: number, total: number) => Promise<void>,
): Promise<Planes> {
  const bicubic = upscaleBicubic(low, settings.scale);
  const { height, width } = bicubic;
  const { rows, columns } = tileGrid(height, width, settings.size_multiple);
  const condition = pad(bicubic, end(rows), end(columns));
  const { steps } = settings.sampler;
  const total = steps.length * rows.length * columns.length;
  const single = rows.length * columns.length === 1;
  const x = paddedNoise(height, width, condition.height, condition.width);
  let done = 0;
  for (const [at, { timestep }] of steps.entries()) {
    let output = planes(3, x.height, x.width);
    for (const row of rows)
      for (const column of columns) {
        const place = [row.start, column.start, row.weights.length, column.weights.length] as const;
        const seen = cut(x, ...place);
        const piece = { ...seen, data: await predict(...inputs(seen, timestep, cut(condition, ...place))) };
        if (single) output = piece;
        else add(output, piece, row.start, column.start, row.weights, column.weights);
        await breathe(++done, total);
      }
    advance(x.data, output.data, settings.sampler, at);
  }
  const { residual_scale: scale, residual_strength: strength } = settings;
  for (let i = 0; i < x.data.length; i++) {
    const value = scale === null ? x.data[i]! : condition.data[i]! + scale * strength * x.data[i]!;
    x.data[i] = Math.min(1, Math.max(0, value));
  }
  const large = cut(x, 0, 0, height, width);
  if (settings.overshoot != null) limitOvershoot(large, low, settings.overshoot);
  return large;
}

function add(
  out: Planes, piece: Planes, top: number, left: number, rows: Float64Array, columns: Float64Array,
): void {
  let at = 0;
  for (let c = 0; c < piece.channels; c++)
    for (let y = 0; y < piece.height; y++) {
      const line = (c * out.height + top + y) * out.width + left;
      for (let i = 0; i < piece.width; i++) out.data[line + i]! += piece.data[at++]! * rows[y]! * columns[i]!;
    }
}

/** Noise of seed 0, with padding that is the same for every picture: first at the right, then at the bottom. */
function paddedNoise(height: number, width: number, fullHeight: number, fullWidth: number): Planes {
  const inner = gaussian(0)(3 * height * width);
  const extra = gaussian(0);
  const across = fullWidth - width;
  const down = fullHeight - height;
  const right = across ? extra(3 * height * across) : inner;
  const bottom = down ? extra(3 * down * fullWidth) : inner;
  return mapPlaces(3, fullHeight, fullWidth, (c, y, x) => {
    if (y >= height) return bottom[(c * down + y - height) * fullWidth + x]!;
    return x < width ? inner[(c * height + y) * width + x]! : right[(c * height + y) * across + x - width]!;
  });
}

/** Return inputs for which a GPU's prediction is compared with the CPU's. */
export function enlargingProbe({ size_multiple, sampler }: Enlarging): Input[] {
  const side = size_multiple * Math.ceil(16 / size_multiple);
  const noise = { ...planes(3, side, side), data: gaussian(0)(3 * side * side) };
  const image = mapPlaces(3, side, side, (c, y, x) => ((x * (c + 1) + y * y) % 11) / 10);
  return inputs(noise, sampler.steps[0]!.timestep, image);
}
