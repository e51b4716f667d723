// Keeps the page for use without a network, and adds the headers that let WASM share memory between threads.
//
// The list of files is written above this code when the page is put together: another model is another worker.

import { LARGE_FILES } from "./messages.js";

declare const POLYPSEG: {
  version: string;
  /** Path -> digest of the small files, asked for from the server first. */
  small: Record<string, string>;
  /** Addresses with a digest: the runtime's and the model's files. */
  large: string[];
  /** Addresses that are kept only once the page has used them. */
  later: string[];
};

interface ServiceWorker {
  registration: { scope: string };
  clients: { claim(): Promise<void> };
  skipWaiting(): Promise<void>;
  addEventListener(kind: string, listener: (event: LifeEvent) => void): void;
}
interface LifeEvent {
  request: Request;
  waitUntil(work: Promise<unknown>): void;
  respondWith(response: Promise<Response>): void;
}

const worker = self as unknown as ServiceWorker;
const SMALL_FILES = `polypseg-page-${POLYPSEG.version}`;
/** Milliseconds after which a network that hangs counts as none; long, because the kept page may be an older one. */
const PATIENCE = 15_000;

function place(path: string): string {
  return new URL(path, worker.registration.scope).href;
}

async function install(): Promise<void> {
  const large = await caches.open(LARGE_FILES);
  const missing = [];
  for (const path of POLYPSEG.large) if (!(await large.match(place(path)))) missing.push(place(path));
  await large.addAll(missing);
  const small = await caches.open(SMALL_FILES);
  await Promise.all(
    Object.entries(POLYPSEG.small).map(async ([path, digest]) => {
      const response = await fetch(place(path), { cache: "no-cache" });
      if (!response.ok) throw new Error(`${path}: ${response.status}`);
      const copy = await response.clone().arrayBuffer();
      const found = new Uint8Array(await crypto.subtle.digest("SHA-256", copy));
      if (Array.from(found, (byte) => byte.toString(16).padStart(2, "0")).join("") !== digest) {
        throw new Error(`${path} is of another version`);
      }
      await small.put(place(path), response);
    }),
  );
  await worker.skipWaiting();
}

async function activate(): Promise<void> {
  for (const name of await caches.keys()) {
    if (name.startsWith("polypseg-page-") && name !== SMALL_FILES) await caches.delete(name);
  }
  const large = await caches.open(LARGE_FILES);
  const wanted = new Set([...POLYPSEG.large, ...POLYPSEG.later].map(place));
  for (const request of await large.keys()) if (!wanted.has(request.url)) await large.delete(request);
  await worker.clients.claim();
}

/** A response of the page's own, with isolation. */
function isolated(response: Response): Response {
  if (response.type === "opaque" || response.type === "error" || response.status === 304) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}

async function answer(request: Request): Promise<Response> {
  const url = new URL(request.url);
  if (url.searchParams.has("sha256")) {
    const large = await (await caches.open(LARGE_FILES)).match(request.url);
    return isolated(large ?? (await fetch(request)));
  }
  url.search = "";
  url.hash = "";
  if (url.href === worker.registration.scope) url.pathname += "index.html";
  const small = await (await caches.open(SMALL_FILES)).match(url.href);
  if (!small) return isolated(await fetch(request));
  const limit = new AbortController();
  const timer = setTimeout(() => limit.abort(), PATIENCE);
  try {
    const fresh = await fetch(request.mode === "navigate" ? request.url : request, { signal: limit.signal, cache: "no-cache" });
    return isolated(fresh.ok ? fresh : small);
  } catch {
    return isolated(small);
  } finally {
    clearTimeout(timer);
  }
}

worker.addEventListener("install", (event) => event.waitUntil(install()));
worker.addEventListener("activate", (event) => event.waitUntil(activate()));
worker.addEventListener("fetch", (event) => {
  const ours = event.request.url.startsWith(worker.registration.scope);
  if (ours && event.request.method === "GET") event.respondWith(answer(event.request));
});
