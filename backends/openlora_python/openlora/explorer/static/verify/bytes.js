// Bytes, their hexadecimal and base64 forms (one form each, nothing lenient), and what is said when something is wrong.

/** Something does not verify. `field` names it, in the words of the receipt's document. */
export class Invalid extends Error {
  constructor(message, field) {
    super(message);
    this.name = 'Invalid';
    this.field = field;
  }
}

export const utf8 = (text) => new TextEncoder().encode(text);

export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');

/** Bytes of hex digits without 0x. */
export function fromHex(digits) {
  const bytes = new Uint8Array(digits.length / 2);
  for (let place = 0; place < bytes.length; place += 1) bytes[place] = parseInt(digits.slice(2 * place, 2 * place + 2), 16);
  return bytes;
}

export function concat(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

export const equal = (left, right) => left.length === right.length && left.every((byte, place) => byte === right[place]);

/** An unsigned integer (a BigInt below 2^256) as 32 bytes, big-endian. */
export const word = (integer) => fromHex(integer.toString(16).padStart(64, '0'));

/** Bytes of standard base64; Invalid unless `text` is the one form that encodes to. */
export function fromBase64(text, field) {
  let bytes = null;
  try {
    bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  } catch {
    throw new Invalid('is not base64', field);
  }
  if (toBase64(bytes) !== text) throw new Invalid('is not the one base64 form of its bytes', field);
  return bytes;
}

export function toBase64(bytes) {
  let text = '';
  for (let place = 0; place < bytes.length; place += 0x2000) {
    text += String.fromCharCode(...bytes.subarray(place, place + 0x2000));
  }
  return btoa(text);
}
