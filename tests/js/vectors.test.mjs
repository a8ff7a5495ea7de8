// The page's verifier gives the bytes of the frozen vectors, which the library and the contracts give as well.

import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import test from 'node:test';

import { fromHex, hex, Invalid } from '../../backends/openlora_python/openlora/explorer/static/verify/bytes.js';
import { checkBlobs, checkPrice } from '../../backends/openlora_python/openlora/explorer/static/verify/blobs.js';
import { canonical, parseJson } from '../../backends/openlora_python/openlora/explorer/static/verify/json.js';
import { parseLogKey } from '../../backends/openlora_python/openlora/explorer/static/verify/log_key.js';
import { checksumAddress, encodeLeaf, receiptDigest, recoverSigner } from '../../backends/openlora_python/openlora/explorer/static/verify/receipt.js';
import { attestationDigest, rewardLeaf, rewardRoot } from '../../backends/openlora_python/openlora/explorer/static/verify/rewards.js';
import { checkInclusion, leafHash } from '../../backends/openlora_python/openlora/explorer/static/verify/tree.js';

const read = (name) => readFileSync(new URL(`../vectors/${name}`, import.meta.url), 'utf8');
const receiptVector = parseJson(read('receipt_v1.json')).expected;

test('receipt_v1: leaf, its hash, EIP-712 digest and signer', () => {
  const leaf = encodeLeaf(receiptVector.document);
  assert.equal(hex(leaf), receiptVector.leaf);
  assert.equal(hex(leafHash(leaf)), receiptVector.leaf_hash);
  const digest = receiptDigest(fromHex(receiptVector.log_id), leaf);
  assert.equal(hex(digest), receiptVector.eip712_digest);
  assert.equal(recoverSigner(digest, fromHex(receiptVector.signature)), receiptVector.document.signer);
});

test('receipt_v1: log id, blobs and price', () => {
  assert.equal(parseLogKey(receiptVector.log_key).id, receiptVector.log_id);
  checkBlobs(receiptVector.document);
  checkPrice(receiptVector.document);
  for (const [name, tag] of [['runtime', 'runtime'], ['adapters', 'adapters'], ['terms', 'terms']]) {
    const bytes = Buffer.from(`openlora/${tag}/v1${canonical(receiptVector.document.blobs[name], name)}`);
    assert.equal(bytes.toString('hex'), receiptVector.blobs[name]);
  }
});

test('a signature with the higher s, another v, or another length is refused', () => {
  const digest = fromHex(receiptVector.eip712_digest);
  const signature = fromHex(receiptVector.signature);
  const order = 0xfffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141n;
  const high = order - BigInt(`0x${hex(signature.subarray(32, 64))}`);
  const twin = fromHex(hex(signature.subarray(0, 32)) + high.toString(16).padStart(64, '0') + (signature[64] === 27 ? '1c' : '1b'));
  for (const wrong of [twin, signature.with(64, 0), signature.with(64, 29), signature.subarray(0, 64), new Uint8Array(65)]) {
    assert.throws(() => recoverSigner(digest, wrong), Invalid);
  }
});

// They are not ours: who has them names them, or they lie beside the checkout.
const publicFile = process.env.OPENLORA_RFC6962_VECTORS || new URL('../../../shared/vectors/rfc6962/vectors.json', import.meta.url);
const skip = existsSync(publicFile) ? false : 'OPENLORA_RFC6962_VECTORS names no vectors.json of transparency-dev/merkle';

test('RFC 6962: inclusion vectors, valid and not', { skip }, () => {
  const vectors = Object.entries(JSON.parse(readFileSync(publicFile))).filter(([name]) => name.startsWith('inclusion'));
  assert.ok(vectors.length >= 50);
  const bytes = (text) => new Uint8Array(Buffer.from(text ?? '', 'base64'));
  for (const [name, { leafHash: leaf, leafIdx, treeSize, proof, root, wantErr }] of vectors) {
    const check = () => checkInclusion(bytes(leaf), BigInt(leafIdx), BigInt(treeSize), (proof ?? []).map(bytes), bytes(root));
    if (wantErr) assert.throws(check, Invalid, name);
    else assert.doesNotThrow(check, name);
  }
});

test('tree_v1: inclusion in our own trees', () => {
  const { leaves, roots, inclusion } = JSON.parse(read('tree_v1.json'));
  for (const { index, size, proof } of inclusion) {
    checkInclusion(leafHash(fromHex(leaves[index])), BigInt(index), BigInt(size), proof.map(fromHex), fromHex(roots[size]));
  }
});

test('checksummed addresses (EIP-55)', () => {
  for (const address of ['0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed', '0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359', '0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb']) {
    assert.equal(checksumAddress(address.toLowerCase()), address);
  }
});

test('JSON: what JSON.parse would round, repeat or forgive', () => {
  assert.equal(parseJson('{"price": 340282366920938463463374607431768211455}').price, (1n << 128n) - 1n);
  for (const text of ['{"a":1,"a":2}', '{"a":1.0}', '1e3', '01', '[1,]', '[,1]', '{"a":1,}', '{"a" 1}', '"\u0001"', 'NaN', '{} {}', '', '[', '{"a"', '"\\x"', `${'['.repeat(34)}${']'.repeat(34)}`]) {
    assert.throws(() => parseJson(text), Invalid, text);
  }
  assert.equal(Object.getPrototypeOf(parseJson('{"__proto__": {"a": 1}}')), null);
});

test('RFC 8785: order by UTF-16 units, shortest escapes, nothing that is not Unicode', () => {
  const value = parseJson('{"\\u20ac": 1, "\\r": "\\u000f\\n\\"\\\\\\/", "\\ud83d\\ude02": [true, null], "1": {"b": -2, "a": []}, "\\ufb33": 0}');
  assert.equal(canonical(value, 'blob'), '{"\\r":"\\u000f\\n\\"\\\\/","1":{"a":[],"b":-2},"€":1,"😂":[true,null],"\ufb33":0}');
  assert.throws(() => canonical(parseJson('"\\ud800"'), 'blob'), Invalid);
  assert.throws(() => canonical(1n << 53n, 'blob'), Invalid);
});

test('settlement_v1: reward leaves and proofs, attestation digests', () => {
  const { chain_id: chain, distributor, reward_trees: trees, attestations } = JSON.parse(read('settlement_v1.json'));
  const plain = (text) => text.slice(2);
  for (const { root, accounts } of trees) {
    for (const { account, cumulative, leaf, proof } of accounts) {
      const own = rewardLeaf(BigInt(chain), distributor, account, BigInt(cumulative));
      assert.equal(hex(own), plain(leaf));
      assert.equal(hex(rewardRoot(own, proof.map(plain))), plain(root));
    }
  }
  for (const { epoch, root, total, allocations, digest } of attestations) {
    const parts = allocations.map((one) => ({ log: plain(one.log_id), from: BigInt(one.from), to: BigInt(one.to), amount: BigInt(one.amount) }));
    const given = { epoch: BigInt(epoch), root: plain(root), total: BigInt(total), allocations: parts };
    assert.equal(hex(attestationDigest(BigInt(chain), distributor, given)), plain(digest));
  }
});
