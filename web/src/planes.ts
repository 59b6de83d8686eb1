/** Images as planes of floats, and MATLAB's bicubic upscaling of them, as in `binarize.imaging`. */

export interface Planes {
  channels: number;
  height: number;
  width: number;
  data: Float32Array<ArrayBuffer>; // channel by channel, row by row
}

export function planes(channels: number, height: number, width: number): Planes {
  return { channels, height, width, data: new Float32Array(channels * height * width) };
}

/** Fill new planes from the value of each place. */
export function mapPlaces(
  channels: number, height: number, width: number, value: (c: number, y: number, x: number) => number,
): Planes {
  const out = planes(channels, height, width);
  let at = 0;
  for (let c = 0; c < channels; c++)
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) out.data[at++] = value(c, y, x);
  return out;
}

/** Return the rectangle of a height and a width whose first pixel is at (top, left). */
export function cut(image: Planes, top: number, left: number, height: number, width: number): Planes {
  const out = planes(image.channels, height, width);
  for (let c = 0; c < image.channels; c++)
    for (let y = 0; y < height; y++) {
      const from = (c * image.height + top + y) * image.width + left;
      out.data.set(image.data.subarray(from, from + width), (c * height + y) * width);
    }
  return out;
}

/** Extend an image at the bottom and the right by reflection, or by the edge if a side is too short. */
export function pad(image: Planes, height: number, width: number): Planes {
  const source = (size: number, target: number) => {
    const reflect = target - size < size;
    return (i: number) => (i < size ? i : reflect ? 2 * (size - 1) - i : size - 1);
  };
  const row = source(image.height, height);
  const column = source(image.width, width);
  return mapPlaces(image.channels, height, width, (c, y, x) =>
    image.data[(c * image.height + row(y)) * image.width + column(x)]!);
}

/**
 * Upscale by Keys' cubic convolution with a = -1/2 and mirrored borders, clamped to [0, 1].
 *
 * Each sum is rounded as in Python: binary layers take the sign of what follows from it, and a last digit decides ties.
 */
export function upscaleBicubic(image: Planes, scale: number): Planes {
  const { channels, height, width } = image;
  const tall = planes(channels, height * scale, width);
  for (let c = 0; c < channels; c++)
    for (let x = 0; x < width; x++) grow(image.data, tall.data, scale, height, width, c * height * width + x);
  const out = planes(channels, height * scale, width * scale);
  for (let line = 0; line < channels * height * scale; line++)
    grow(tall.data, out.data, scale, width, 1, line * width);
  for (let i = 0; i < out.data.length; i++) out.data[i] = Math.min(1, Math.max(0, out.data[i]!));
  return out;
}

/** Upscale one line of `size` values that are `stride` apart and start at `first`. */
function grow(
  from: Float32Array, to: Float32Array, scale: number, size: number, stride: number, first: number,
): void {
  // In the result a line has `scale` times the values, and so has all that lies before it.
  const start = (first - (first % stride)) * scale + (first % stride);
  for (let phase = 0; phase < scale; phase++) {
    const taps = cubicTaps((phase + 0.5) / scale - 0.5);
    for (let i = 0; i < size; i++) {
      let sum = 0;
      for (const [offset, weight] of taps)
        sum = Math.fround(sum + Math.fround(from[first + mirror(i + offset, size) * stride]! * weight));
      to[start + (i * scale + phase) * stride] = sum;
    }
  }
}

function mirror(at: number, size: number): number {
  const index = ((at % (2 * size)) + 2 * size) % (2 * size);
  return Math.min(index, 2 * size - 1 - index);
}

function cubicTaps(centre: number): [number, number][] {
  const taps: [number, number][] = [];
  for (let at = Math.ceil(centre - 2); at <= Math.floor(centre + 2); at++) {
    const x = Math.abs(at - centre);
    taps.push([at, x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2]);
  }
  const total = taps.reduce((sum, [, weight]) => sum + weight, 0);
  return taps.map(([at, weight]) => [at, Math.fround(weight / total)]);
}

/** Clamp each channel to the range of the 5x5 low-resolution pixels around, widened by a share of it. */
export function limitOvershoot(image: Planes, low: Planes, share: number): void {
  const scale = image.width / low.width;
  const bound = (value: number, size: number) => Math.min(size - 1, Math.max(0, value));
  mapPlaces(low.channels, low.height, low.width, (c, y, x) => {
    let lowest = Infinity;
    let highest = -Infinity;
    for (let dy = -2; dy <= 2; dy++)
      for (let dx = -2; dx <= 2; dx++) {
        const value = low.data[(c * low.height + bound(y + dy, low.height)) * low.width + bound(x + dx, low.width)]!;
        lowest = Math.min(lowest, value);
        highest = Math.max(highest, value);
      }
    const room = share * (highest - lowest);
    for (let dy = 0; dy < scale; dy++)
      for (let dx = 0; dx < scale; dx++) {
        const at = (c * image.height + y * scale + dy) * image.width + x * scale + dx;
        image.data[at] = Math.min(highest + room, Math.max(lowest - room, image.data[at]!));
      }
    return 0;
  });
}
