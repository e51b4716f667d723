// The page's module worker: decodes, resizes, runs the network; the page itself stays free for the user.

import { decodeFile, readPixels, type Pixels } from "./decode.js";
import { maskOf, summarize, type Summary } from "./mask.js";
import type { EngineName, Frame, PageFacts, Reply, Request } from "./messages.js";
import { Refusal } from "./picture.js";
import { resizeBicubic, type Size } from "./resize.js";
import { Network } from "./runtime.js";
import { normalize, polypLogits, resizeMap } from "./tensor.js";

interface Kept {
  logits: Float32Array;
  from: Size;
  size: Size;
}

const kept = new Map<number, Kept>();
let facts: PageFacts;
let network: Network;

function reply(message: Reply, transfer: Transferable[] = []): void {
  (self as unknown as { postMessage(message: Reply, transfer: Transferable[]): void }).postMessage(message, transfer);
}

async function start(given: PageFacts, wanted: EngineName): Promise<void> {
  const began = performance.now();
  facts = given;
  try {
    network = await loadAloud(wanted);
  } catch (error) {
    if (wanted === "wasm") throw error;
    console.warn(`WebGPU is not used: ${messageOf(error)}`);
    network = await loadAloud("wasm");
  }
  reply({ kind: "ready", engine: network.engine, milliseconds: performance.now() - began });
}

async function loadAloud(name: EngineName): Promise<Network> {
  const total = facts.runtime[name].bytes + facts.model.network.bytes;
  let done = 0;
  return Network.load(facts, name, (bytes) => {
    done += bytes;
    reply({ kind: "loading", done, total });
  });
}

/** Load the WebGPU file where there is a real adapter; null where there is none, or the page runs on it already. */
async function loadForGpu(): Promise<Network | null> {
  if (network.engine.name === "webgpu" || !("Suspending" in WebAssembly)) return null;
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<GpuAdapter | null> } }).gpu;
  const adapter = await gpu?.requestAdapter();
  if (!adapter || adapter.info?.isFallbackAdapter) return null;
  return Network.load(facts, "webgpu", () => undefined);
}

/** Change over to another network where it is faster and says the same. */
async function compare(other: Network): Promise<void> {
  const side = facts.model.size;
  const probe = Float32Array.from({ length: 3 * side * side }, (_, i) => Math.sin(i * 0.01) + Math.sin(i * 0.003));
  const [one, two] = [await network.run(probe), await other.run(probe)];
  const differs = one.logits.some((value, i) => !(Math.abs(value - two.logits[i]) <= 0.02 * (1 + Math.abs(value))));
  const [wasm, webgpu] = [await network.time(), await other.time()];
  const better = !differs && webgpu < 0.9 * wasm;
  await (better ? network : other).release();
  if (better) network = other;
  reply({ kind: "engine", engine: network.engine, wasm, webgpu });
}

interface GpuAdapter {
  info?: { isFallbackAdapter?: boolean };
}

async function segment(picture: Pixels, decoding: number, key: number | null): Promise<Frame> {
  const side = facts.model.size;
  const times: Frame["times"] = [decoding, 0, 0, 0];
  let logits = key === null ? undefined : kept.get(key)?.logits;
  let from: Size = { width: side, height: side };
  if (!logits) {
    let mark = performance.now();
    const values = normalize(resizeBicubic(picture.pixels, picture, from, 4), facts.model);
    times[1] = performance.now() - mark;
    mark = performance.now();
    const output = await network.run(values);
    times[2] = performance.now() - mark;
    logits = polypLogits(output.logits, output.dims);
    from = { height: output.dims[2], width: output.dims[3] };
    if (key !== null) kept.set(key, { logits, from, size: { width: picture.width, height: picture.height } });
  } else {
    from = (kept.get(key as number) as Kept).from;
  }
  const mark = performance.now();
  const resized = resizeMap(logits, from, picture);
  times[3] = performance.now() - mark;
  return { width: picture.width, height: picture.height, pixels: picture.pixels, logits: resized, notes: picture.notes, times };
}

function summaryOf(logits: Float32Array, size: Size, threshold: number): Summary {
  return summarize(maskOf(logits, threshold), logits, size, facts.min_area);
}

/** The download does not hold up the user's pictures; the comparison waits for its turn. */
function tryGpu(): void {
  const refuse = (error: unknown): void => console.warn(`WebGPU is not used: ${messageOf(error)}`);
  loadForGpu().then((other) => {
    if (other) queue = queue.then(() => compare(other)).catch(refuse);
  }, refuse);
}

async function handle(request: Exclude<Request, { kind: "gpu" }>): Promise<void> {
  switch (request.kind) {
    case "start":
      return start(request.facts, request.engine);
    case "forget":
      return kept.clear();
    case "measure": {
      const { logits, from, size } = kept.get(request.key) as Kept;
      const summary = summaryOf(resizeMap(logits, from, size), size, request.threshold);
      return reply({ kind: "summary", id: request.id, summary, size });
    }
    case "file":
    case "camera": {
      const mark = performance.now();
      const picture =
        request.kind === "file" ? await decodeFile(new Uint8Array(request.bytes)) : readPixels(request.bitmap);
      const key = request.kind === "file" ? request.key : null;
      const frame = await segment(picture, performance.now() - mark, key);
      const summary = summaryOf(frame.logits, frame, request.threshold);
      if (request.kind === "file" && request.summaryOnly) {
        return reply({ kind: "summary", id: request.id, summary, size: { width: frame.width, height: frame.height } });
      }
      return reply({ kind: "frame", id: request.id, frame, summary }, [frame.pixels.buffer, frame.logits.buffer]);
    }
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

// One request after the other: the network runs one frame at a time.
let queue: Promise<void> = Promise.resolve();
self.addEventListener("message", (event: MessageEvent<Request>) => {
  const request = event.data;
  if (request.kind === "gpu") {
    tryGpu();
    return;
  }
  queue = queue
    .then(() => handle(request))
    .catch((error: unknown) => {
      if ("id" in request) {
        const words = error instanceof Refusal ? error.message : `The model failed on this picture: ${messageOf(error)}.`;
        reply({ kind: "refused", id: request.id, message: words });
      } else {
        reply({ kind: "failed", message: messageOf(error) });
      }
    });
});
