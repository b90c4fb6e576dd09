"use strict";
/* The data of the page: base64, gzip, planes of bytes (sftmix/report/packing.py), and how numbers are shown. */

async function inflate(name) {
  const element = document.getElementById("data-" + name);
  if (element === null) return null;
  const packed = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function inflateJson(name) {
  return JSON.parse(new TextDecoder().decode(await inflate(name)));
}

/* Reads columns one after the other. */
class Columns {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }

  planes(size, number) {
    const found = new Float64Array(size);
    for (let k = 0; k < number; k++) {
      for (let i = 0; i < size; i++) found[i] += this.bytes[this.at + i] * 2 ** (8 * k);
      this.at += size;
    }
    return found;
  }

  counts(size) {
    return this.planes(size, 4);
  }

  /* The very decimals that were written: each is read as the text of a number would be. */
  decimals(size, digits) {
    const middle = 10 ** digits;
    const mantissas = this.planes(size, 2 * middle >= 65536 ? 3 : 2);
    const exponents = this.planes(size, 2);
    return mantissas.map((mantissa, i) => {
      const value = mantissa - middle;
      if (exponents[i] === 65535) return value === 0 ? NaN : value * Infinity;
      return Number(value + "e" + (exponents[i] - 32768));
    });
  }

  /* A function that gives the text at a place. */
  texts(size) {
    const lengths = this.counts(size);
    const starts = new Float64Array(size + 1);
    for (let i = 0; i < size; i++) starts[i + 1] = starts[i] + lengths[i];
    const { bytes, at } = this;
    const decoder = new TextDecoder();
    return (i) => decoder.decode(bytes.subarray(at + starts[i], at + starts[i + 1]));
  }
}

/* JSON has no word for these. */
function number(value) {
  if (value === "inf") return Infinity;
  if (value === "-inf") return -Infinity;
  return typeof value === "number" ? value : NaN;
}

/* A number with all of its digits, and no more. */
function show(value) {
  if (Number.isNaN(value)) return "unknown";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential() : String(value);
  return text.replaceAll("-", "−").replace("e+", "e");
}

/* At most so many significant digits: for axes and summaries. */
function brief(value, digits = 3) {
  return Number.isFinite(value) ? show(Number(value.toPrecision(digits))) : show(value);
}

function count(value) {
  return value.toLocaleString("en-US");
}

function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}
