// One receipt in full, and its proof to take home.

import { ask } from '../api.js';
import { element, facts, hash, link, pill, table } from '../dom.js';
import { grouped, percent, time, weight } from '../format.js';
import { STATUS_KIND } from './receipts.js';

const STATUS = { 1: 'complete', 2: 'cancelled', 3: 'error', 4: 'aborted' };
const ZERO = `0x${'0'.repeat(64)}`;

export async function showReceipt(_, seq) {
  const { receipt, names } = await ask(`receipts/${seq}`);
  const status = STATUS[receipt.status];
  return [
    element('header', { class: 'title' }, element('h1', {}, `Receipt #${grouped(receipt.seq)}`, ' ', pill(status, STATUS_KIND[status])),
      element('p', { class: 'actions' },
        element('a', { class: 'button', href: `api/receipts/${seq}/proof`, download: `receipt-${seq}.tlog-proof` }, 'Download proof'),
        element('a', { class: 'button plain', href: `#/verify?receipt=${seq}` }, 'Verify in this browser'))),
    used(receipt),
    adapters(receipt, names),
    terms(receipt.blobs.terms, names),
    signed(receipt),
  ];
}

function used(receipt) {
  const { engine, version, dtype, quantization } = receipt.blobs.runtime;
  return element('section', { class: 'card' }, element('h2', {}, 'What ran'),
    facts([
      ['Tokens', `${grouped(receipt.in_tokens)} in, ${grouped(receipt.out_tokens)} out`],
      ['Price', `${grouped(receipt.price)} of the token’s smallest unit`],
      ['Started', time(receipt.started_at)],
      ['Ended', time(receipt.ended_at)],
      ['Engine', `${engine} ${version}, ${dtype}${quantization === 'none' ? '' : `, ${quantization}`}`],
      ['Base model', hash(receipt.base_model.slice(2))],
      ['Request id', hash(receipt.request_id.slice(2))],
    ]));
}

function adapters({ blobs: { adapters: { adapters: used, method } } }, names) {
  const rows = used.map((one) => [named(one.digest, names), weight(one.weight), link(`#/receipts?adapter=${one.digest}`, hash(one.digest))]);
  const columns = [{ title: 'Adapter' }, { title: 'Weight', kind: 'number' }, { title: 'Digest', kind: 'wide' }];
  const content = rows.length > 0 ? table(`Adapters, combined by ${method}`, columns, rows) : element('p', { class: 'quiet' }, 'The base model alone.');
  return element('section', { class: 'card' }, element('h2', {}, 'Adapters'), content);
}

const named = (digest, names) => (Object.hasOwn(names, digest) ? names[digest] : element('span', { class: 'quiet' }, 'name not told'));

function terms({ base, adapters: models, price_version: version, parameters }, names) {
  const columns = [{ title: 'Model' }, { title: 'Owner', kind: 'wide' }, { title: 'Per 10⁶ in', kind: 'number' }, { title: 'Per 10⁶ out', kind: 'number' }, { title: 'Declared data sets', kind: 'wide' }];
  const row = (title, model) => [title, hash(model.owner), grouped(model.input), grouped(model.output), datasets(model.datasets)];
  const rows = [row('base', base), ...models.map((model) => row(named(model.digest, names), model))];
  return element('section', { class: 'card' }, element('h2', {}, 'Terms'), table(`Terms, price version ${version}`, columns, rows),
    facts([['Parameters', /^0+$/.test(parameters) ? 'none in force: this receipt can’t be settled' : hash(parameters)]]));
}

function datasets(declared) {
  if (declared.length === 0) return element('span', { class: 'quiet' }, 'none');
  return element('ul', { class: 'plain' }, declared.map((one) => element('li', {}, `${one.id} (${percent(one.ppm)}, ${one.licence})`)));
}

function signed(receipt) {
  const registry = receipt.registry_ref === ZERO ? 'none: this receipt can’t be settled' : registryBlock(receipt.blobs.registry);
  return element('section', { class: 'card' }, element('h2', {}, 'Commitments and signature'),
    facts([
      ['Prompt', hash(receipt.prompt_commit)],
      ['Answer', hash(receipt.output_commit)],
      ['Registry', registry],
      ['Log id', hash(receipt.log_id)],
      ['Signer', hash(receipt.signer)],
      ['Signature', hash(receipt.signature)],
    ]),
    element('p', { class: 'quiet' }, 'Commitments are salted hashes: whoever holds the text and its salt can show that it is the one, nobody can read it from here.'));
}

const registryBlock = ({ chain_id: chain, block_number: number, block_hash: blockHash }) =>
  element('span', {}, `chain ${chain}, block ${grouped(number)} `, hash(blockHash));
