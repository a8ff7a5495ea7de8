// The adapters that anybody may know of.

import { ask } from '../api.js';
import { element, empty, link, pill, short, table } from '../dom.js';
import { grouped, percent } from '../format.js';

const COLUMNS = [
  { title: 'Adapter' },
  { title: 'Version' },
  { title: 'Rank', kind: 'number' },
  { title: 'Owner', kind: 'wide' },
  { title: 'Per 10⁶ in / out', kind: 'number' },
  { title: 'Declared data sets', kind: 'wide' },
];

export async function showAdapters(query) {
  const wanted = query.get('wanted') ?? '';
  const page = await ask('adapters', { wanted, after: query.get('after') });
  const title = element('header', { class: 'title' }, element('h1', {}, 'Adapters'), element('p', { class: 'quiet' }, `${grouped(page.count)} versions anybody may know of`));
  const scope = wanted === '' ? null : element('p', { class: 'scope' }, 'Only those with ', element('strong', {}, wanted), ' in their name or digest ', link('#/adapters', 'Show all'));
  return [title, scope, page.adapters.length > 0 ? adapterTable(page.adapters) : nothing(page, wanted), pager(page, wanted)].filter(Boolean);
}

function nothing(page, wanted) {
  if (!page.running) return empty('No server runs', 'Its settings say who may know of which adapter, so names are told only while it runs. Receipts name adapters by digest.');
  if (wanted !== '') return empty('No such adapter', 'No name or digest has that in it, or it is not for everybody to know.');
  return empty('No adapters', 'Add one with ', element('code', {}, 'openlora adapters add'), '.');
}

function adapterTable(adapters) {
  return table('Adapters by name', COLUMNS, adapters.map((one) => [
    element('span', { title: one.digest }, one.digest === '' ? one.name : link(`#/receipts?adapter=${one.digest}`, one.name), one.description === '' ? null : element('small', { class: 'quiet under' }, one.description)),
    element('span', { class: 'adapters' }, String(one.version), one.status === 'ready' ? null : pill(one.status, 'warn'), one.current ? pill('current', 'good') : null),
    String(one.rank),
    one.owner === null ? element('span', { class: 'quiet' }, 'no card') : short(one.owner, 12),
    `${grouped(one.price_input)} / ${grouped(one.price_output)}`,
    one.datasets.length === 0 ? element('span', { class: 'quiet' }, 'none') : element('ul', { class: 'plain' }, one.datasets.map((set) => element('li', {}, `${set.id} (${percent(set.ppm)})`))),
  ]));
}

function pager(page, wanted) {
  const next = page.after === null ? null : link(`#/adapters?${new URLSearchParams({ wanted, after: page.after })}`, 'More →');
  return element('nav', { class: 'pager', 'aria-label': 'Pages' }, next);
}
