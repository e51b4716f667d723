// Drawing: the frame, its overlay and its mask on canvases.

import { outline } from "./mask.js";
import type { Size } from "./resize.js";

export interface Picture extends Size {
  /** RGBA, opaque. */
  pixels: Uint8ClampedArray;
}

/** As the package draws: cyan stands out from red mucosa for every kind of color vision, the halo on highlights. */
const OUTLINE = [0, 229, 255] as const;
const FILL_OPACITY = 0.22;

function contextOf(canvas: HTMLCanvasElement, size: Size, extra = 0): CanvasRenderingContext2D {
  canvas.width = size.width;
  canvas.height = size.height + extra;
  return canvas.getContext("2d") as CanvasRenderingContext2D;
}

export function drawFrame(canvas: HTMLCanvasElement, picture: Picture): void {
  const data = new ImageData(picture.pixels as Uint8ClampedArray<ArrayBuffer>, picture.width, picture.height);
  contextOf(canvas, picture).putImageData(data, 0, 0);
}

export function drawMask(canvas: HTMLCanvasElement, mask: Uint8Array, size: Size): void {
  const data = new ImageData(size.width, size.height);
  for (let i = 0, j = 0; i < mask.length; i++, j += 4) {
    data.data[j] = data.data[j + 1] = data.data[j + 2] = 255 * mask[i];
    data.data[j + 3] = 255;
  }
  contextOf(canvas, size).putImageData(data, 0, 0);
}

/** The frame with the mask's outline and a light fill; with `words`, a strip below that carries them. */
export function drawOverlay(canvas: HTMLCanvasElement, picture: Picture, mask: Uint8Array, words: string[] = []): void {
  const { width, height } = picture;
  const text = Math.max(11, Math.round(width / 52));
  const lines = words.length ? wrap(words, text, width) : [];
  const context = contextOf(canvas, picture, lines.length ? Math.round(text * (1.4 * lines.length + 0.9)) : 0);
  const pixels = picture.pixels.slice();
  for (let i = 0, j = 0; i < mask.length; i++, j += 4) {
    if (!mask[i]) continue;
    for (let k = 0; k < 3; k++) pixels[j + k] = Math.round((1 - FILL_OPACITY) * pixels[j + k] + FILL_OPACITY * OUTLINE[k]);
  }
  if (lines.length) {
    context.fillStyle = "#10151a";
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.putImageData(new ImageData(pixels as Uint8ClampedArray<ArrayBuffer>, width, height), 0, 0);
  context.save();
  context.beginPath();
  context.rect(0, 0, width, height);
  context.clip();
  const path = new Path2D();
  for (const line of outline(mask, picture)) {
    path.moveTo(line[0], line[1]);
    for (let i = 2; i < line.length; i += 2) path.lineTo(line[i], line[i + 1]);
    path.closePath();
  }
  const thickness = Math.max(2, Math.round(Math.min(width, height) / 200));
  context.lineJoin = "round";
  for (const [line, shade] of [[2 * thickness + 1, "rgb(0 0 0 / 0.85)"], [thickness, `rgb(${OUTLINE.join(" ")})`]] as const) {
    context.lineWidth = line;
    context.strokeStyle = shade;
    context.stroke(path);
  }
  context.restore();
  context.fillStyle = "#e8edf1";
  context.font = `${text}px system-ui, sans-serif`;
  context.textBaseline = "top";
  lines.forEach((line, index) => context.fillText(line, text * 0.8, height + text * (0.6 + 1.4 * index)));
}

function wrap(paragraphs: string[], text: number, width: number): string[] {
  const context = document.createElement("canvas").getContext("2d") as CanvasRenderingContext2D;
  context.font = `${text}px system-ui, sans-serif`;
  const lines: string[] = [];
  for (const paragraph of paragraphs) {
    let line = "";
    for (const word of paragraph.split(" ")) {
      const longer = line ? `${line} ${word}` : word;
      if (line && context.measureText(longer).width > width - 1.6 * text) {
        lines.push(line);
        line = word;
      } else {
        line = longer;
      }
    }
    lines.push(line);
  }
  return lines;
}
