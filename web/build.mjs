// Builds the page into one folder: bundles, static files, and onnxruntime-web's files taken from its package.
//
// node build.mjs [FOLDER]; the folder is replaced. Prints what travels and what is stored.

import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const target = resolve(process.argv[2] ?? join(here, "..", "src", "polypseg", "_web"));
const folder = `${target}.new`;
const ort = join(here, "node_modules", "onnxruntime-web");

/** Ours -> onnxruntime-web's: the small CPU runtime, and the one with WebGPU that is fetched only where it is used. */
const RUNTIME = {
  "ort.wasm.mjs": "ort.wasm.bundle.min.mjs",
  "ort.webgpu.mjs": "ort.jspi.bundle.min.mjs",
  "ort-wasm.wasm.gz": "ort-wasm-simd-threaded.wasm",
  "ort-webgpu.wasm.gz": "ort-wasm-simd-threaded.jspi.wasm",
};
const LATER = new Set(["runtime/ort-webgpu.wasm.gz", "licenses/onnxruntime-third-party-notices.txt.gz"]);

function digest(bytes) {
  return createHash("sha256").update(bytes).digest("hex");
}

function files(place, prefix = "") {
  return readdirSync(place, { withFileTypes: true }).flatMap((entry) =>
    entry.isDirectory() ? files(join(place, entry.name), `${prefix}${entry.name}/`) : [`${prefix}${entry.name}`],
  );
}

rmSync(folder, { recursive: true, force: true });
mkdirSync(join(folder, "runtime"), { recursive: true });
mkdirSync(join(folder, "licenses"));
cpSync(join(here, "static"), folder, { recursive: true });

const common = { bundle: true, target: "es2022", minify: true, legalComments: "none", logLevel: "warning", outdir: folder };
await build({ ...common, absWorkingDir: here, entryPoints: ["src/page.ts", "src/worker.ts"], format: "esm" });
await build({ ...common, absWorkingDir: here, entryPoints: ["src/service_worker.ts"], format: "iife" });

const vendored = {};
for (const [ours, theirs] of Object.entries(RUNTIME)) {
  const original = readFileSync(join(ort, "dist", theirs));
  const shipped = ours.endsWith(".gz") ? gzipSync(original, { level: 9 }) : stripSourceMap(original);
  writeFileSync(join(folder, "runtime", ours), shipped);
  vendored[ours] = { file: theirs, sha256: digest(original) };
}
for (const file of readdirSync(join(here, "third_party"))) {
  const text = readFileSync(join(here, "third_party", file));
  const packed = text.length > 50_000;
  writeFileSync(join(folder, "licenses", packed ? `${file}.gz` : file), packed ? gzipSync(text, { level: 9 }) : text);
}

const version = JSON.parse(readFileSync(join(ort, "package.json"), "utf8")).version;
const listed = {};
for (const file of files(folder).sort()) {
  const bytes = readFileSync(join(folder, file));
  listed[file] = { sha256: digest(bytes), bytes: bytes.length, later: LATER.has(file) };
}
const record = { onnxruntime_web: version, vendored, files: listed };
writeFileSync(join(folder, "build.json"), JSON.stringify(record, null, 2) + "\n");

const old = `${target}.old`;
rmSync(old, { recursive: true, force: true });
if (existsSync(target)) renameSync(target, old);
renameSync(folder, target);
rmSync(old, { recursive: true, force: true });

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const sum = (rows) => rows.reduce((total, { bytes }) => total + bytes, 0);
const first = Object.values(listed).filter(({ later }) => !later);
const gpu = [listed["runtime/ort-webgpu.wasm.gz"]];
const code = Object.entries(listed).filter(([file]) => !file.startsWith("runtime/") && !LATER.has(file)).map(([, row]) => row);
console.log(`${basename(target)}: ${Object.keys(listed).length} files, ${megabytes(sum(Object.values(listed)))} stored, without a model`);
console.log(`transferred at first use: ${megabytes(sum(first))} (page ${megabytes(sum(code))}, runtime ${megabytes(sum(first) - sum(code))})`);
console.log(`only where WebGPU is tried: ${megabytes(sum(gpu))}; onnxruntime-web ${version}`);

/** The map is not shipped, so nothing may ask for it. */
function stripSourceMap(bytes) {
  return Buffer.from(bytes.toString("utf8").replace(/\n\/\/# sourceMappingURL=.*\n?$/, "\n"));
}
