// The blobs beside a receipt: their schemas, their hashes, and the price that follows (openlora/attribution/blobs.py).

import { sha256 } from '../vendor/noble/hashes/sha2.js';
import { Invalid, concat, equal, fromHex, hex, utf8, word } from './bytes.js';
import { canonical } from './json.js';
import { checksumAddress } from './receipt.js';

const TAGS = { runtime: 'openlora/runtime/v1', adapters: 'openlora/adapters/v1', terms: 'openlora/terms/v1' };
const PRICE_UNIT = 1_000_000n; // also the parts per million of a whole
const MAX_SAFE = 1n << 53n;
const ZERO = `0x${'0'.repeat(64)}`;

const integer = (low, high) => (value) => typeof value === 'bigint' && value >= low && value <= high;
const pattern = (expression) => (value) => typeof value === 'string' && expression.test(value);
const name = (value) => typeof value === 'string' && [...value].length <= 256;
const list = (item) => (value, path) => Array.isArray(value) && value.every((one, place) => check(item, one, `${path}[${place}]`));
const digest = pattern(/^[0-9a-f]{64}$/);
const address = pattern(/^0x[0-9a-fA-F]{40}$/);
const ppm = integer(0n, PRICE_UNIT);
const smallPrice = integer(0n, MAX_SAFE - 1n);
const decimalPrice = (value) => pattern(/^(?:0|[1-9][0-9]{0,30})$/)(value) && BigInt(value) <= 10n ** 30n;

const RUNTIME = { engine: name, version: name, dtype: name, quantization: name };
const ADAPTERS = {
  adapters: list({ digest, weight: integer(-10_000_000n, 10_000_000n) }),
  method: pattern(/^[a-z][a-z_]{0,31}$/),
};
/** A list whose parts per million are whole. */
const shares = (item) => (value, path) => list(item)(value, path) && value.reduce((sum, one) => sum + one.ppm, 0n) === PRICE_UNIT;
const DATASET = { id: name, digest, licence: name, ppm, contributors: shares({ address, ppm }) };
const declared = (value, path) => (Array.isArray(value) && value.length === 0) || shares(DATASET)(value, path);
const model = (price) => ({ digest, owner: address, input: price, output: price, datasets: declared });
const terms = (version, price) => ({
  price_version: integer(version, version),
  parameters: digest,
  base: model(price),
  adapters: list(model(price)),
});
const REGISTRY = {
  chain_id: smallPrice,
  registry: (value) => address(value) && checksumAddress(value) === value,
  block_number: smallPrice,
  block_hash: pattern(/^0x[0-9a-f]{64}$/),
};

/** True if `value` is of `shape` (a predicate, or an object of shapes: exactly those keys); Invalid names the place. */
function check(shape, value, path) {
  if (typeof shape === 'function') {
    if (!shape(value, path)) throw new Invalid('is not of its schema', path);
    return true;
  }
  if (value === null || typeof value !== 'object' || Array.isArray(value)) throw new Invalid('is not an object', path);
  requireKeys(value, Object.keys(shape), [], path);
  return Object.entries(shape).every(([key, inner]) => check(inner, value[key], `${path}.${key}`));
}

/** Invalid unless `value` is an object with exactly these keys; `optional` ones may be there. */
export function requireKeys(value, keys, optional, field) {
  if (value === null || typeof value !== 'object' || Array.isArray(value)) throw new Invalid('is not an object', field);
  const missing = keys.filter((key) => !Object.hasOwn(value, key));
  const unknown = Object.keys(value).filter((key) => !keys.includes(key) && !optional.includes(key));
  if (missing.length > 0) throw new Invalid(`lacks ${missing.join(', ')}`, field);
  if (unknown.length > 0) throw new Invalid(`has unknown ${unknown.join(', ')}`, field);
}

/** Every blob is of its schema, hashes to what the receipt names, and they fit each other. */
export function checkBlobs(document) {
  const { blobs } = document;
  const registered = document.registry_ref !== ZERO;
  requireKeys(blobs, [...Object.keys(TAGS), ...(registered ? ['registry'] : [])], [], 'blobs');
  check(RUNTIME, blobs.runtime, 'blobs.runtime');
  check(ADAPTERS, blobs.adapters, 'blobs.adapters');
  check(blobs.terms?.price_version === 2n ? terms(2n, decimalPrice) : terms(1n, smallPrice), blobs.terms, 'blobs.terms');
  for (const [kind, tag] of Object.entries(TAGS)) {
    const hash = sha256(concat(utf8(tag), utf8(canonical(blobs[kind], `blobs.${kind}`))));
    if (`0x${hex(hash)}` !== document[`${kind}_hash`]) {
      throw new Invalid(`is not what ${kind}_hash names`, `blobs.${kind}`);
    }
  }
  if (registered) checkRegistry(document);
  const base = blobs.terms.base.digest;
  if (`0x${base}` !== document.base_model) throw new Invalid(`are for base ${base}`, 'blobs.terms');
  const used = blobs.adapters.adapters.map((one) => one.digest);
  const priced = blobs.terms.adapters.map((one) => one.digest);
  if (used.join() !== priced.join()) throw new Invalid('name other adapters than were used', 'blobs.terms');
}

function checkRegistry({ blobs: { registry }, registry_ref: reference }) {
  check(REGISTRY, registry, 'blobs.registry');
  const preimage = concat(
    word(registry.chain_id),
    word(BigInt(registry.registry)),
    word(registry.block_number),
    fromHex(registry.block_hash.slice(2)),
  );
  if (!equal(sha256(preimage), fromHex(reference.slice(2)))) {
    throw new Invalid('is not what registry_ref names', 'blobs.registry');
  }
}

/** Invalid unless the price is what tokens and terms give: each model's part rounded down, nothing for errors. */
export function checkPrice({ status, price, in_tokens: input, out_tokens: output, blobs }) {
  const models = [blobs.terms.base, ...blobs.terms.adapters];
  const parts = models.map((one) => (input * BigInt(one.input) + output * BigInt(one.output)) / PRICE_UNIT);
  const due = status <= 2n ? parts.reduce((sum, part) => sum + part, 0n) : 0n;
  if (price !== due) throw new Invalid(`is ${price}, but tokens and terms give ${due}`, 'price');
}
