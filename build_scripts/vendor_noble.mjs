// Copies what the explorer's verifier imports of @noble/curves and @noble/hashes out of tests/browser/node_modules.
// A browser knows no package names, so imports of the sister package become relative paths; nothing else is changed.
//
//   node build_scripts/vendor_noble.mjs           writes the files and VENDOR.json
//   node build_scripts/vendor_noble.mjs --check   exits 1 if a file is not the package's, or VENDOR.json is stale

import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');
const PACKAGES = path.join(ROOT, 'tests/browser/node_modules/@noble');
const TARGET = path.join(ROOT, 'backends/openlora_python/openlora/explorer/static/vendor/noble');
const ENTRIES = ['curves/ed25519.js', 'curves/secp256k1.js', 'hashes/sha2.js', 'hashes/sha3.js'];
const IMPORT = /^((?:import|export) [^;'"]* from )(['"])([^'"]+)\2;$/gm;

const sha256 = (bytes) => createHash('sha256').update(bytes).digest('hex');

/** Every file that is needed, by its path below @noble, with its text as the page serves it. */
function collect() {
  const files = new Map();
  const visit = (file) => {
    if (files.has(file)) return;
    files.set(file, null);
    const original = readFileSync(path.join(PACKAGES, file), 'utf8');
    const text = original.replace(IMPORT, (whole, head, quote, specifier) => {
      if (specifier.startsWith('.')) {
        visit(path.posix.join(path.posix.dirname(file), specifier));
        return whole;
      }
      const wanted = specifier.slice('@noble/'.length);
      visit(wanted);
      return `${head}${quote}${path.posix.relative(path.posix.dirname(file), wanted)}${quote};`;
    });
    files.set(file, { text, original: sha256(original), served: sha256(text) });
  };
  ENTRIES.forEach(visit);
  for (const name of ['curves/LICENSE', 'hashes/LICENSE']) {
    const text = readFileSync(path.join(PACKAGES, name), 'utf8');
    files.set(name, { text, original: sha256(text), served: sha256(text) });
  }
  return new Map([...files].sort(([left], [right]) => (left < right ? -1 : 1)));
}

function describe(files) {
  const version = (name) => JSON.parse(readFileSync(path.join(PACKAGES, name, 'package.json'), 'utf8')).version;
  return JSON.stringify(
    {
      about: 'ES modules from npm. `npm` is the SHA-256 of the file in the package, `served` that of the file here.',
      packages: { '@noble/curves': version('curves'), '@noble/hashes': version('hashes') },
      files: Object.fromEntries([...files].map(([name, { original, served }]) => [name, { npm: original, served }])),
    },
    null,
    1,
  ) + '\n';
}

const files = collect();
const description = describe(files);
if (process.argv.includes('--check')) {
  const wrong = [...files].filter(([name, { text }]) => readFileSync(path.join(TARGET, name), 'utf8') !== text);
  for (const [name] of wrong) console.error(`${name} is not the package's file`);
  const stale = readFileSync(path.join(TARGET, 'VENDOR.json'), 'utf8') !== description;
  if (stale) console.error('VENDOR.json does not describe these files');
  process.exitCode = wrong.length > 0 || stale ? 1 : 0;
} else {
  rmSync(TARGET, { recursive: true, force: true });
  for (const [name, { text }] of files) {
    mkdirSync(path.dirname(path.join(TARGET, name)), { recursive: true });
    writeFileSync(path.join(TARGET, name), text);
  }
  writeFileSync(path.join(TARGET, 'VENDOR.json'), description);
}
