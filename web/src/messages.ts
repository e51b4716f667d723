// What page.json holds, and what page and worker tell each other.

import type { Summary } from "./mask.js";
import type { Size } from "./resize.js";

/** A score of the model on one test, from its receipt. */
export interface Score {
  dataset: string;
  images: number;
  dice: number;
  low: number | null;
  high: number | null;
}

/** A file whose address carries its digest, so that a copy never goes stale. */
export interface LargeFile {
  path: string;
  sha256: string;
  bytes: number;
}

/** page.json: everything of the page that depends on the model. */
export interface PageFacts {
  version: string;
  model: {
    name: string;
    license: string;
    size: number;
    mean: number[];
    std: number[];
    precision: string;
    network: LargeFile;
  };
  threshold: number;
  min_area: number;
  scores: Score[];
  runtime: { wasm: LargeFile; webgpu: LargeFile };
}

export type EngineName = "wasm" | "webgpu";

export interface Engine {
  name: EngineName;
  threads: number;
}

export type Request =
  | { kind: "start"; facts: PageFacts; engine: EngineName }
  | { kind: "file"; id: number; key: number; bytes: ArrayBuffer; threshold: number; summaryOnly: boolean }
  | { kind: "camera"; id: number; bitmap: ImageBitmap; threshold: number }
  | { kind: "measure"; id: number; key: number; threshold: number }
  | { kind: "forget" }
  | { kind: "gpu" };

export interface Frame extends Size {
  /** RGBA, opaque. */
  pixels: Uint8ClampedArray;
  /** Polyp logits at the frame's size. */
  logits: Float32Array;
  notes: string[];
  /** Milliseconds of decoding, of the resize, of the network, of the upsampling. */
  times: [number, number, number, number];
}

export type Reply =
  | { kind: "loading"; done: number; total: number }
  | { kind: "ready"; engine: Engine; milliseconds: number }
  | { kind: "failed"; message: string }
  | { kind: "engine"; engine: Engine; wasm: number; webgpu: number }
  | { kind: "frame"; id: number; frame: Frame; summary: Summary }
  | { kind: "summary"; id: number; summary: Summary; size: Size }
  | { kind: "refused"; id: number; message: string };

export const LARGE_FILES = "polypseg-large";

/** Where a large file is kept and asked for. */
export function addressOf(file: LargeFile): string {
  return `${file.path}?sha256=${file.sha256}`;
}
