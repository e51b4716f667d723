// onnxruntime-web and the network: fetched once, checked, unpacked, and run by WASM or WebGPU.

import type * as Ort from "onnxruntime-web";
import { addressOf, LARGE_FILES, type Engine, type EngineName, type LargeFile, type PageFacts } from "./messages.js";

const MODULES: Record<EngineName, string> = { wasm: "./runtime/ort.wasm.mjs", webgpu: "./runtime/ort.webgpu.mjs" };

/** The bytes of a large file, from the cache where it is; every byte is counted by `progress`. */
async function fetchLarge(file: LargeFile, progress: (bytes: number) => void): Promise<Uint8Array<ArrayBuffer>> {
  const address = new URL(addressOf(file), self.location.href).href;
  const cache = "caches" in self ? await caches.open(LARGE_FILES).catch(() => null) : null;
  const kept = await cache?.match(address);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if ((await sha256(bytes)) === file.sha256) {
      progress(file.bytes);
      return bytes;
    }
    await cache?.delete(address);
  }
  const response = await fetch(address);
  if (!response.ok || !response.body) throw new Error(`${file.path} cannot be loaded (${response.status})`);
  const bytes = new Uint8Array(file.bytes);
  let place = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (place + part.value.length > bytes.length) throw new Error(`${file.path} is longer than announced: reload the page`);
    bytes.set(part.value, place);
    place += part.value.length;
    progress(part.value.length);
  }
  if ((await sha256(bytes)) !== file.sha256) throw new Error(`${file.path} arrived damaged: reload the page`);
  // A full disk only costs the use without a network.
  await cache?.put(address, new Response(bytes, { headers: { "Content-Type": "application/gzip" } })).catch(() => undefined);
  return bytes;
}

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function unpack(bytes: Uint8Array<ArrayBuffer>): Promise<ArrayBuffer> {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/** Two to four threads, only where the browser shares memory between them; some say one core where there are two. */
export function threadCount(): number {
  return self.crossOriginIsolated ? Math.max(2, Math.min(4, navigator.hardwareConcurrency || 2)) : 1;
}

/** One session of the network. */
export class Network {
  private constructor(
    private readonly ort: typeof Ort,
    private readonly session: Ort.InferenceSession,
    readonly engine: Engine,
    private readonly side: number,
  ) {}

  static async load(facts: PageFacts, name: EngineName, progress: (bytes: number) => void): Promise<Network> {
    const [ort, wasm, network] = await Promise.all([
      import(MODULES[name]) as Promise<typeof Ort>,
      fetchLarge(facts.runtime[name], progress).then(unpack),
      fetchLarge(facts.model.network, progress).then(unpack),
    ]);
    const threads = threadCount();
    ort.env.wasm.numThreads = threads;
    ort.env.wasm.wasmBinary = wasm;
    ort.env.logLevel = "error";
    const session = await ort.InferenceSession.create(new Uint8Array(network), {
      executionProviders: [name],
      graphOptimizationLevel: "all",
    });
    return new Network(ort, session, { name, threads: name === "wasm" ? threads : 1 }, facts.model.size);
  }

  /** Pixel values (3, S, S) -> class logits and their shape. */
  async run(values: Float32Array): Promise<{ logits: Float32Array; dims: readonly number[] }> {
    const input = new this.ort.Tensor("float32", values, [1, 3, this.side, this.side]);
    const outputs = await this.session.run({ [this.session.inputNames[0]]: input });
    const output = outputs[this.session.outputNames[0]];
    const logits = (await output.getData()) as Float32Array;
    return { logits, dims: output.dims };
  }

  /** Milliseconds of the second of two runs on nothing: the first prepares kernels. */
  async time(): Promise<number> {
    const values = new Float32Array(3 * this.side * this.side);
    await this.run(values);
    const start = performance.now();
    await this.run(values);
    return performance.now() - start;
  }

  async release(): Promise<void> {
    await this.session.release();
  }
}
