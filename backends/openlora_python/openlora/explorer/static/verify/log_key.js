// A log's public key line, and the log id that follows from its fields (openlora/attribution/log_key.py).

import { sha256 } from '../vendor/noble/hashes/sha2.js';
import { Invalid, concat, fromHex, hex, utf8, word } from './bytes.js';
import { checksumAddress } from './receipt.js';

const LOG_INIT_SCHEMA = 0x0301n;
const ORIGIN = /^[\x21-\x2a\x2c-\x7e]{1,200}$/;
const LINE =
  /^openlora-log-v1 origin=(\S+) log=([0-9a-f]{64}) signer=(0x[0-9a-fA-F]{40}) checkpoint=([0-9a-f]{64}) nonce=([0-9a-f]{64}) predecessor=([0-9a-f]{64})$/;

/** The SHA-256 of the log's initialisation, 7 ABI words, whose own log id word is zero. */
export function logId({ origin, signer, checkpoint, nonce, predecessor }) {
  const originHash = sha256(concat(utf8('openlora/origin/v1'), utf8(origin)));
  const words = [word(LOG_INIT_SCHEMA), word(0n), originHash, word(BigInt(signer)), checkpoint, nonce, predecessor];
  return sha256(concat(...words));
}

/** A key from its line. Invalid: not such a line, or its log id is not that of its other fields. */
export function parseLogKey(line) {
  const found = typeof line === 'string' ? LINE.exec(line) : null;
  if (found === null) throw new Invalid('is not a log key line (openlora-log-v1 origin=… log=… …)', 'log');
  const [, origin, claimed, signer] = found;
  if (!ORIGIN.test(origin)) throw new Invalid('the origin has characters that no origin has', 'log');
  if (checksumAddress(signer) !== signer) throw new Invalid(`${signer} is not a checksummed address`, 'log');
  const [checkpoint, nonce, predecessor] = found.slice(4).map(fromHex);
  const key = { line, origin, signer, checkpoint, nonce, predecessor };
  const id = hex(logId(key));
  if (id !== claimed) throw new Invalid(`says log ${claimed}, its fields give ${id}`, 'log');
  return { ...key, id };
}
