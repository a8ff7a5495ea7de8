// Proof files as the library writes them (PROOFS: a directory that the test in Python made), and changed in every way.

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import test from 'node:test';

import { parseJson } from '../../backends/openlora_python/openlora/explorer/static/verify/json.js';
import { verifyProof } from '../../backends/openlora_python/openlora/explorer/static/verify/verify.js';

const directory = process.env.PROOFS;
const bytesOf = (name) => new Uint8Array(readFileSync(path.join(directory, name)));
const [mine, strangers] = [bytesOf('mine.tlog-proof'), bytesOf('strangers.tlog-proof')];
const key = readFileSync(path.join(directory, 'mine.pub'), 'utf8').trim();
const strangersKey = readFileSync(path.join(directory, 'strangers.pub'), 'utf8').trim();
const text = Buffer.from(mine).toString();
const encode = (changed) => new Uint8Array(Buffer.from(changed));

/** The proof with its receipt's JSON text replaced. */
const withReceipt = (json) => encode(text.replace(/^extra .*$/m, `extra ${Buffer.from(json).toString('base64')}`));
const receiptText = Buffer.from(/^extra (.*)$/m.exec(text)[1], 'base64').toString();

function refused(bytes, what) {
  const found = verifyProof(bytes, [key]);
  assert.ok(['tampered', 'unreadable'].includes(found.outcome), `${what}: ${found.outcome}`);
  assert.ok(found.fault.message.length > 0 && found.steps.some((step) => step.state === 'failed'), what);
  return found;
}

test('a proof is verified against its pinned key, every step', () => {
  const found = verifyProof(mine, [strangersKey, key]);
  assert.equal(found.outcome, 'verified');
  assert.ok(found.steps.every((step) => step.state === 'passed'));
  assert.equal(found.steps.length, 9);
});

test('without the key of its log a proof is consistent and no more', () => {
  for (const pinned of [[], [strangersKey]]) assert.equal(verifyProof(mine, pinned).outcome, 'unknown');
  assert.equal(verifyProof(strangers, [key]).outcome, 'unknown');
});

test('every byte counts', () => {
  for (let place = 0; place < mine.length; place += 1) refused(mine.with(place, mine[place] ^ 1), `byte ${place}`);
});

test('a proof cut short, grown, or with lines lost, doubled or swapped', () => {
  for (let length = 0; length < mine.length; length += 97) refused(mine.subarray(0, length), `${length} bytes`);
  refused(encode(`${text}\n`), 'a line more');
  refused(encode(`\ufeff${text}`), 'a byte order mark');
  refused(encode(text.replaceAll('\n', '\r\n')), 'other line ends');
  const lines = text.split('\n');
  for (let place = 0; place < lines.length - 1; place += 1) {
    refused(encode(lines.toSpliced(place, 1).join('\n')), `without line ${place}`);
    const next = lines[place + 1];
    if (lines[place] !== next) refused(encode(lines.toSpliced(place, 2, next, lines[place]).join('\n')), `lines ${place} swapped`);
    const doubled = lines.toSpliced(place, 0, lines[place]).join('\n');
    // The signature line twice is the same statement twice.
    if (!lines[place].startsWith('\u2014 ')) refused(encode(doubled), `line ${place} twice`);
  }
});

test('every field of the receipt counts, and the fault names it', () => {
  const original = JSON.parse(receiptText);
  const names = { leaf: 'leaf', signer: 'signer', schema: 'schema', log: 'log' };
  for (const [name, value] of Object.entries(original)) {
    const others = [undefined, null, 'x', [], {}, -1, 1.5];
    if (typeof value === 'number') others.push(value + 1, String(value));
    if (typeof value === 'string') others.push(value.slice(0, -1) + (value.endsWith('0') ? '1' : '0'), value.toUpperCase());
    for (const other of others) {
      const found = refused(withReceipt(JSON.stringify({ ...original, [name]: other })), `${name}: ${other}`);
      if (names[name] !== undefined && typeof other === 'string') assert.ok([names[name], 'log_id'].includes(found.fault.field));
    }
  }
  refused(withReceipt(JSON.stringify({ ...original, more: 1 })), 'a field more');
  refused(withReceipt(receiptText.replace('"seq"', '"seq":0,"seq"')), 'a field twice');
});

test('every value in the blobs counts', () => {
  const original = JSON.parse(receiptText);
  const visit = (value, change) => {
    if (value !== null && typeof value === 'object') {
      for (const inner of Object.keys(value)) visit(value[inner], (other) => change(Array.isArray(value) ? value.with(inner, other) : { ...value, [inner]: other }));
      return;
    }
    const blobs = change(typeof value === 'number' ? value + 1 : `${value}0`);
    refused(withReceipt(JSON.stringify({ ...original, blobs })), JSON.stringify(blobs));
  };
  visit(original.blobs, (blobs) => blobs);
});

test('parts of another log’s proof do not fit', () => {
  const other = Buffer.from(strangers).toString();
  const head = (proof) => proof.slice(0, proof.indexOf('\n\n') + 2);
  refused(encode(head(text) + other.slice(head(other).length)), 'its checkpoint');
  const changed = JSON.parse(receiptText);
  changed.log = strangersKey;
  assert.equal(refused(withReceipt(JSON.stringify(changed)), 'its key line').fault.field, 'log_id');
  refused(encode(text.replace(/^extra .*$/m, /^extra .*$/m.exec(other)[0])), 'its receipt');
});

test('a receipt is read whatever the order and spacing of its JSON', () => {
  const reversed = Object.fromEntries(Object.entries(JSON.parse(receiptText)).reverse());
  assert.equal(verifyProof(withReceipt(JSON.stringify(reversed, null, 2)), [key]).outcome, 'verified');
  assert.equal(parseJson(receiptText).seq, BigInt(JSON.parse(receiptText).seq));
});

test('other files are not proofs', () => {
  for (const other of [new Uint8Array(0), new Uint8Array([0xff, 0xfe, 0]), encode('{}'), encode(receiptText), new Uint8Array((1 << 20) + 1)]) {
    assert.equal(verifyProof(other, [key]).outcome, 'unreadable');
  }
});
