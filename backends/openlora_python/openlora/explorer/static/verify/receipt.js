// The receipt, schema 0x0101: leaf, EIP-712 digest and signer (openlora/attribution/receipt.py).

import { secp256k1 } from '../vendor/noble/curves/secp256k1.js';
import { keccak_256 } from '../vendor/noble/hashes/sha3.js';
import { Invalid, concat, fromHex, hex, utf8, word } from './bytes.js';

const BYTES = 0;
/** Name in the document, type in the schema, bits (BYTES: 32 bytes), in the order of the schema. */
export const FIELDS = [
  ['log_id', 'bytes32 logId', BYTES],
  ['seq', 'uint64 seq', 64],
  ['request_id', 'bytes32 requestId', BYTES],
  ['status', 'uint8 status', 8],
  ['base_model', 'bytes32 baseModel', BYTES],
  ['runtime_hash', 'bytes32 runtimeHash', BYTES],
  ['adapters_hash', 'bytes32 adaptersHash', BYTES],
  ['terms_hash', 'bytes32 termsHash', BYTES],
  ['registry_ref', 'bytes32 registryRef', BYTES],
  ['prompt_commit', 'bytes32 promptCommit', BYTES],
  ['output_commit', 'bytes32 outputCommit', BYTES],
  ['in_tokens', 'uint32 inTokens', 32],
  ['out_tokens', 'uint32 outTokens', 32],
  ['started_at', 'uint64 startedAt', 64],
  ['ended_at', 'uint64 endedAt', 64],
  ['price', 'uint128 price', 128],
  ['payment_ref', 'bytes32 paymentRef', BYTES],
  ['compute_proof', 'bytes32 computeProof', BYTES],
];

const SCHEMA = 0x0101n;
const HALF_ORDER = 0x7fffffffffffffffffffffffffffffff5d576e7357a4501ddfe92f46681b20a0n;
const keccak = (...parts) => keccak_256(concat(...parts));
const TYPE_HASH = keccak(utf8(`Receipt(uint16 schema,${FIELDS.map(([, type]) => type).join(',')})`));
const DOMAIN = ['EIP712Domain(string name,string version,bytes32 salt)', 'OpenLoRA Receipt', '1'];

/** Bytes of a 0x string of lower-case hex digits. */
export function documentBytes(value, field, length) {
  if (typeof value !== 'string' || !/^0x(?:[0-9a-f]{2})*$/.test(value)) {
    throw new Invalid('is not 0x and lower-case hex digits', field);
  }
  if (value.length !== 2 + 2 * length) throw new Invalid(`is not ${length} bytes`, field);
  return fromHex(value.slice(2));
}

/** The 608 bytes of the fields in a document: the ABI encoding of the struct. Invalid: a value is not of its type. */
export function encodeLeaf(document) {
  const words = FIELDS.map(([name, , bits]) => {
    const value = document[name];
    if (bits === BYTES) return documentBytes(value, name, 32);
    if (typeof value !== 'bigint' || value < 0n || value >> BigInt(bits) !== 0n) {
      throw new Invalid(`is not an unsigned integer of ${bits} bits`, name);
    }
    return word(value);
  });
  if (document.status < 1n || document.status > 4n) throw new Invalid('is not one of 1, 2, 3, 4', 'status');
  return concat(word(SCHEMA), ...words);
}

/** keccak256(0x1901 ‖ domain separator ‖ keccak256(type hash ‖ leaf)): members are encoded as in the leaf. */
export function receiptDigest(logId, leaf) {
  const separator = keccak(...DOMAIN.map((part) => keccak(utf8(part))), logId);
  return keccak(new Uint8Array([0x19, 0x01]), separator, keccak(TYPE_HASH, leaf));
}

/** The checksummed address that made a signature r ‖ s ‖ v over a digest. Only v 27 or 28 and the lower s count. */
export function recoverSigner(digest, signature) {
  if (signature.length !== 65 || (signature[64] !== 27 && signature[64] !== 28)) {
    throw new Invalid('is not 64 bytes and then 27 or 28', 'signature');
  }
  if (BigInt(`0x${hex(signature.subarray(32, 64))}`) > HALF_ORDER) {
    throw new Invalid('has the higher s of two', 'signature');
  }
  let point;
  try {
    const parsed = secp256k1.Signature.fromBytes(signature.slice(0, 64), 'compact');
    point = parsed.addRecoveryBit(signature[64] - 27).recoverPublicKey(digest);
  } catch {
    throw new Invalid('fits no key', 'signature');
  }
  return checksumAddress(`0x${hex(keccak(point.toBytes(false).subarray(1)).subarray(12))}`);
}

/** EIP-55. */
export function checksumAddress(address) {
  const digits = address.slice(2).toLowerCase();
  const hash = hex(keccak(utf8(digits)));
  return `0x${Array.from(digits, (digit, place) => (hash[place] >= '8' ? digit.toUpperCase() : digit)).join('')}`;
}
