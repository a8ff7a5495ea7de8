// Rewards: an earner's leaf and its way to the root, and the digest that attestors sign (docs/settlement.md, 5).

import { keccak_256 } from '../vendor/noble/hashes/sha3.js';
import { concat, fromHex, hex, utf8, word } from './bytes.js';

const keccak = (...parts) => keccak_256(concat(...parts));
const typeHash = (type) => keccak(utf8(type));
const DOMAIN = 'EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)';
const ALLOCATION = 'Allocation(bytes32 logId,uint64 from,uint64 to,uint256 amount)';
const ATTESTATION = `Attestation(uint256 epoch,bytes32 root,uint256 total,Allocation[] allocations)${ALLOCATION}`;

/** keccak256(keccak256(abi.encode(chainId, distributor, account, cumulative))); BigInts and 0x addresses. */
export function rewardLeaf(chainId, distributor, account, cumulative) {
  return keccak(keccak(word(chainId), word(BigInt(distributor)), word(BigInt(account)), word(cumulative)));
}

/** Where a leaf and its siblings (hex digits) lead: each node is the hash of its children, the lower first. */
export function rewardRoot(leaf, siblings) {
  return siblings.map(fromHex).reduce((node, sibling) => (hex(node) < hex(sibling) ? keccak(node, sibling) : keccak(sibling, node)), leaf);
}

/** The EIP-712 digest of an epoch; hashes as hex digits without 0x, numbers as BigInts. */
export function attestationDigest(chainId, distributor, { epoch, root, total, allocations }) {
  const separator = keccak(typeHash(DOMAIN), typeHash('OpenLoRA Rewards'), typeHash('1'), word(chainId), word(BigInt(distributor)));
  const parts = allocations.map((one) =>
    keccak(typeHash(ALLOCATION), fromHex(one.log), word(one.from), word(one.to), word(one.amount)));
  const struct = keccak(typeHash(ATTESTATION), word(epoch), fromHex(root), word(total), keccak(...parts));
  return keccak(new Uint8Array([0x19, 0x01]), separator, struct);
}
