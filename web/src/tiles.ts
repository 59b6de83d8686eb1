/** Overlapping tiles whose predictions are blended, as in `binarize.models.tiling`. */

/** One tile along one axis: its first pixel, and the blending weight of each of its pixels. */
export interface Span {
  start: number;
  weights: Float64Array;
}

const TILE = 256;
const UNTILED = 512;
const OVERLAP = 32;

/** Return the tiles of both axes: one of the whole image, or of 256 pixels if a side exceeds 512. */
export function tileGrid(height: number, width: number, multiple: number): { rows: Span[]; columns: Span[] } {
  const tile = Math.max(height, width) > UNTILED ? TILE : Infinity;
  return { rows: cover(height, tile, multiple), columns: cover(width, tile, multiple) };
}

export function end(spans: Span[]): number {
  const last = spans[spans.length - 1]!;
  return last.start + last.weights.length;
}

function cover(length: number, tile: number, multiple: number): Span[] {
  const units = Math.ceil(length / multiple);
  if (tile >= length) return [{ start: 0, weights: new Float64Array(units * multiple).fill(1) }];
  const size = Math.max(1, Math.floor(tile / multiple));
  const stride = Math.max(1, Math.floor((size * multiple - OVERLAP) / multiple));
  const steps = Math.ceil((units - size) / stride);
  const starts = Array.from({ length: steps + 1 }, (_, i) =>
    steps ? Math.floor((i * (units - size)) / steps) * multiple : 0);
  return weighted(starts, size * multiple);
}

/** Give each tile its window, divided by the sum of all windows at a pixel. */
function weighted(starts: number[], size: number): Span[] {
  const shared = starts.slice(1).map((after, i) => starts[i]! + size - after);
  const windows = starts.map((_, i) => window(size, shared[i - 1] ?? 0, shared[i] ?? 0));
  const total = new Float64Array(starts[starts.length - 1]! + size);
  windows.forEach((each, i) => each.forEach((weight, at) => (total[starts[i]! + at]! += weight)));
  return windows.map((each, i) => ({ start: starts[i]!, weights: each.map((w, at) => w / total[starts[i]! + at]!) }));
}

/** Rise over the `before` pixels shared with a neighbour, and fall over the `after`: sin^2 of their middle half. */
function window(size: number, before: number, after: number): Float64Array {
  const side = (shared: number, depth: number) =>
    shared ? Math.sin((Math.min(1, Math.max(0, (2 * depth) / shared - 0.5)) * Math.PI) / 2) ** 2 : 1;
  return Float64Array.from({ length: size }, (_, i) => side(before, i + 0.5) * side(after, size - i - 0.5));
}
