// The page's side of the worker: requests with an answer each.

import type { Summary } from "./mask.js";
import type { Engine, EngineName, Frame, PageFacts, Reply, Request } from "./messages.js";
import type { Size } from "./resize.js";

export interface Segmented {
  frame: Frame;
  summary: Summary;
}

export interface Measured {
  summary: Summary;
  size: Size;
}

export interface Events {
  loading(done: number, total: number): void;
  ready(engine: Engine, milliseconds: number): void;
  engine(engine: Engine): void;
  failed(message: string): void;
}

/** A file that was refused; the message is for the user. */
export class Refused extends Error {}

export class Client {
  private readonly worker = new Worker("worker.js", { type: "module" });
  private readonly waiting = new Map<number, { resolve(reply: Reply): void; reject(error: Error): void }>();
  private last = 0;

  constructor(private readonly events: Events) {
    this.worker.addEventListener("message", (event: MessageEvent<Reply>) => this.receive(event.data));
    this.worker.addEventListener("error", (event) => events.failed(event.message || "the worker cannot be loaded"));
  }

  start(facts: PageFacts, engine: EngineName): void {
    this.send({ kind: "start", facts, engine });
  }

  /** Segment a file; its result is kept under `key`, so that a second call does not run the network again. */
  async file(file: Blob, options: { key: number; threshold: number }): Promise<Segmented> {
    return (await this.askForFile(file, { ...options, summaryOnly: false })) as Extract<Reply, { kind: "frame" }>;
  }

  /** The same, for its figures only. */
  async measureFile(file: Blob, options: { key: number; threshold: number }): Promise<Measured> {
    return (await this.askForFile(file, { ...options, summaryOnly: true })) as Extract<Reply, { kind: "summary" }>;
  }

  private async askForFile(file: Blob, options: { key: number; threshold: number; summaryOnly: boolean }): Promise<Reply> {
    const bytes = await file.arrayBuffer().catch(() => {
      throw new Refused("This file cannot be read: it was moved, changed or is not yours to read.");
    });
    return this.ask((id) => ({ kind: "file", id, bytes, ...options }), [bytes]);
  }

  async camera(bitmap: ImageBitmap, threshold: number): Promise<Segmented> {
    const reply = await this.ask((id) => ({ kind: "camera", id, bitmap, threshold }), [bitmap]);
    return reply as Extract<Reply, { kind: "frame" }>;
  }

  /** Figures of a kept result at another threshold. */
  async measure(key: number, threshold: number): Promise<Summary> {
    const reply = await this.ask((id) => ({ kind: "measure", id, key, threshold }));
    return (reply as Extract<Reply, { kind: "summary" }>).summary;
  }

  forget(): void {
    this.send({ kind: "forget" });
  }

  tryGpu(): void {
    this.send({ kind: "gpu" });
  }

  private send(request: Request, transfer: Transferable[] = []): void {
    this.worker.postMessage(request, transfer);
  }

  private ask(make: (id: number) => Request, transfer: Transferable[] = []): Promise<Reply> {
    const id = ++this.last;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.send(make(id), transfer);
    });
  }

  private receive(reply: Reply): void {
    switch (reply.kind) {
      case "loading":
        return this.events.loading(reply.done, reply.total);
      case "ready":
        return this.events.ready(reply.engine, reply.milliseconds);
      case "engine":
        return this.events.engine(reply.engine);
      case "failed":
        return this.events.failed(reply.message);
      default: {
        const waiting = this.waiting.get(reply.id);
        this.waiting.delete(reply.id);
        if (reply.kind === "refused") waiting?.reject(new Refused(reply.message));
        else waiting?.resolve(reply);
      }
    }
  }
}
