// Numbers and times as people read them. Integers are BigInts, so nothing is rounded.

/** Digits in groups of three. */
export const grouped = (integer) => String(integer).replace(/\B(?=(?:\d{3})+$)/g, '\u202f');

/** UTC, to the second, from seconds since 1970. */
export function time(seconds) {
  const date = new Date(Number(seconds) * 1000);
  if (Number.isNaN(date.getTime())) return `second ${seconds}`;
  return `${date.toISOString().slice(0, 19).replace('T', ' ')} UTC`;
}

/** A weight in 1e-6 units as a decimal number. */
export function weight(millionths) {
  const size = millionths < 0n ? -millionths : millionths;
  const fraction = (size % 1_000_000n).toString().padStart(6, '0').replace(/0+$/, '');
  return `${millionths < 0n ? '\u2212' : ''}${size / 1_000_000n}${fraction ? `.${fraction}` : ''}`;
}

/** Parts per million as percent. */
export const percent = (ppm) => `${weight(BigInt(ppm) * 100n)}\u202f%`;
