// Whose log this is, how far it is signed and anchored, and what came last.

import { ask } from '../api.js';
import { element, empty, facts, hash, link } from '../dom.js';
import { grouped, time } from '../format.js';
import { receiptTable } from './receipts.js';

const NEWEST = 8;

export async function showOverview() {
  const [{ log, chain }, page] = await Promise.all([ask('overview'), ask('receipts', { limit: NEWEST })]);
  const title = element('header', { class: 'title' }, element('h1', {}, 'Overview'), element('p', { class: 'quiet' }, 'Every answer leaves a signed receipt; anyone can check one.'));
  if (log === null) return [title, empty('No receipt log yet', 'The server makes it with its first start on this state directory.')];
  return [title, tiles(log, chain), newest(page), identity(log)];
}

function tiles(log, chain) {
  const { checkpoint } = log;
  return element('div', { class: 'tiles' },
    tile('Receipts', grouped(log.size), log.newest_at === null ? 'none yet' : `last ${time(log.newest_at)}`),
    checkpoint === null ? tile('Checkpoint', '–', 'none signed yet') : tile('Checkpoint', grouped(checkpoint.size), `root ${checkpoint.root.slice(0, 16)}…`),
    anchorTile(chain),
    tile('Deposited', chain.state === 'ready' ? grouped(chain.deposited) : '–', chain.state === 'ready' ? `${grouped(chain.settled)} settled` : chainWords(chain)));
}

function anchorTile(chain) {
  if (chain.state !== 'ready') return tile('Anchored', '–', chainWords(chain));
  if (chain.anchor === null) return tile('Anchored', '0', `not on chain ${chain.chain_id} yet`);
  return tile('Anchored', grouped(chain.anchor.size), `chain ${chain.chain_id}, block ${grouped(chain.anchor.block)}`);
}

/** What there is to say of a chain that shows nothing. */
export function chainWords(chain) {
  return { none: 'no chain configured', loading: 'reading the chain…', error: chain.message, ready: '' }[chain.state];
}

const tile = (title, figure, words) =>
  element('section', { class: 'tile' }, element('h2', {}, title), element('p', { class: 'figure' }, figure), element('p', { class: 'quiet' }, words));

function newest(page) {
  const head = element('div', { class: 'head' }, element('h2', {}, 'Newest receipts'), link('#/receipts', 'All receipts →'));
  return element('section', {}, head, page.receipts.length > 0 ? receiptTable(page.receipts) : empty('No receipts yet', 'Ask the server something, and one appears here.'));
}

function identity(log) {
  return element('section', { class: 'card' }, element('h2', {}, 'This log'),
    facts([
      ['Origin', log.origin],
      ['Log id', hash(log.id)],
      ['Receipt signer', hash(log.signer)],
      ['Key line', hash(log.key_line)],
    ]),
    element('p', { class: 'quiet' }, 'This is what the node says of itself. Before you pin the key line under ', link('#/verify', 'Verify'),
      ', compare it with one from somewhere else: the operator’s site, the chain, an earlier visit.'));
}
