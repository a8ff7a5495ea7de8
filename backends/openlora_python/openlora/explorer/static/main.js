// Routes of the page: the part behind # says what is shown.

import { ask } from './api.js';
import { element } from './dom.js';
import { showAdapters } from './views/adapters.js';
import { showEarner } from './views/earner.js';
import { showEarners } from './views/earners.js';
import { showEpochs } from './views/epochs.js';
import { showOverview } from './views/overview.js';
import { showReceipt } from './views/receipt.js';
import { showReceipts } from './views/receipts.js';

// The verifier is the largest part and only needed for itself.
const showVerify = async (...given) => (await import('./views/verify.js')).showVerify(...given);

const ROUTES = [
  [/^$/, 'Overview', showOverview],
  [/^receipts$/, 'Receipts', showReceipts],
  [/^receipts\/(\d{1,19})$/, 'Receipt', showReceipt],
  [/^verify$/, 'Verify', showVerify],
  [/^adapters$/, 'Adapters', showAdapters],
  [/^earners$/, 'Earners', showEarners],
  [/^earners\/(0x[0-9a-fA-F]{40})$/, 'Earner', showEarner],
  [/^epochs$/, 'Epochs', showEpochs],
];

const view = document.getElementById('view');
let shown = 0;

/** Show what the address says. Whoever went on meanwhile does not get an old answer. */
async function route({ focus }) {
  const [path, query] = location.hash.replace(/^#\/?/, '').split('?');
  const [, title, show, found] = match(path);
  const turn = (shown += 1);
  document.title = `${title}${found[1] ? ` ${found[1]}` : ''} · OpenLoRA explorer`;
  markTab(path);
  view.setAttribute('aria-busy', 'true');
  let content;
  try {
    content = await show(new URLSearchParams(query), ...found.slice(1));
  } catch (error) {
    content = [element('div', { class: 'notice bad', role: 'alert' }, element('h1', {}, 'That did not work'), element('p', {}, error.message))];
  }
  if (turn !== shown) return;
  view.replaceChildren(...content);
  view.setAttribute('aria-busy', 'false');
  if (focus) {
    view.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

function match(path) {
  for (const [pattern, title, show] of ROUTES) {
    const found = pattern.exec(path);
    if (found !== null) return [pattern, title, show, found];
  }
  return [null, 'Not found', async () => [element('h1', {}, 'There is no such page')], ['']];
}

function markTab(path) {
  for (const tab of document.querySelectorAll('#tabs a')) {
    const here = tab.getAttribute('href') === `#/${path.split('/')[0]}`;
    if (here) tab.setAttribute('aria-current', 'page');
    else tab.removeAttribute('aria-current');
  }
}

/** A number is a receipt, 64 hex digits a request or an adapter's digest, 40 an earner's address, anything else part of an adapter's name. */
async function search(text) {
  const wanted = text.trim().replace(/^0x/i, '').toLowerCase();
  if (/^[0-9a-f]{40}$/.test(wanted)) return `#/earners?wanted=${wanted}`;
  if (/^\d{1,19}$/.test(wanted)) return `#/receipts/${wanted}`;
  if (!/^[0-9a-f]{64}$/.test(wanted)) return `#/adapters?${new URLSearchParams({ wanted: text.trim() })}`;
  try {
    return `#/receipts/${(await ask(`requests/${wanted}`)).seq}`;
  } catch {
    return `#/receipts?adapter=${wanted}`;
  }
}

document.getElementById('search').addEventListener('submit', async (event) => {
  event.preventDefault();
  const text = new FormData(event.target).get('q');
  if (text.trim()) location.hash = await search(text);
});
document.querySelector('.skip').addEventListener('click', (event) => {
  event.preventDefault(); // the part behind # is the route
  view.focus();
});
addEventListener('hashchange', () => route({ focus: true }));
route({ focus: false });
