#!/usr/bin/env node
// Compiles src/ with the solc of package.json and writes one artifact per contract to the Python package.
//   node build.mjs [directory]      the directory's files are replaced; the same sources give the same bytes
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import solc from "solc";

const CONTRACTS = ["AdapterRegistry", "AttributionLog", "RewardDistributor", "RewardToken"];
const here = path.dirname(fileURLToPath(import.meta.url));
const target = process.argv[2] ?? path.join(here, "../backends/openlora_python/openlora/network/artifacts");

/** One key of foundry.toml, so that what forge tests is what is written here. */
function setting(name) {
  const found = readFileSync(path.join(here, "foundry.toml"), "utf8").match(new RegExp(`^${name} = "?([^"\\n]+)"?$`, "m"));
  if (!found) throw new Error(`foundry.toml has no ${name}`);
  return found[1];
}

const settings = {
  optimizer: { enabled: setting("optimizer") === "true", runs: Number(setting("optimizer_runs")) },
  evmVersion: setting("evm_version"),
  metadata: { bytecodeHash: setting("bytecode_hash"), appendCBOR: setting("cbor_metadata") === "true" },
  viaIR: false,
};

const read = (name) => readFileSync(path.join(here, name.startsWith("@") ? "node_modules" : ".", name), "utf8");
const sources = {};
for (const name of CONTRACTS) sources[`src/${name}.sol`] = { content: read(`src/${name}.sol`) };
const outputSelection = {
  "*": { "*": ["abi", "metadata", "evm.bytecode.object", "evm.deployedBytecode.object", "evm.deployedBytecode.immutableReferences"] },
};
const input = { language: "Solidity", sources, settings: { ...settings, outputSelection } };
const output = JSON.parse(solc.compile(JSON.stringify(input), { import: (name) => ({ contents: read(name) }) }));
const faults = (output.errors ?? []).filter((message) => message.severity === "error");
for (const fault of faults) console.error(fault.formattedMessage);
if (faults.length > 0) process.exit(1);

mkdirSync(target, { recursive: true });
for (const name of CONTRACTS) {
  const contract = output.contracts[`src/${name}.sol`][name];
  const used = Object.keys(JSON.parse(contract.metadata).sources).sort();
  const artifact = {
    contract: name,
    abi: contract.abi,
    bytecode: `0x${contract.evm.bytecode.object}`,
    deployed_bytecode: `0x${contract.evm.deployedBytecode.object}`,
    // Places in deployed_bytecode that the constructor fills: [{start, length} in bytes, …] per immutable.
    immutable_references: Object.values(contract.evm.deployedBytecode.immutableReferences),
    compiler: { version: solc.version(), settings },
    sources: Object.fromEntries(used.map((file) => [file, createHash("sha256").update(read(file)).digest("hex")])),
  };
  writeFileSync(path.join(target, `${name}.json`), `${JSON.stringify(artifact, null, 1)}\n`);
}
