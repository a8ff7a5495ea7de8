// JSON as receipts use it: objects without repeated keys, arrays, strings, integers of any size (BigInt), true, false,
// null; no floats. And its canonical form, RFC 8785. JSON.parse would round a price above 2^53 without a word.

import { Invalid } from './bytes.js';

const MAX_DEPTH = 32;
const MAX_SAFE = 1n << 53n;
const TOKEN = /[\t\n\r ]*(?:([[\]{},:])|("(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*")|(-?(?:0|[1-9][0-9]*))(?![0-9.eE])|(true|false|null)|$)/uy;
const WORDS = { true: true, false: false, null: null };

/** The value of a JSON text. Invalid: it is not JSON, has a float, a key twice, or is nested too deep. */
export function parseJson(text) {
  const reader = new Reader(text);
  const value = readValue(reader, 0);
  if (!reader.done()) throw new Invalid(`not JSON at character ${reader.place}`, 'receipt');
  return value;
}

class Reader {
  constructor(text) {
    this.text = text;
    this.place = 0;
    this.advance();
  }

  advance() {
    TOKEN.lastIndex = this.place;
    const found = TOKEN.exec(this.text);
    if (found === null) throw new Invalid(`not JSON without floats at character ${this.place}`, 'receipt');
    this.place = TOKEN.lastIndex;
    [, this.mark, this.string, this.integer, this.word] = found;
  }

  done() {
    return this.mark === undefined && this.string === undefined && this.integer === undefined && this.word === undefined;
  }

  /** Go past a mark. */
  take(mark) {
    if (this.mark !== mark) throw new Invalid(`not JSON: no ${mark} before character ${this.place}`, 'receipt');
    this.advance();
  }

  takeString() {
    if (this.string === undefined) throw new Invalid(`not JSON: no string before character ${this.place}`, 'receipt');
    const value = JSON.parse(this.string);
    this.advance();
    return value;
  }
}

function readValue(reader, depth) {
  if (depth > MAX_DEPTH) throw new Invalid(`nested more than ${MAX_DEPTH} deep`, 'receipt');
  if (reader.mark === '{') return readObject(reader, depth);
  if (reader.mark === '[') return readArray(reader, depth);
  if (reader.string !== undefined) return reader.takeString();
  const { integer, word } = reader;
  if (integer === undefined && word === undefined) {
    throw new Invalid(`not JSON: no value before character ${reader.place}`, 'receipt');
  }
  reader.advance();
  return integer === undefined ? WORDS[word] : BigInt(integer);
}

function readObject(reader, depth) {
  const value = Object.create(null);
  reader.take('{');
  while (reader.mark !== '}') {
    if (Object.keys(value).length > 0) reader.take(',');
    const key = reader.takeString();
    if (Object.hasOwn(value, key)) throw new Invalid(`the key ${JSON.stringify(key)} is there twice`, 'receipt');
    reader.take(':');
    value[key] = readValue(reader, depth + 1);
  }
  reader.advance();
  return value;
}

function readArray(reader, depth) {
  const value = [];
  reader.take('[');
  while (reader.mark !== ']') {
    if (value.length > 0) reader.take(',');
    value.push(readValue(reader, depth + 1));
  }
  reader.advance();
  return value;
}

/** RFC 8785 of a value from `parseJson`. Invalid: integers from 2^53 on, or text that is not Unicode. */
export function canonical(value, field) {
  if (typeof value === 'bigint') {
    if (value >= MAX_SAFE || value <= -MAX_SAFE) throw new Invalid(`${value} has no canonical form`, field);
    return value.toString();
  }
  if (typeof value === 'string') {
    if (!value.isWellFormed()) throw new Invalid('has text that is not Unicode', field);
    return JSON.stringify(value);
  }
  if (Array.isArray(value)) return `[${value.map((item) => canonical(item, field)).join(',')}]`;
  if (value !== null && typeof value === 'object') {
    // RFC 8785 sorts by UTF-16 code units, which is what Array.prototype.sort does with strings.
    const members = Object.keys(value).sort();
    return `{${members.map((key) => `${canonical(key, field)}:${canonical(value[key], field)}`).join(',')}}`;
  }
  return JSON.stringify(value);
}
