// What a picture file is, before the browser decodes it: refused with a reason, or freed of what would change pixels.
//
// Python reads pixels as they are stored. Browsers turn them by EXIF and convert them by color profile, and no option
// that all of them know switches that off: so the marks are taken out of the bytes.

/** A file that the page does not read; the message is shown as it is. */
export class Refusal extends Error {}

export interface Picture {
  bytes: Uint8Array;
  type: string;
  /** What the user should know of how it was read. */
  notes: string[];
}

const CONVERT = "Save it as JPEG or as PNG with 8 bits per channel, or use `polypseg segment`.";

/** The file's bytes, ready for the browser's decoder. Throws Refusal. */
export function preparePicture(bytes: Uint8Array): Picture {
  if (startsWith(bytes, [0xff, 0xd8, 0xff])) return prepareJpeg(bytes);
  if (startsWith(bytes, [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a])) return preparePng(bytes);
  if (text(bytes, 0, 4) === "RIFF" && text(bytes, 8, 4) === "WEBP") return prepareWebp(bytes);
  if (text(bytes, 0, 2) === "BM") return { bytes, type: "image/bmp", notes: [] };
  const tiff = [[0x49, 0x49, 0x2a, 0], [0x4d, 0x4d, 0, 0x2a], [0x49, 0x49, 0x2b, 0], [0x4d, 0x4d, 0, 0x2b]];
  if (tiff.some((magic) => startsWith(bytes, magic))) throw new Refusal(`This is a TIFF, which browsers do not read. ${CONVERT}`);
  if (text(bytes, 0, 3) === "GIF") throw new Refusal(`This is a GIF, whose few colors change what the model sees. ${CONVERT}`);
  if (text(bytes, 4, 4) === "ftyp") {
    const brand = text(bytes, 8, 4);
    const kind = /^(hei|hev|mif|msf|avif|avis)/.test(brand) ? "HEIC or AVIF picture" : "video";
    throw new Refusal(`This is a ${kind}, which the page does not read. ${kind === "video" ? "`polypseg segment` does." : CONVERT}`);
  }
  throw new Refusal("This is no picture that the page reads: open a JPEG, PNG, WebP or BMP file.");
}

function startsWith(bytes: Uint8Array, magic: readonly number[]): boolean {
  return magic.every((value, index) => bytes[index] === value);
}

function text(bytes: Uint8Array, start: number, length: number): string {
  return String.fromCharCode(...bytes.subarray(start, start + length));
}

function truncated(): Refusal {
  return new Refusal("This file is truncated: copy or download it again.");
}

function join(parts: readonly Uint8Array[]): Uint8Array {
  const result = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    result.set(part, place);
    place += part.length;
  }
  return result;
}

function notesOf(turned: boolean, profile: boolean): string[] {
  const notes = [];
  if (turned) notes.push("The file's rotation mark (EXIF) is ignored: the pixels are read as stored, as Python reads them.");
  if (profile) notes.push("The file's color profile is ignored: the values are read as stored, as Python reads them.");
  return notes;
}

const START_OF_FRAME = new Set([0xc0, 0xc1, 0xc2, 0xc3, 0xc5, 0xc6, 0xc7, 0xc9, 0xca, 0xcb, 0xcd, 0xce, 0xcf]);

function prepareJpeg(bytes: Uint8Array): Picture {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const kept = [bytes.subarray(0, 2)];
  let [turned, profile, framed] = [false, false, false];
  let place = 2;
  for (;;) {
    while (bytes[place] === 0xff && bytes[place + 1] === 0xff) place++; // fill bytes
    if (place + 4 > bytes.length) throw truncated();
    const marker = bytes[place + 1];
    const end = place + 2 + view.getUint16(place + 2);
    if (bytes[place] !== 0xff || end > bytes.length) throw truncated();
    if (marker === 0xda) break; // the scans begin
    if (START_OF_FRAME.has(marker)) {
      framed = true;
      if (bytes[place + 4] !== 8) throw new Refusal(`This JPEG has ${bytes[place + 4]} bits per channel. ${CONVERT}`);
      if (bytes[place + 9] === 4) throw new Refusal(`This JPEG is in CMYK colors. ${CONVERT}`);
    }
    const exif = marker === 0xe1 && text(bytes, place + 4, 4) === "Exif";
    const icc = marker === 0xe2 && text(bytes, place + 4, 11) === "ICC_PROFILE";
    if (exif) turned ||= exifOrientation(bytes.subarray(place + 10, end)) > 1;
    profile ||= icc;
    if (!exif && !icc) kept.push(bytes.subarray(place, end));
    place = end;
  }
  if (!framed || !endsInScan(bytes, place)) throw truncated();
  kept.push(bytes.subarray(place));
  return { bytes: join(kept), type: "image/jpeg", notes: notesOf(turned, profile) };
}

/** Whether an end-of-image marker follows the start of the scans. */
function endsInScan(bytes: Uint8Array, start: number): boolean {
  for (let i = bytes.length - 2; i > start; i--) if (bytes[i] === 0xff && bytes[i + 1] === 0xd9) return true;
  return false;
}

/** The orientation of a TIFF structure, 1 to 8; 1 where it says none. */
export function exifOrientation(tiff: Uint8Array): number {
  if (tiff.length < 8) return 1;
  const view = new DataView(tiff.buffer, tiff.byteOffset, tiff.byteLength);
  const little = tiff[0] === 0x49;
  const directory = view.getUint32(4, little);
  if (directory + 2 > tiff.length) return 1;
  const entries = view.getUint16(directory, little);
  for (let entry = directory + 2; entry < directory + 2 + 12 * entries && entry + 12 <= tiff.length; entry += 12) {
    if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little);
  }
  return 1;
}

const PNG_DROPPED = new Set(["gAMA", "cHRM", "iCCP", "sRGB", "cICP", "mDCV", "cLLI", "eXIf", "acTL", "fcTL", "fdAT"]);

function preparePng(bytes: Uint8Array): Picture {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const kept = [bytes.subarray(0, 8)];
  let [turned, profile] = [false, false];
  for (let place = 8; ; ) {
    if (place + 12 > bytes.length) throw truncated();
    const end = place + 12 + view.getUint32(place);
    if (end > bytes.length) throw truncated();
    const kind = text(bytes, place + 4, 4);
    if (kind === "IHDR" && bytes[place + 16] > 8) {
      throw new Refusal(`This PNG has ${bytes[place + 16]} bits per channel. ${CONVERT}`);
    }
    if (kind === "eXIf") turned ||= exifOrientation(bytes.subarray(place + 8, end - 4)) > 1;
    profile ||= kind === "iCCP" || kind === "cICP";
    if (!PNG_DROPPED.has(kind)) kept.push(bytes.subarray(place, end));
    if (kind === "IEND") break;
    place = end;
  }
  return { bytes: join(kept), type: "image/png", notes: notesOf(turned, profile) };
}

function prepareWebp(bytes: Uint8Array): Picture {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.getUint32(4, true) + 8 > bytes.length) throw truncated();
  const kept: Uint8Array[] = [];
  let [turned, profile] = [false, false];
  for (let place = 12; place + 8 <= bytes.length; ) {
    const end = place + 8 + view.getUint32(place + 4, true);
    if (end > bytes.length) throw truncated();
    const kind = text(bytes, place, 4);
    const padded = Math.min(bytes.length, end + (end % 2));
    if (kind === "ANIM") throw new Refusal("This WebP file is animated: open one picture.");
    if (kind === "EXIF") {
      const skip = text(bytes, place + 8, 4) === "Exif" ? 6 : 0;
      turned ||= exifOrientation(bytes.subarray(place + 8 + skip, end)) > 1;
    } else if (kind === "ICCP") {
      profile = true;
    } else {
      const chunk = bytes.slice(place, padded);
      if (kind === "VP8X") chunk[8] &= ~0x28; // neither a profile nor EXIF any more
      kept.push(chunk);
    }
    place = padded;
  }
  const head = bytes.slice(0, 12);
  const body = join(kept);
  new DataView(head.buffer).setUint32(4, body.length + 4, true);
  return { bytes: join([head, body]), type: "image/webp", notes: notesOf(turned, profile) };
}
