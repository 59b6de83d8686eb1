// Enlarges a picture in Node with the file that `binarize export MODEL upscale.onnx --steps 2` writes.
//
//   npm install onnxruntime-node
//   node upscale.mjs upscale.onnx small.ppm large.ppm
//
// Pictures are binary PPM files (P6, 8 bits), without comments.
import { readFile, writeFile } from "node:fs/promises";
import * as ort from "onnxruntime-node";

const SCALE = 2, MULTIPLE = 4; // "scale" and "size_multiple" of the file's metadata binarize.sampling

const [model, small, large] = process.argv.slice(2);
const file = await readFile(small);
const header = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(file.toString("latin1", 0, 40));
if (!header) throw new Error(`${small}: not a binary 8-bit PPM file`);
const [width, height] = [Number(header[1]), Number(header[2])];
const bytes = file.subarray(header[0].length);

const padded = (side) => Math.ceil((SCALE * side) / MULTIPLE) * MULTIPLE;
const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
const pixels = Float32Array.from({ length: 3 * width * height }, (_, i) => {
  const plane = Math.floor(i / (width * height)); // planes of red, green and blue, 0 to 1
  return bytes[3 * (i - plane * width * height) + plane] / 255;
});
const gaussian = Float32Array.from({ length: 3 * padded(height) * padded(width) }, normal);

// --8<-- [start:run]
const session = await ort.InferenceSession.create(model);
const image = new ort.Tensor("float32", pixels, [1, 3, height, width]);
const noise = new ort.Tensor("float32", gaussian, [1, 3, padded(height), padded(width)]);
const { enlarged } = await session.run({ image, noise });
// --8<-- [end:run]

const count = SCALE * width * SCALE * height;
const out = Uint8Array.from({ length: 3 * count }, (_, i) =>
  Math.round(255 * enlarged.data[(i % 3) * count + Math.floor(i / 3)]),
);
await writeFile(large, Buffer.concat([Buffer.from(`P6\n${SCALE * width} ${SCALE * height}\n255\n`), out]));
