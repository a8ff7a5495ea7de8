// Who earned what, and what of it was claimed.

import { ask } from '../api.js';
import { element, empty, hash, link, table } from '../dom.js';
import { grouped } from '../format.js';
import { chainWords } from './overview.js';

const COLUMNS = [
  { title: 'Account', kind: 'wide' },
  { title: 'Earned', kind: 'number' },
  { title: 'Claimed', kind: 'number' },
  { title: 'Pending', kind: 'number' },
];

export async function showEarners(query) {
  const page = await ask('earners', { after: query.get('after'), wanted: query.get('wanted') });
  const title = element('header', { class: 'title' }, element('h1', {}, 'Earners'), element('p', { class: 'quiet' }, 'Cumulative, in the token’s smallest unit'));
  return [title, ...(page.state === 'ready' ? earners(page) : [noChain(page)])];
}

function earners(page) {
  const [words, kind] = standing(page);
  const note = words === '' ? null : element('p', { class: `scope ${kind}` }, words);
  if (page.earners.length === 0) return [note, empty('Nobody has earned yet', 'Amounts appear when the first epoch is settled.')].filter(Boolean);
  const amount = (digits) => (digits === null ? element('span', { class: 'quiet' }, 'not known') : grouped(digits));
  const rows = page.earners.map((one) => [
    one.cumulative === null ? hash(one.account) : link(`#/earners/${one.account}`, hash(one.account)),
    amount(one.cumulative),
    amount(one.claimed),
    amount(one.pending),
  ]);
  const next = page.after === null ? null : link(`#/earners?after=${page.after}`, 'More →');
  return [note, table(`${grouped(page.count)} accounts, by what they earned`, COLUMNS, rows), element('nav', { class: 'pager', 'aria-label': 'Pages' }, next)].filter(Boolean);
}

/** Whether these amounts are those that the chain pays by. */
function standing({ agrees, note }) {
  if (agrees === false) return [`The amounts computed here do not give the root that was accepted on chain. ${note}`, 'bad'];
  if (agrees === null) return [note, 'warn'];
  return [`Recomputed by this node from its receipts and the chain’s events; they give the root that was accepted on chain. ${note}`, 'good'];
}

/** What stands in for settlement where there is none to show. */
export function noChain(page) {
  if (page.state === 'none') {
    return empty('No chain configured', 'Receipts are signed and can be verified all the same. To see anchors, epochs and earners, start the explorer with ', element('code', {}, '--deployment FILE'), '.');
  }
  if (page.state === 'loading') return empty('Reading the chain…', 'The first look at its events takes a moment. Reload to see more.');
  return element('div', { class: 'notice bad', role: 'alert' }, element('h2', {}, 'The chain can’t be read'), element('p', {}, chainWords(page)));
}
