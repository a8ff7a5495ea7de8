#!/usr/bin/env node
// The compiler from npm (WebAssembly) behind the two calls that forge makes of a native solc: --version and --standard-json.
import { readFileSync, writeSync } from "node:fs";
import path from "node:path";
import solc from "solc";

/** Writes all of `text` to stdout: process.stdout.write followed by an exit loses what is over 64 KiB on a pipe. */
function print(text) {
  const bytes = Buffer.from(text);
  for (let at = 0; at < bytes.length; ) {
    try {
      at += writeSync(1, bytes, at);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
    }
  }
}

const options = process.argv.slice(2);
if (options.includes("--version")) {
  print(`solc, the solidity compiler commandline interface\nVersion: ${solc.version()}\n`);
} else {
  const valueOf = (name) => (options.includes(name) ? options[options.indexOf(name) + 1] : undefined);
  const roots = [valueOf("--base-path"), valueOf("--include-path"), process.cwd()].filter(Boolean);
  const find = (name) => {
    for (const root of roots) {
      try {
        return { contents: readFileSync(path.resolve(root, name), "utf8") };
      } catch (error) {
        if (error.code !== "ENOENT") throw error;
      }
    }
    return { error: `${name} not found` };
  };
  print(solc.compile(readFileSync(0, "utf8"), { import: find }));
}
