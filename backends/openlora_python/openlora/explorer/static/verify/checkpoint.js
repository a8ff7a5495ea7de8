// A C2SP checkpoint: a signed note of a log's origin, size and root, signed by the log's Ed25519 key.

import { ed25519 } from '../vendor/noble/curves/ed25519.js';
import { sha256 } from '../vendor/noble/hashes/sha2.js';
import { Invalid, concat, equal, fromBase64, utf8 } from './bytes.js';

const ED25519 = 1;
const SIGNATURE_LINE = /^\u2014 ([^\s+]+) ([A-Za-z0-9+/]+={0,2})$/u;

/** {origin, size, root, text, signatures} of a note. Invalid: it is not a checkpoint. */
export function parseCheckpoint(note) {
  const end = note.lastIndexOf('\n\n');
  if (end < 0 || !note.endsWith('\n')) throw new Invalid('is not a signed note', 'checkpoint');
  const text = note.slice(0, end + 1);
  const [origin, size, root, ...others] = text.slice(0, -1).split('\n');
  if (others.length > 0) throw new Invalid('has lines besides origin, size and root', 'checkpoint');
  if (!/^(?:0|[1-9][0-9]{0,18})$/.test(size ?? '')) throw new Invalid('has no size in its second line', 'checkpoint');
  const rootBytes = fromBase64(root ?? '', 'checkpoint');
  if (rootBytes.length !== 32) throw new Invalid('has no root of 32 bytes in its third line', 'checkpoint');
  const signatures = note.slice(end + 2, -1).split('\n').map(parseSignature);
  return { origin, size: BigInt(size), root: rootBytes, text, signatures };
}

function parseSignature(line) {
  const found = SIGNATURE_LINE.exec(line);
  if (found === null) throw new Invalid('has a line that is no signature', 'checkpoint');
  const bytes = fromBase64(found[2], 'checkpoint');
  if (bytes.length < 5) throw new Invalid('has a signature that is too short', 'checkpoint');
  return { name: found[1], keyId: bytes.slice(0, 4), signature: bytes.slice(4) };
}

/** Invalid unless the log's key signed the checkpoint; signatures of others (witnesses) are not looked at. */
export function checkCheckpoint(checkpoint, key) {
  if (checkpoint.origin !== key.origin) {
    throw new Invalid(`is of ${checkpoint.origin}, the log's origin is ${key.origin}`, 'checkpoint');
  }
  const keyId = sha256(concat(utf8(`${key.origin}\n`), new Uint8Array([ED25519]), key.checkpoint)).slice(0, 4);
  const own = checkpoint.signatures.filter((one) => one.name === key.origin && equal(one.keyId, keyId));
  if (own.length === 0) throw new Invalid("has no signature of the log's checkpoint key", 'checkpoint');
  const signed = (one) =>
    one.signature.length === 64 && ed25519.verify(one.signature, utf8(checkpoint.text), key.checkpoint, { zip215: false });
  if (!own.every(signed)) throw new Invalid("has a signature that the log's checkpoint key did not make", 'checkpoint');
}
