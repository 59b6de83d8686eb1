/** Sampling: from a picture to the enlarged picture, as in `binarize.models.SuperResolutionPipeline`. */

import type { Sampling } from "./model";
import { gaussian } from "./noise";
import { cut, limitOvershoot, mapPlaces, pad, planes, upscaleBicubic, type Planes } from "./planes";
import { end, tileGrid } from "./tiles";

/** The network on one tile: predict from x_t, a timestep and the condition. */
export type Predict = (sample: Planes, timestep: number, condition: Planes) => Promise<Planes>;

/** Enlarge an RGB image with values from 0 to 1. `advance(done, total)` is awaited after each tile of each step. */
export async function enlarge(
  low: Planes, settings: Sampling, predict: Predict, advance: (done: number, total: number) => Promise<void>,
): Promise<Planes> {
  const bicubic = upscaleBicubic(low, settings.scale);
  const { height, width } = bicubic;
  const { rows, columns } = tileGrid(height, width, settings.size_multiple);
  const condition = pad(bicubic, end(rows), end(columns));
  const { clip_range: limit, steps } = settings.sampler;
  const total = steps.length * rows.length * columns.length;
  const single = rows.length * columns.length === 1;
  let x = paddedNoise(height, width, condition.height, condition.width);
  let done = 0;
  for (const { timestep, clean, next } of steps) {
    let output = planes(3, x.height, x.width);
    for (const row of rows)
      for (const column of columns) {
        const place = [row.start, column.start, row.weights.length, column.weights.length] as const;
        const piece = await predict(cut(x, ...place), timestep, cut(condition, ...place));
        if (!piece.data.every(Number.isFinite)) throw new Error("the network's prediction is not finite");
        if (single) output = piece;
        else add(output, piece, row.start, column.start, row.weights, column.weights);
        await advance(++done, total);
      }
    for (let i = 0; i < x.data.length; i++) {
      const [now, y] = [x.data[i]!, output.data[i]!];
      let x0 = clean[0] * now + clean[1] * y;
      if (limit !== null) x0 = Math.min(limit, Math.max(-limit, x0));
      x.data[i] = next[0] * now + next[1] * y + next[2] * x0;
    }
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
