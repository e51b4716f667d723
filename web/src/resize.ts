// Pillow's bicubic filter with its integer arithmetic: the same bytes as Image.resize gives in Python.

export interface Size {
  width: number;
  height: number;
}

const FRACTION_BITS = 22;
const HALF = 1 << (FRACTION_BITS - 1);
const SUPPORT = 2;

/** Keys' cubic with a = -0.5, as Pillow's BICUBIC. */
function bicubic(x: number): number {
  const a = -0.5;
  const d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  if (d < 2) return (((d - 5) * d + 8) * d - 4) * a;
  return 0;
}

interface Weights {
  /** First source pixel of each target pixel. */
  first: Int32Array;
  /** How many source pixels it reads. */
  count: Int32Array;
  /** Their weights with 22 fractional bits, `stride` places per target pixel. */
  values: Int32Array;
  stride: number;
}

/** Weights of one axis: antialiased when shrinking (the filter widens), plain cubic when enlarging. */
function axisWeights(from: number, to: number): Weights {
  const scale = from / to;
  const widening = Math.max(scale, 1);
  const support = SUPPORT * widening;
  const stride = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(to);
  const count = new Int32Array(to);
  const values = new Int32Array(to * stride);
  const raw = new Float64Array(stride);
  for (let i = 0; i < to; i++) {
    const center = (i + 0.5) * scale;
    const low = Math.max(0, Math.trunc(center - support + 0.5));
    const high = Math.min(from, Math.trunc(center + support + 0.5));
    let sum = 0;
    for (let k = 0; k < high - low; k++) {
      raw[k] = bicubic((k + low - center + 0.5) * (1 / widening));
      sum += raw[k];
    }
    for (let k = 0; k < high - low; k++) {
      const weight = (sum === 0 ? raw[k] : raw[k] / sum) * (1 << FRACTION_BITS);
      values[i * stride + k] = Math.trunc(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    first[i] = low;
    count[i] = high - low;
  }
  return { first, count, values, stride };
}

function toByte(sum: number): number {
  const value = sum >> FRACTION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** Pixels of 3 or 4 channels, row by row -> RGB of another size; a fourth channel is left out. */
export function resizeBicubic(
  pixels: Uint8Array | Uint8ClampedArray,
  from: Size,
  to: Size,
  channels: 3 | 4,
): Uint8Array {
  return resizeRows(resizeColumns(pixels, from, to.width, channels), { width: to.width, height: from.height }, to.height);
}

function resizeColumns(
  pixels: Uint8Array | Uint8ClampedArray,
  from: Size,
  width: number,
  channels: 3 | 4,
): Uint8Array {
  const result = new Uint8Array(width * from.height * 3);
  if (width === from.width) {
    for (let i = 0, j = 0; j < result.length; i += channels, j += 3) {
      result[j] = pixels[i];
      result[j + 1] = pixels[i + 1];
      result[j + 2] = pixels[i + 2];
    }
    return result;
  }
  const { first, count, values, stride } = axisWeights(from.width, width);
  for (let y = 0; y < from.height; y++) {
    const row = y * from.width * channels;
    let target = y * width * 3;
    for (let x = 0; x < width; x++) {
      let red = HALF;
      let green = HALF;
      let blue = HALF;
      let source = row + first[x] * channels;
      const last = x * stride + count[x];
      for (let k = x * stride; k < last; k++, source += channels) {
        const weight = values[k];
        red += pixels[source] * weight;
        green += pixels[source + 1] * weight;
        blue += pixels[source + 2] * weight;
      }
      result[target++] = toByte(red);
      result[target++] = toByte(green);
      result[target++] = toByte(blue);
    }
  }
  return result;
}

function resizeRows(pixels: Uint8Array, from: Size, height: number): Uint8Array {
  if (height === from.height) return pixels;
  const { first, count, values, stride } = axisWeights(from.height, height);
  const length = from.width * 3;
  const result = new Uint8Array(length * height);
  const sums = new Int32Array(length);
  for (let y = 0; y < height; y++) {
    sums.fill(HALF);
    for (let k = 0; k < count[y]; k++) {
      const weight = values[y * stride + k];
      const source = (first[y] + k) * length;
      for (let x = 0; x < length; x++) sums[x] += pixels[source + x] * weight;
    }
    for (let x = 0; x < length; x++) result[y * length + x] = toByte(sums[x]);
  }
  return result;
}
