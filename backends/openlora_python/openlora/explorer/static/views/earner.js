// One earner: the amounts, and whether the proof that a claim needs leads to the accepted root, computed here.

import { ask } from '../api.js';
import { element, facts, hash } from '../dom.js';
import { grouped } from '../format.js';
import { hex } from '../verify/bytes.js';
import { rewardLeaf, rewardRoot } from '../verify/rewards.js';

export async function showEarner(_, account) {
  const one = await ask(`earners/${account}`);
  const leaf = rewardLeaf(one.chain_id, one.distributor, one.account, BigInt(one.cumulative));
  const leads = hex(rewardRoot(leaf, one.proof)) === one.root;
  return [
    element('header', { class: 'title' }, element('h1', {}, 'Earner')),
    element('section', { class: 'card' }, element('h2', {}, hash(one.account)),
      facts([
        ['Earned', grouped(one.cumulative)],
        ['Claimed', grouped(one.claimed)],
        ['Pending', grouped(one.pending)],
      ])),
    element('section', { class: 'card' }, element('h2', {}, 'Proof of the claim'),
      element('div', { class: `verdict ${leads ? 'good' : 'bad'}` },
        element('p', {}, leads ? 'Computed in this browser: earned amount and siblings lead to the root that was accepted on chain, as this node reads it.'
          : 'Computed in this browser: earned amount and siblings do not lead to the root that was accepted on chain.')),
      facts([
        ['Distributor', hash(one.distributor), ` on chain ${one.chain_id}`],
        ['Root', hash(one.root)],
        ['Leaf', hash(hex(leaf))],
        ['Siblings', one.proof.length === 0 ? 'none: the only earner' : element('ol', { class: 'siblings' }, one.proof.map((sibling) => element('li', {}, hash(sibling))))],
      ])),
  ];
}
