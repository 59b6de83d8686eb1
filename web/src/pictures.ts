/** Pictures as the browser decodes and encodes them. */

import { planes, upscaleBicubic, type Planes } from "./planes";

const MAX_RESULT = 16e6; // pixels; the arrays of a larger result do not fit into a phone's memory

export interface Picture {
  rgb: Planes;
  alpha: Planes | null;
}

/** Decode a picture, upright and in sRGB. `scale` limits its size. */
export async function decode(file: Blob, scale: number): Promise<Picture> {
  const bitmap = await createImageBitmap(file, { premultiplyAlpha: "none" }).catch(() => {
    throw new Error("This file is no picture that the browser can read. Choose a JPEG, PNG, WebP, AVIF or GIF file.");
  });
  const { width, height } = bitmap;
  if (width * height * scale * scale > MAX_RESULT)
    throw new Error(
      `The picture has ${width}×${height} pixels, and its enlargement would have more than ` +
      `${MAX_RESULT / 1e6} million. Choose a smaller one, or use \`binarize upscale\`.`,
    );
  const context = new OffscreenCanvas(width, height).getContext("2d")!;
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const rgb = planes(3, height, width);
  const alpha = planes(1, height, width);
  const size = width * height;
  let opaque = true;
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) rgb.data[c * size + i] = data[4 * i + c]! / 255;
    alpha.data[i] = data[4 * i + 3]! / 255;
    opaque &&= data[4 * i + 3] === 255;
  }
  return { rgb, alpha: opaque ? null : alpha };
}

/** Return a PNG file of an image; `alpha`, if there is one, has the low resolution. */
export function encode(rgb: Planes, alpha: Planes | null): Promise<Blob> {
  const { width, height } = rgb;
  const size = width * height;
  const opacity = alpha && upscaleBicubic(alpha, width / alpha.width);
  const pixels = new Uint8ClampedArray(4 * size); // rounds
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = 255 * rgb.data[c * size + i]!;
    pixels[4 * i + 3] = opacity ? 255 * opacity.data[i]! : 255;
  }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d")!.putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}
