// A proof file, C2SP tlog-proof: the receipt's document, its place in the tree, the path, and a checkpoint.

import { Invalid, fromBase64 } from './bytes.js';

export const FIRST_LINE = 'c2sp.org/tlog-proof@v1';
export const MAX_BYTES = 1 << 20;
const MAX_PATH = 63;

/** The text of a file's bytes. Invalid: too large, or not UTF-8. */
export function proofText(bytes) {
  if (bytes.length > MAX_BYTES) throw new Invalid(`has ${bytes.length} bytes; a proof has a few thousand`, 'file');
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new Invalid('is not text in UTF-8', 'file');
  }
}

/** {extra, index, path, checkpoint}: the receipt's JSON text, a BigInt, hashes, the signed note. */
export function parseProof(text) {
  const end = text.indexOf('\n\n');
  if (end < 0) throw new Invalid('has no empty line before its checkpoint', 'file');
  const [first, extra, index, ...hashes] = text.slice(0, end).split('\n');
  if (first !== FIRST_LINE) throw new Invalid(`does not begin with ${FIRST_LINE}`, 'file');
  if (!extra?.startsWith('extra ')) throw new Invalid('has no receipt in its second line (extra …)', 'file');
  const number = /^index (0|[1-9][0-9]{0,18})$/.exec(index ?? '');
  if (number === null) throw new Invalid('has no index in its third line', 'file');
  if (hashes.length > MAX_PATH) throw new Invalid(`has more than ${MAX_PATH} hashes`, 'inclusion');
  const path = hashes.map((hash) => fromBase64(hash, 'inclusion'));
  return {
    extra: proofText(fromBase64(extra.slice('extra '.length), 'receipt')),
    index: BigInt(number[1]),
    path,
    checkpoint: text.slice(end + 2),
  };
}
