// Asks this page's own server, and nobody else.

import { parseJson } from './verify/json.js';

/** The JSON at a path, integers as BigInts. Error: the server's own words, or that it does not answer. */
export async function ask(path, parameters = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== ''));
  let response;
  try {
    response = await fetch(`api/${path}${query.size > 0 ? `?${query}` : ''}`);
  } catch {
    throw new Error('This node’s explorer does not answer. Is it still running?');
  }
  const text = await response.text();
  if (response.ok) return parseJson(text);
  throw new Error(errorOf(text) ?? `The explorer answered ${response.status}.`);
}

function errorOf(text) {
  try {
    const { error } = JSON.parse(text);
    return typeof error === 'string' ? error : null;
  } catch {
    return null;
  }
}

/** The proof file of a receipt, as bytes. */
export async function fetchProof(seq) {
  const response = await fetch(`api/receipts/${seq}/proof`);
  if (!response.ok) throw new Error(errorOf(await response.text()) ?? `The explorer answered ${response.status}.`);
  return new Uint8Array(await response.arrayBuffer());
}
