// RFC 6962: the hash of a leaf, and whether a path leads from it to a root.

import { sha256 } from '../vendor/noble/hashes/sha2.js';
import { Invalid, concat, equal } from './bytes.js';

export const leafHash = (leaf) => sha256(concat(new Uint8Array([0]), leaf));
const nodeHash = (left, right) => sha256(concat(new Uint8Array([1]), left, right));

/** Invalid unless `path` proves that `hash` is leaf `index` of the `size` leaves under `root` (BigInts; RFC 9162 2.1.3.2). */
export function checkInclusion(hash, index, size, path, root) {
  if (index < 0n || index >= size) throw new Invalid(`is ${index}, but the checkpoint has ${size} receipts`, 'index');
  let [place, last, current] = [index, size - 1n, hash];
  for (const sibling of path) {
    if (sibling.length !== 32) throw new Invalid('has a hash that is not 32 bytes', 'inclusion');
    if (last === 0n) throw new Invalid('has hashes too many', 'inclusion');
    if ((place & 1n) === 1n || place === last) {
      current = nodeHash(sibling, current);
      while ((place & 1n) === 0n && place !== 0n) {
        place >>= 1n;
        last >>= 1n;
      }
    } else {
      current = nodeHash(current, sibling);
    }
    place >>= 1n;
    last >>= 1n;
  }
  if (last !== 0n) throw new Invalid('has hashes too few', 'inclusion');
  if (root.length !== 32 || !equal(current, root)) throw new Invalid('does not lead to the root of the checkpoint', 'inclusion');
}
