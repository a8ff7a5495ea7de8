#!/usr/bin/env node
// Writes tests/vectors/settlement_v1.json with viem and OpenZeppelin's merkle-tree, which share no code with ours.
//   node vectors.mjs [file]
// The file is frozen: the same bytes come out as long as nothing that is hashed or signed has changed.
import { createHash } from "node:crypto";
import { writeFileSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { StandardMerkleTree } from "@openzeppelin/merkle-tree";
import { encodeAbiParameters, getContractAddress, hashDomain, hashTypedData, keccak256, toHex } from "viem";
import { privateKeyToAccount } from "viem/accounts";

const here = path.dirname(fileURLToPath(import.meta.url));
const file = process.argv[2] ?? path.join(here, "../tests/vectors/settlement_v1.json");

const sha256 = (...parts) => {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(part);
  return `0x${hash.digest("hex")}`;
};
const word = (label) => keccak256(toHex(label));
const person = (label) => privateKeyToAccount(word(`openlora test key: ${label}`));
const keyOf = (label) => word(`openlora test key: ${label}`);
const bytesOf = (hex) => Buffer.from(hex.slice(2), "hex");

const chainId = 31337;
const deployer = person("deployer").address;
const [attributionLog, token, distributor] = [0n, 1n, 2n].map((nonce) => getContractAddress({ from: deployer, nonce }));

const LOG_INIT = ["uint16", "bytes32", "bytes32", "address", "bytes32", "bytes32", "bytes32"].map((type) => ({ type }));
const REGISTRATION = {
  Registration: [
    { name: "logId", type: "bytes32" },
    { name: "owner", type: "address" },
    { name: "submitter", type: "address" },
    { name: "payee", type: "address" },
  ],
};
const logDomain = { name: "OpenLoRA Log", version: "1", chainId, verifyingContract: attributionLog };

async function registeredLog(label, predecessor) {
  const signer = person(`${label} signer`);
  const init = {
    origin_hash: sha256("openlora/origin/v1", `example.org/${label}`),
    signer: signer.address,
    checkpoint_key: word(`${label} checkpoint key`),
    nonce: word(`${label} nonce`),
    predecessor,
  };
  const values = [0x0301, `0x${"00".repeat(32)}`, ...Object.values(init)];
  const logId = sha256(bytesOf(encodeAbiParameters(LOG_INIT, values)));
  const [owner, submitter, payee] = ["owner", "submitter", "payee"].map((role) => person(`${label} ${role}`).address);
  const typed = {
    domain: logDomain,
    types: REGISTRATION,
    primaryType: "Registration",
    message: { logId, owner, submitter, payee },
  };
  return {
    origin: `example.org/${label}`,
    init,
    signer_private_key: keyOf(`${label} signer`),
    log_id: logId,
    owner,
    submitter,
    payee,
    registration_digest: hashTypedData(typed),
    registration_signature: await signer.signTypedData(typed),
  };
}

const ALLOCATION = [
  { name: "logId", type: "bytes32" },
  { name: "from", type: "uint64" },
  { name: "to", type: "uint64" },
  { name: "amount", type: "uint256" },
];
const ATTESTATION = {
  Attestation: [
    { name: "epoch", type: "uint256" },
    { name: "root", type: "bytes32" },
    { name: "total", type: "uint256" },
    { name: "allocations", type: "Allocation[]" },
  ],
  Allocation: ALLOCATION,
};
const rewardDomain = { name: "OpenLoRA Rewards", version: "1", chainId, verifyingContract: distributor };
const attestors = ["attestor 1", "attestor 2", "attestor 3"]
  .map((label) => ({ private_key: keyOf(label), account: person(label) }))
  .sort((one, other) => (one.account.address.toLowerCase() < other.account.address.toLowerCase() ? -1 : 1));

async function attested(about, epoch, root, total, allocations) {
  const typed = {
    domain: rewardDomain,
    types: ATTESTATION,
    primaryType: "Attestation",
    message: { epoch, root, total, allocations },
  };
  const signatures = [];
  for (const { private_key, account } of attestors) {
    signatures.push({ private_key, signer: account.address, signature: await account.signTypedData(typed) });
  }
  return {
    about,
    epoch: Number(epoch),
    root,
    total: String(total),
    allocations: allocations.map(({ logId, from, to, amount }) => ({
      log_id: logId,
      from: String(from),
      to: String(to),
      amount: String(amount),
    })),
    digest: hashTypedData(typed),
    signatures,
  };
}

/** The tree of amounts that are above zero; without any, the root is zero. */
function rewardTree(about, amounts) {
  const rows = amounts.map(([account, amount]) => [String(chainId), distributor, account, String(amount)]);
  if (rows.length === 0) return { about, root: `0x${"00".repeat(32)}`, accounts: [] };
  const tree = StandardMerkleTree.of(rows, ["uint256", "address", "address", "uint256"]);
  const accounts = rows.map((row, place) => ({
    account: row[2],
    cumulative: row[3],
    leaf: tree.leafHash(row),
    proof: tree.getProof(place),
  }));
  return { about, root: tree.root, accounts };
}

const zero = `0x${"00".repeat(32)}`;
const first = await registeredLog("log1", zero);
const second = await registeredLog("log2", first.log_id);
const [lower, higher] = [first, second].sort((one, other) => (one.log_id < other.log_id ? -1 : 1));

const earners = Array.from({ length: 7 }, (_, place) => person(`earner ${place}`).address);
const epoch1 = rewardTree(
  "after epoch 1: 7 accounts, 1000 in all",
  [1n, 399n, 100n, 250n, 50n, 75n, 125n].map((amount, place) => [earners[place], amount]),
);
const one = rewardTree("a single account: the root is its leaf", [[earners[0], 1n]]);
const two = rewardTree("two accounts, the greatest amounts", [[earners[1], 10n ** 36n], [earners[2], 2n ** 120n - 1n]]);
const none = rewardTree("no account: the root is zero", []);

const allocation = (log, from, to, amount) => ({ logId: log.log_id, from, to, amount });
const attestations = [
  await attested("the first epoch, as reward_trees[0] pays it", 1n, epoch1.root, 1000n, [
    allocation(lower, 0n, 10n, 700n),
    allocation(higher, 0n, 3n, 300n),
  ]),
  await attested("no allocations: the hash of no bytes stands for them", 2n, two.root, 1000n, []),
  await attested("the greatest values", 4294967295n, zero, 2n ** 120n - 1n, [
    allocation(higher, 2n ** 64n - 2n, 2n ** 64n - 1n, 2n ** 120n - 1n),
  ]),
];

const modelTerms = '{"datasets":[],"digest":"' + word("model").slice(2) + '","input":"1000000000000000000","output":"3","owner":"' + first.owner + '"}';
const parameters =
  '{"adapter_ppm":400000,"base_ppm":200000,"data_ppm":200000,"max_age":86400,"node_ppm":150000,"platform":"' +
  person("platform").address +
  '","platform_ppm":50000,"schema":1}';

const vectors = {
  about: [
    "Settlement version 1, frozen; docs/settlement.md, made by contracts/vectors.mjs with viem and @openzeppelin/merkle-tree. Keys are for tests only.",
    "Bytes are 0x and lower-case hex; addresses are checksummed; amounts and sizes are decimal strings, epochs and the chain id are numbers.",
    "The contracts are where `deployer` creates them with its nonces 0 (AttributionLog), 1 (RewardToken), 2 (RewardDistributor).",
    "logs: init is hashed to log_id as sha256(abi.encode(uint16 0x0301, bytes32 0, origin_hash, signer, checkpoint_key, nonce, predecessor)); registration_* is the EIP-712 Registration, signed r, s, v by signer_private_key.",
    "reward_trees: leaf = keccak256(keccak256(abi.encode(chain_id, distributor, account, cumulative))), proof from the leaf upwards.",
    "attestations: digest is the EIP-712 Attestation; signatures ascend by signer, whose private keys are given.",
    "documents: hash = sha256(tag, document), without a separator.",
  ],
  chain_id: chainId,
  deployer,
  attribution_log: attributionLog,
  reward_token: token,
  distributor,
  log_domain_separator: hashDomain({ domain: logDomain, types: domainTypes() }),
  rewards_domain_separator: hashDomain({ domain: rewardDomain, types: domainTypes() }),
  logs: [first, second],
  reward_trees: [epoch1, one, two, none],
  attestations,
  documents: [
    { tag: "openlora/model-terms/v1", document: modelTerms, hash: sha256("openlora/model-terms/v1", modelTerms) },
    { tag: "openlora/parameters/v1", document: parameters, hash: sha256("openlora/parameters/v1", parameters) },
  ],
};
writeFileSync(file, `${JSON.stringify(vectors, null, 1)}\n`);

function domainTypes() {
  return {
    EIP712Domain: [
      { name: "name", type: "string" },
      { name: "version", type: "string" },
      { name: "chainId", type: "uint256" },
      { name: "verifyingContract", type: "address" },
    ],
  };
}
