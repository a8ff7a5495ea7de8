// Verifies a proof file in the browser, from the file and the keys that the user pinned; asks no server anything.

import { Invalid, equal, fromHex } from './bytes.js';
import { checkBlobs, checkPrice, requireKeys } from './blobs.js';
import { checkCheckpoint, parseCheckpoint } from './checkpoint.js';
import { parseJson } from './json.js';
import { parseLogKey } from './log_key.js';
import { FIRST_LINE, parseProof, proofText } from './proof.js';
import { FIELDS, documentBytes, encodeLeaf, receiptDigest, recoverSigner } from './receipt.js';
import { checkInclusion, leafHash } from './tree.js';

const DOCUMENT_KEYS = ['schema', ...FIELDS.map(([name]) => name), 'leaf', 'signature', 'signer', 'blobs', 'log'];

/** What is checked, in this order. Each adds to `found` what later ones need, and returns what it saw. */
const STEPS = [
  ['file', 'The file is a proof', readFile],
  ['receipt', 'The receipt is whole, and its leaf follows from its fields', readReceipt],
  ['blobs', 'Runtime, adapters and terms are those that were hashed', readBlobs],
  ['price', 'The price follows from tokens and terms', readPrice],
  ['log', 'The log id follows from the key line', readLog],
  ['signature', 'The receipt is signed by the log’s receipt key', readSignature],
  ['inclusion', 'The receipt lies in the tree of the checkpoint', readInclusion],
  ['checkpoint', 'The checkpoint is signed by the log’s checkpoint key', readCheckpoint],
];

/**
 * Verify the bytes of a proof file against pinned key lines.
 *
 * {outcome, steps: [{id, title, state: 'passed' | 'failed' | 'skipped', detail}], fault: {field, message} | null,
 *  receipt, log, checkpoint}. Outcomes: 'verified' (a pinned key's log), 'unknown' (consistent, but no pinned key is its
 * log's: it proves nothing yet), 'tampered' (`fault` is the first thing that is wrong), 'unreadable' (not a proof file).
 */
export function verifyProof(bytes, pinnedLines) {
  const found = { bytes };
  const steps = [];
  let fault = null;
  for (const [id, title, run] of STEPS) {
    if (fault !== null) {
      steps.push({ id, title, state: 'skipped', detail: '' });
      continue;
    }
    try {
      steps.push({ id, title, state: 'passed', detail: run(found) });
    } catch (error) {
      if (!(error instanceof Invalid)) throw error;
      fault = { field: error.field, message: error.message };
      steps.push({ id, title, state: 'failed', detail: `${error.field}: ${error.message}` });
    }
  }
  const pinned = fault === null && pinnedLines.some((line) => parseLogKey(line).id === found.key.id);
  steps.push(pinStep(fault, pinned, pinnedLines.length));
  const broken = found.text?.startsWith(`${FIRST_LINE}\n`) ? 'tampered' : 'unreadable';
  const outcome = fault !== null ? broken : pinned ? 'verified' : 'unknown';
  return { outcome, steps, fault, receipt: found.receipt, log: found.key, checkpoint: found.checkpoint };
}

function pinStep(fault, pinned, count) {
  const title = 'The log is one whose key you pinned';
  if (fault !== null) return { id: 'pin', title, state: 'skipped', detail: '' };
  if (pinned) return { id: 'pin', title, state: 'passed', detail: '' };
  const none = count === 0 ? 'you have pinned no key' : `none of your ${count} pinned key${count === 1 ? '' : 's'} is of this log`;
  return { id: 'pin', title, state: 'failed', detail: `${none}; a proof that brings its own key proves nothing` };
}

function readFile(found) {
  found.text = proofText(found.bytes);
  found.proof = parseProof(found.text);
  return `${found.bytes.length} bytes, receipt ${found.proof.index}`;
}

function readReceipt(found) {
  const receipt = parseJson(found.proof.extra);
  requireKeys(receipt, DOCUMENT_KEYS, ['salts'], 'receipt');
  if (receipt.schema !== '0x0101') throw new Invalid('is not 0x0101', 'schema');
  found.leaf = encodeLeaf(receipt);
  if (!equal(documentBytes(receipt.leaf, 'leaf', 608), found.leaf)) {
    throw new Invalid('is not the encoding of the fields', 'leaf');
  }
  found.receipt = receipt;
  return `schema 0x0101, ${found.leaf.length} bytes`;
}

function readBlobs({ receipt }) {
  checkBlobs(receipt);
  const count = receipt.blobs.adapters.adapters.length;
  return count === 0 ? 'the base model alone' : `${count} adapter${count === 1 ? '' : 's'}`;
}

function readPrice({ receipt }) {
  checkPrice(receipt);
  return `${receipt.in_tokens} + ${receipt.out_tokens} tokens, price ${receipt.price}`;
}

function readLog(found) {
  found.key = parseLogKey(found.receipt.log);
  if (found.receipt.log_id !== `0x${found.key.id}`) {
    throw new Invalid(`is not ${found.key.id}, which the key line gives`, 'log_id');
  }
  return `${found.key.origin}, ${found.key.id}`;
}

function readSignature({ receipt, leaf, key }) {
  if (receipt.signer !== key.signer) throw new Invalid(`is not the log's ${key.signer}`, 'signer');
  const signature = documentBytes(receipt.signature, 'signature', 65);
  const signer = recoverSigner(receiptDigest(fromHex(key.id), leaf), signature);
  if (signer !== key.signer) throw new Invalid(`is by ${signer}, not by the log's ${key.signer}`, 'signature');
  return `by ${signer}`;
}

function readInclusion(found) {
  const { proof, receipt, leaf } = found;
  if (proof.index !== receipt.seq) throw new Invalid(`is ${proof.index}, the receipt's number ${receipt.seq}`, 'index');
  found.checkpoint = parseCheckpoint(proof.checkpoint);
  checkInclusion(leafHash(leaf), proof.index, found.checkpoint.size, proof.path, found.checkpoint.root);
  return `number ${proof.index} of ${found.checkpoint.size}, ${proof.path.length} hashes`;
}

function readCheckpoint({ checkpoint, key }) {
  checkCheckpoint(checkpoint, key);
  return `${checkpoint.origin}, size ${checkpoint.size}`;
}
