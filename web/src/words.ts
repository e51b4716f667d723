// How numbers and results are written.

import type { Summary } from "./mask.js";
import type { PageFacts, Score } from "./messages.js";

export const DISCLAIMER = "For research only. Not a medical device.";

export function percent(fraction: number): string {
  if (fraction > 0 && fraction < 0.001) return "< 0.1 %";
  return `${(100 * fraction).toFixed(1)} %`;
}

export function pixels(count: number): string {
  return `${count.toLocaleString("en-US")} px`;
}

function three(value: number): string {
  return value.toFixed(3);
}

export function scoreWords({ dataset, images, dice, low, high }: Score): string {
  const interval = low === null || high === null ? "" : ` (95 % interval ${three(low)} to ${three(high)})`;
  return `mean Dice ${three(dice)}${interval} on ${dataset}, ${images.toLocaleString("en-US")} images`;
}

/** How good the model is, as one sentence. */
export function qualityWords(facts: PageFacts): string {
  if (!facts.scores.length) return "How good this model is has not been measured.";
  return `How good it is: ${facts.scores.map(scoreWords).join("; ")}.`;
}

export function resultWords(summary: Summary, threshold: number): string {
  if (!summary.area) {
    return `No polyp above a probability of ${threshold.toFixed(2)}. That is no proof of absence.`;
  }
  const count = summary.regions.length;
  return `Polyp area ${percent(summary.fraction)} of the frame, ${count === 1 ? "1 lesion" : `${count} lesions`}.`;
}

export function csv(rows: readonly (readonly (string | number)[])[]): string {
  const cell = (value: string | number): string => {
    const words = String(value);
    return /[",\r\n]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
  };
  return rows.map((row) => row.map(cell).join(",") + "\n").join("");
}
