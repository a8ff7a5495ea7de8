// Drop a proof file and see it verified here, in the browser, against the keys that you pinned.

import { ask, fetchProof } from '../api.js';
import { element, hash, link, short } from '../dom.js';
import { grouped } from '../format.js';
import { pin, pinnedLines, unpin } from '../pins.js';
import { MAX_BYTES } from '../verify/proof.js';
import { parseLogKey } from '../verify/log_key.js';
import { verifyProof } from '../verify/verify.js';

const MARKS = { passed: '✓', failed: '✕', skipped: '·' };
const STATES = { passed: 'passed', failed: 'failed', skipped: 'not looked at' };

export async function showVerify(query) {
  const claim = await nodeClaim();
  const state = { file: null };
  const result = element('section', { class: 'result', 'aria-live': 'polite' });
  const keys = element('section', { class: 'card', 'aria-label': 'Pinned keys' });
  const verify = () => result.replaceChildren(...(state.file === null ? [waiting()] : verdict(state.file)));
  const take = (name, bytes) => {
    state.file = { name, bytes };
    verify();
  };
  const changed = () => {
    keys.replaceChildren(...keyList(claim, changed));
    verify();
  };
  changed();
  if (query.has('receipt')) take(`receipt ${query.get('receipt')}, fetched from this node`, await fetchProof(query.get('receipt')));
  return [
    element('header', { class: 'title' }, element('h1', {}, 'Verify a receipt'), element('p', { class: 'quiet' }, 'Everything is computed in this browser; the file goes nowhere.')),
    element('div', { class: 'split' }, element('div', {}, dropZone(take, result), result), keys),
  ];
}

/** What this node says its key is, or null. A verifier works without the node. */
async function nodeClaim() {
  try {
    return (await ask('overview')).log?.key_line ?? null;
  } catch {
    return null;
  }
}

function dropZone(take, result) {
  const read = async (file) => {
    if (file === undefined) return;
    if (file.size > MAX_BYTES) result.replaceChildren(element('div', { class: 'verdict bad' }, element('h2', {}, 'Not a proof file'), element('p', {}, `${file.name} has ${grouped(file.size)} bytes; a proof has a few thousand.`)));
    else take(file.name, new Uint8Array(await file.arrayBuffer()));
  };
  const input = element('input', { type: 'file', id: 'proof', class: 'unseen', onchange: (event) => read(event.target.files[0]) });
  const zone = element('label', { class: 'drop', for: 'proof' }, element('strong', {}, 'Drop a proof file here'), element('span', { class: 'quiet' }, 'or choose one: the .tlog-proof of a receipt'));
  const over = (event) => {
    event.preventDefault();
    zone.classList.toggle('over', event.type === 'dragover');
  };
  for (const name of ['dragover', 'dragleave']) zone.addEventListener(name, over);
  zone.addEventListener('drop', (event) => {
    over(event);
    read(event.dataTransfer.files[0]);
  });
  return element('div', { class: 'dropbox' }, input, zone);
}

const waiting = () => element('p', { class: 'quiet' }, 'No file yet. A receipt’s page has its proof for download.');

function verdict({ name, bytes }) {
  const found = verifyProof(bytes, pinnedLines());
  const { kind, title, words } = describe(found);
  return [
    element('div', { class: `verdict ${kind}`, 'data-outcome': found.outcome }, element('h2', {}, title), element('p', {}, ...words), element('p', { class: 'quiet' }, name)),
    element('ol', { class: 'steps', 'aria-label': 'What was checked' }, found.steps.map((step) =>
      element('li', { class: step.state, 'data-step': step.id },
        element('span', { class: 'mark', 'aria-hidden': 'true' }, MARKS[step.state]),
        element('span', {}, step.title, element('span', { class: 'unseen' }, `: ${STATES[step.state]}`), step.detail === '' ? null : element('small', {}, step.detail))))),
  ];
}

function describe({ outcome, fault, receipt, log, checkpoint }) {
  const which = () => `Receipt #${grouped(receipt.seq)} of ${log.origin}`;
  switch (outcome) {
    case 'verified':
      return { kind: 'good', title: 'Verified', words: [`${which()} is signed, and lies in the log of ${grouped(checkpoint.size)} receipts, by a key that you pinned.`] };
    case 'unknown':
      return { kind: 'warn', title: 'Consistent, log unknown', words: [`${which()} agrees with itself, but you have pinned no key of this log. Whoever made the file may have made its keys as well: it proves nothing yet.`] };
    case 'tampered':
      return { kind: 'bad', title: 'Tampered', words: ['The first thing that is wrong: ', element('strong', {}, fault.field), ` ${fault.message}.`] };
    default:
      return { kind: 'bad', title: 'Not a proof file', words: [`It ${fault.message}.`] };
  }
}

function keyList(claim, changed) {
  const lines = pinnedLines();
  const pinned = lines.map((line) => keyItem(line, element('button', { type: 'button', class: 'plain', onclick: () => { unpin(line); changed(); } }, 'Remove')));
  return [
    element('h2', {}, 'Pinned keys'),
    element('p', { class: 'quiet' }, 'Keys of logs that you trust, kept in this browser alone. Take them from somewhere other than the proof.'),
    pinned.length > 0 ? element('ul', { class: 'keys' }, pinned) : element('p', { class: 'none' }, 'None yet.'),
    keyForm(changed),
    claim === null || lines.some((line) => line === claim) ? null : claimed(claim, changed),
  ].filter(Boolean);
}

function keyItem(line, button) {
  const key = parseLogKey(line);
  return element('li', {}, element('span', {}, element('strong', {}, key.origin), ' ', short(key.id, 16)), button);
}

function keyForm(changed) {
  const problem = element('p', { class: 'problem', role: 'alert' });
  const area = element('textarea', { name: 'line', rows: 3, spellcheck: 'false', autocomplete: 'off', placeholder: 'openlora-log-v1 origin=… log=…', 'aria-label': 'A log’s key line' });
  const submit = (event) => {
    event.preventDefault();
    try {
      pin(area.value);
    } catch (error) {
      problem.replaceChildren(`This ${error.message}.`);
      return;
    }
    changed();
  };
  return element('form', { class: 'pin', onsubmit: submit }, area, problem, element('button', { type: 'submit' }, 'Pin this key'));
}

function claimed(claim, changed) {
  return element('div', { class: 'claim' },
    element('h3', {}, 'This node’s claim'),
    element('p', { class: 'quiet' }, 'The node that serves this page says this is its key. That is no proof: pin it only if you know it from elsewhere, or compare it with ', link('#/', 'the overview'), ' of a visit that you trust.'),
    hash(claim),
    element('button', { type: 'button', class: 'plain', onclick: () => { pin(claim); changed(); } }, 'I have compared it: pin it'));
}
