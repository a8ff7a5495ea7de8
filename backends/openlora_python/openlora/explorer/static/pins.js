// The key lines that the user pinned, in this browser's own storage. What it can't read, nobody pinned.

import { parseLogKey } from './verify/log_key.js';

const NAME = 'openlora.pinned-log-keys';

export function pinnedLines() {
  let lines;
  try {
    lines = JSON.parse(localStorage.getItem(NAME) ?? '[]');
  } catch {
    return [];
  }
  return Array.isArray(lines) ? lines.filter(isKey) : [];
}

/** Pin a key line; Invalid (see verify/bytes.js) says why it is none. */
export function pin(line) {
  const key = parseLogKey(line.trim());
  store([...pinnedLines().filter((one) => parseLogKey(one).id !== key.id), key.line]);
}

export const unpin = (line) => store(pinnedLines().filter((one) => one !== line));

const store = (lines) => localStorage.setItem(NAME, JSON.stringify(lines));

function isKey(line) {
  try {
    parseLogKey(line);
    return true;
  } catch {
    return false;
  }
}
