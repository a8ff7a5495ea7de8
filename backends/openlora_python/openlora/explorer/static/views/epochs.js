// The epochs: what was proposed, for which receipts, and what became of it.

import { ask } from '../api.js';
import { element, empty, facts, hash, pill, short, table } from '../dom.js';
import { grouped } from '../format.js';
import { hex } from '../verify/bytes.js';
import { attestationDigest } from '../verify/rewards.js';
import { noChain } from './earners.js';

const KIND = { pending: 'warn', accepted: 'good', vetoed: 'bad' };
const COLUMNS = [
  { title: 'Log', kind: 'wide' },
  { title: 'Receipts', kind: 'number' },
  { title: 'Amount', kind: 'number' },
  { title: 'Void, by reason', kind: 'wide' },
];

export async function showEpochs() {
  const page = await ask('epochs');
  const title = element('header', { class: 'title' }, element('h1', {}, 'Epochs'), element('p', { class: 'quiet' }, 'Each settles ranges of receipts from their logs’ deposits'));
  if (page.state !== 'ready') return [title, noChain(page)];
  if (page.epochs.length === 0) return [title, empty('No epoch yet', 'None was proposed on this chain.')];
  return [title, ...page.epochs.map((one) => epoch(one, page))];
}

function epoch(one, { chain_id: chain, distributor }) {
  const decided = one.decided_block === null ? 'not decided yet' : `${one.state} in block ${grouped(one.decided_block)}`;
  const allocations = one.allocations.map((part) => ({ ...part, amount: BigInt(part.amount) }));
  const digest = attestationDigest(chain, distributor, { epoch: one.number, root: one.root, total: BigInt(one.total), allocations });
  return element('section', { class: 'card' },
    element('h2', {}, `Epoch ${grouped(one.number)} `, pill(one.state, KIND[one.state])),
    facts([
      ['Total, cumulative', grouped(one.total)],
      ['Proposed', `in block ${grouped(one.proposed_block)}, ${decided}`],
      ['Root', hash(one.root)],
      ['Attestors sign', hash(`0x${hex(digest)}`)],
    ]),
    table('Allocations', COLUMNS, one.allocations.map((part) => [
      short(part.log, 16),
      `${grouped(part.from)} … ${grouped(part.to - 1n)}`,
      grouped(part.amount),
      voids(part.voids),
    ])));
}

/** Reasons of docs/settlement.md §3 and how many receipts each voided. */
function voids(counted) {
  if (counted === null || counted === undefined) return element('span', { class: 'quiet' }, 'not recomputed here');
  const reasons = Object.entries(counted);
  if (reasons.length === 0) return element('span', { class: 'quiet' }, 'none');
  return element('span', { class: 'adapters' }, reasons.map(([reason, count]) => element('span', { class: 'chip' }, reason, element('small', {}, grouped(count)))));
}
