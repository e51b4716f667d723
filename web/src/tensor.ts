// From pixels to the network's input, and from its output to logits of the frame's size.

import type { Size } from "./resize.js";

export interface Statistics {
  mean: readonly number[];
  std: readonly number[];
}

/** RGB bytes of a square -> normalized values (3, S, S), red plane first. */
export function normalize(rgb: Uint8Array, { mean, std }: Statistics): Float32Array {
  const plane = rgb.length / 3;
  const result = new Float32Array(rgb.length);
  for (let channel = 0; channel < 3; channel++) {
    const table = new Float32Array(256);
    const [m, s] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    for (let value = 0; value < 256; value++) table[value] = Math.fround(Math.fround(value / 255) - m) / s;
    for (let i = 0, source = channel; i < plane; i++, source += 3) result[channel * plane + i] = table[rgb[source]];
  }
  return result;
}

/** Class logits (1 or 2, S, S) -> polyp against background (S, S): positive where a polyp is predicted. */
export function polypLogits(logits: Float32Array, dims: readonly number[]): Float32Array {
  const classes = dims[1];
  if (dims.length !== 4 || dims[0] !== 1 || classes < 1 || classes > 2) {
    throw new Error(`the model gives logits of shape ${dims.join(" x ")}, not 1 x 2 x S x S`);
  }
  const plane = dims[2] * dims[3];
  if (classes === 1) return logits.slice(0, plane);
  const result = new Float32Array(plane);
  for (let i = 0; i < plane; i++) result[i] = logits[plane + i] - logits[i];
  return result;
}

interface Blend {
  low: Int32Array;
  high: Int32Array;
  share: Float32Array;
}

function blend(from: number, to: number): Blend {
  const scale = Math.fround(from / to);
  const result = { low: new Int32Array(to), high: new Int32Array(to), share: new Float32Array(to) };
  for (let i = 0; i < to; i++) {
    const place = Math.max(0, Math.fround(Math.fround(scale * (i + 0.5)) - 0.5)); // torch computes it in float32
    const low = Math.min(Math.trunc(place), from - 1);
    result.low[i] = low;
    result.high[i] = Math.min(low + 1, from - 1);
    result.share[i] = place - low;
  }
  return result;
}

/** A map (h, w) -> (H, W): bilinear, corners not aligned, no antialias, as torch's interpolate. */
export function resizeMap(values: Float32Array, from: Size, to: Size): Float32Array {
  const columns = blend(from.width, to.width);
  const rows = blend(from.height, to.height);
  const result = new Float32Array(to.width * to.height);
  for (let y = 0, i = 0; y < to.height; y++) {
    const upper = rows.low[y] * from.width;
    const lower = rows.high[y] * from.width;
    const down = rows.share[y];
    for (let x = 0; x < to.width; x++, i++) {
      const [left, right, across] = [columns.low[x], columns.high[x], columns.share[x]];
      const top = values[upper + left] * (1 - across) + values[upper + right] * across;
      const bottom = values[lower + left] * (1 - across) + values[lower + right] * across;
      result[i] = top * (1 - down) + bottom * down;
    }
  }
  return result;
}
