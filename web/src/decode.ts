// Decoding in the worker: from a file's bytes or a camera's picture to opaque RGBA pixels as they are stored.

import { preparePicture, Refusal } from "./picture.js";
import type { Size } from "./resize.js";

/** Some phones give a canvas no more. */
const LARGEST = 16_000_000;

export interface Pixels extends Size {
  pixels: Uint8ClampedArray;
  notes: string[];
}

export async function decodeFile(bytes: Uint8Array): Promise<Pixels> {
  const { bytes: stored, type, notes } = preparePicture(bytes);
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(new Blob([stored as Uint8Array<ArrayBuffer>], { type }), {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new Refusal("This picture is damaged: the browser cannot decode it. Copy or download it again.");
  }
  return { ...readPixels(bitmap), notes };
}

/** The pixels of a bitmap, which is closed. Throws Refusal for one that is too large or not opaque. */
export function readPixels(bitmap: ImageBitmap): Pixels {
  const { width, height } = bitmap;
  if (width * height > LARGEST) {
    bitmap.close();
    const millions = (width * height) / 1e6;
    throw new Refusal(`This picture has ${millions.toFixed(0)} megapixels; the page takes at most 16. Crop or shrink it.`);
  }
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  if (!context) throw new Error("this browser gives a worker no canvas: use a newer one");
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height).data as Uint8ClampedArray;
  for (let i = 3; i < pixels.length; i += 4) {
    if (pixels[i] !== 255) {
      throw new Refusal(
        "This picture has transparent pixels, whose colors a browser does not keep. Save it without transparency (alpha).",
      );
    }
  }
  return { width, height, pixels, notes: [] };
}
