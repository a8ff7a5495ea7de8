// The receipts, newest first, a page at a time; those of one adapter, if the address names one.

import { ask } from '../api.js';
import { element, empty, hash, link, pill, short, table } from '../dom.js';
import { grouped, time, weight } from '../format.js';

const COLUMNS = [
  { title: 'Receipt' },
  { title: 'Status' },
  { title: 'Adapters', kind: 'wide' },
  { title: 'Tokens', kind: 'number' },
  { title: 'Price', kind: 'number' },
  { title: 'Ended', kind: 'number' },
];

export const STATUS_KIND = { complete: 'good', cancelled: 'warn', error: 'bad', aborted: 'bad' };

export async function showReceipts(query) {
  const adapter = query.get('adapter');
  const page = await ask('receipts', { before: query.get('before'), adapter });
  const scope = adapter === null ? null : element('p', { class: 'scope' }, 'Only those with adapter ', hash(adapter), ' ', link('#/receipts', 'Show all'));
  const title = element('header', { class: 'title' }, element('h1', {}, 'Receipts'), element('p', { class: 'quiet' }, `${grouped(page.size)} in the log`));
  return [title, scope, page.receipts.length > 0 ? receiptTable(page.receipts) : nothing(page, adapter), pager(page, query)].filter(Boolean);
}

function nothing(page, adapter) {
  if (page.before !== null) return empty('None among these', 'The receipts looked at so far did not use this adapter; older ones may.');
  if (adapter !== null) return empty('No such receipt', 'No request and no adapter of a receipt has these 64 digits.');
  return empty('No receipts yet', 'Every answer of the server leaves one. Ask it something, and it appears here.');
}

/** Rows of receipts, each with a link to the whole. */
export function receiptTable(receipts) {
  return table('Receipts, newest first', COLUMNS, receipts.map((one) => [
    link(`#/receipts/${one.seq}`, `#${grouped(one.seq)}`),
    pill(one.status, STATUS_KIND[one.status]),
    adapterList(one.adapters),
    `${grouped(one.in_tokens)} + ${grouped(one.out_tokens)}`,
    grouped(one.price),
    element('span', { class: 'time' }, time(one.ended_at)),
  ]));
}

/** Adapters of a receipt with their weights: names where they may be told, else the beginning of the digest. */
export function adapterList(adapters) {
  if (adapters.length === 0) return element('span', { class: 'quiet' }, 'base model');
  return element('span', { class: 'adapters' }, adapters.map((one) =>
    element('span', { class: 'chip' },
      link(`#/receipts?adapter=${one.digest}`, one.name === null ? short(one.digest, 8) : element('span', { title: one.digest }, one.name)),
      element('small', {}, `×\u202f${weight(one.weight)}`))));
}

/** Where to go on, in the address, so that the browser's "back" works. */
function pager(page, query) {
  const to = (before) => {
    const next = new URLSearchParams(query);
    if (before === null) next.delete('before');
    else next.set('before', before);
    return `#/receipts?${next}`;
  };
  return element('nav', { class: 'pager', 'aria-label': 'Pages' },
    query.has('before') ? link(to(null), '← Newest') : null,
    page.before !== null ? link(to(page.before), 'Older →') : null);
}
