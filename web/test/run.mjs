// Calls the page's functions on files, for the tests: node run.mjs FOLDER. FOLDER/jobs.json lists the calls.

import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const folder = process.argv[2];
const bundle = join(folder, "functions.mjs");
const entry = ["resize", "tensor", "mask", "picture", "words"].map((name) => `export * from "./${name}.ts";`).join("\n");
await build({
  stdin: { contents: entry, resolveDir: join(here, "..", "src"), loader: "ts" },
  bundle: true,
  format: "esm",
  outfile: bundle,
  logLevel: "warning",
});
const page = await import(pathToFileURL(bundle).href);
rmSync(bundle);

const bytes = (name) => new Uint8Array(readFileSync(join(folder, name)));
const floats = (name) => new Float32Array(bytes(name).buffer);
const keep = (name, array) => writeFileSync(join(folder, name), new Uint8Array(array.buffer, array.byteOffset, array.byteLength));

const CALLS = {
  resize: ({ input, output, from, to, channels }) => keep(output, page.resizeBicubic(bytes(input), from, to, channels)),
  prepare: ({ input, output, from, side, mean, std }) => {
    const rgb = page.resizeBicubic(bytes(input), from, { width: side, height: side }, 3);
    keep(output, page.normalize(rgb, { mean, std }));
  },
  logits: ({ input, output, dims }) => keep(output, page.polypLogits(floats(input), dims)),
  map: ({ input, output, from, to }) => keep(output, page.resizeMap(floats(input), from, to)),
  summary: ({ input, size, threshold, minArea }) => {
    const logits = floats(input);
    return page.summarize(page.maskOf(logits, threshold), logits, size, minArea);
  },
  outline: ({ input, size }) => page.outline(bytes(input), size),
  png: async ({ input, output, size }) => keep(output, new Uint8Array(await (await page.encodeMask(bytes(input), size)).arrayBuffer())),
  picture: ({ input, output }) => {
    const picture = page.preparePicture(bytes(input));
    keep(output, picture.bytes);
    return { type: picture.type, notes: picture.notes };
  },
  quality: ({ scores }) => page.qualityWords({ scores }),
  csv: ({ rows }) => page.csv(rows),
};

const answers = [];
for (const job of JSON.parse(readFileSync(join(folder, "jobs.json"), "utf8"))) {
  try {
    answers.push({ value: (await CALLS[job.call](job)) ?? null });
  } catch (error) {
    answers.push({ error: error.message, refused: error instanceof page.Refusal });
  }
}
writeFileSync(join(folder, "answers.json"), JSON.stringify(answers));
