// Masks: from logits by a probability, their regions, their outline, and a PNG of them.

import type { Size } from "./resize.js";

export interface Region {
  x: number;
  y: number;
  width: number;
  height: number;
  /** Pixels. */
  area: number;
  meanProbability: number;
  maxProbability: number;
}

export interface Summary {
  /** Pixels of the whole mask. */
  area: number;
  /** Fraction of the frame, 0 to 1. */
  fraction: number;
  /** At least the minimum area, largest first. */
  regions: Region[];
  /** Over the whole frame. */
  maxProbability: number;
}

export function sigmoid(logit: number): number {
  return 1 / (1 + Math.exp(-logit));
}

/** 1 where the probability exceeds the threshold, else 0. Compared as logits, as Python does. */
export function maskOf(logits: Float32Array, threshold: number): Uint8Array {
  const limit = Math.fround(Math.log(threshold / (1 - threshold)));
  const mask = new Uint8Array(logits.length);
  for (let i = 0; i < mask.length; i++) mask[i] = logits[i] > limit ? 1 : 0;
  return mask;
}

/** Connected regions of the mask (by side or corner) of at least `minArea` pixels, largest first. */
export function findRegions(mask: Uint8Array, logits: Float32Array, size: Size, minArea: number): Region[] {
  const { width, height } = size;
  const seen = new Uint8Array(mask.length);
  const stack: number[] = [];
  const regions: Region[] = [];
  for (let start = 0; start < mask.length; start++) {
    if (!mask[start] || seen[start]) continue;
    let [left, right, top, bottom] = [width, -1, height, -1];
    let area = 0;
    let sum = 0;
    let highest = -Infinity;
    stack.push(start);
    seen[start] = 1;
    while (stack.length) {
      const place = stack.pop() as number;
      const x = place % width;
      const y = (place - x) / width;
      area++;
      sum += sigmoid(logits[place]);
      highest = Math.max(highest, logits[place]);
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
      for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++) {
        for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++) {
          const next = v * width + u;
          if (mask[next] && !seen[next]) {
            seen[next] = 1;
            stack.push(next);
          }
        }
      }
    }
    if (area >= minArea) {
      regions.push({
        x: left,
        y: top,
        width: right - left + 1,
        height: bottom - top + 1,
        area,
        meanProbability: sum / area,
        maxProbability: sigmoid(highest),
      });
    }
  }
  return regions.sort((a, b) => b.area - a.area || a.y - b.y || a.x - b.x);
}

export function summarize(mask: Uint8Array, logits: Float32Array, size: Size, minArea: number): Summary {
  let area = 0;
  let highest = -Infinity;
  for (let i = 0; i < mask.length; i++) {
    area += mask[i];
    if (logits[i] > highest) highest = logits[i];
  }
  const regions = findRegions(mask, logits, size, minArea);
  return { area, fraction: area / mask.length, regions, maxProbability: sigmoid(highest) };
}

/** Closed lines around the mask and its holes, as x, y pairs in pixels of the frame; corners are cut by half a pixel. */
export function outline(mask: Uint8Array, { width, height }: Size): number[][] {
  const inside = (x: number, y: number): boolean =>
    x >= 0 && y >= 0 && x < width && y < height && mask[y * width + x] === 1;
  const stepX = [1, 0, -1, 0]; // right, down, left, up: the mask lies on the right-hand side
  const stepY = [0, 1, 0, -1];
  const visited = new Uint8Array(width * (height + 1));
  const lines: number[][] = [];
  for (let top = 0; top <= height; top++) {
    for (let left = 0; left < width; left++) {
      if (visited[top * width + left] || !inside(left, top) || inside(left, top - 1)) continue;
      const line: number[] = [];
      let [x, y, direction, before] = [left, top, 0, -1];
      do {
        if (direction === 0) visited[y * width + x] = 1;
        const [middleX, middleY] = [x + stepX[direction] / 2, y + stepY[direction] / 2];
        x += stepX[direction];
        y += stepY[direction];
        // The pixels ahead: of the vertex (x, y), to the left and to the right of the way.
        const [sideX, sideY] = [-stepY[direction], stepX[direction]];
        const ahead = (side: number): boolean =>
          inside(
            x + (stepX[direction] + side * sideX - 1) / 2,
            y + (stepY[direction] + side * sideY - 1) / 2,
          );
        const next = ahead(-1) ? (direction + 3) % 4 : ahead(1) ? direction : (direction + 1) % 4;
        if (next !== direction || before !== direction) line.push(middleX, middleY);
        before = direction;
        direction = next;
      } while (x !== left || y !== top || direction !== 0);
      lines.push(line);
    }
  }
  return lines;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, index) => {
  let value = index;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc32(bytes: Uint8Array): number {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC_TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

function pngChunk(kind: string, data: Uint8Array): Uint8Array {
  const chunk = new Uint8Array(data.length + 12);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) chunk[4 + i] = kind.charCodeAt(i);
  chunk.set(data, 8);
  view.setUint32(8 + data.length, crc32(chunk.subarray(4, 8 + data.length)));
  return chunk;
}

/** A mask of 0 and 1 -> a PNG of one gray channel with 0 and 255. */
export async function encodeMask(mask: Uint8Array, { width, height }: Size): Promise<Blob> {
  const rows = new Uint8Array((width + 1) * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) rows[y * (width + 1) + 1 + x] = 255 * mask[y * width + x];
  }
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const data = new Uint8Array(await new Response(packed).arrayBuffer());
  const header = new Uint8Array(13);
  new DataView(header.buffer).setUint32(0, width);
  new DataView(header.buffer).setUint32(4, height);
  header[8] = 8; // bits of the one gray channel
  const start = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
  const parts = [start, pngChunk("IHDR", header), pngChunk("IDAT", data), pngChunk("IEND", new Uint8Array())];
  return new Blob(parts as BlobPart[], { type: "image/png" });
}
