// How long the page takes, told as JSON: the first view of a fresh browser, then other views, and a verification.
// PAGE: its address. RUNS: how often. CHROMIUM: the browser. COUNT: how many receipts there are.

import { launch } from './chromium.mjs';

const { PAGE, RUNS, COUNT } = process.env;
const VIEWS = {
  'receipts, newest': 'receipts',
  'receipts, from the middle': `receipts?before=${Math.floor(COUNT / 2)}`,
  'one receipt': `receipts/${COUNT - 3}`,
  'receipts of one adapter': null,
  'adapters': 'adapters',
  'a proof fetched and verified': `verify?receipt=${COUNT - 3}`,
};

async function timed(page, change, ready = 'main[aria-busy=false]') {
  const start = performance.now();
  await change();
  await page.waitForSelector(ready);
  return performance.now() - start;
}

const taken = {};
const note = (name, milliseconds) => (taken[name] ??= []).push(milliseconds);
const digest = (await (await fetch(`${PAGE}api/adapters`)).json()).adapters[0].digest;

for (let run = 0; run < Number(RUNS); run += 1) {
  const browser = await launch();
  const page = await browser.newPage();
  await page.goto('about:blank');
  note('first view, fresh browser', await timed(page, () => page.goto(`${PAGE}#/`)));
  const timing = await page.evaluate(() => performance.getEntriesByType('navigation')[0].toJSON());
  note('  of it, until the document is loaded', timing.loadEventEnd);
  for (const [name, section] of Object.entries(VIEWS)) {
    await page.goto('about:blank');
    note(name, await timed(page, () => page.goto(`${PAGE}#/${section ?? `receipts?adapter=${digest}`}`)));
  }
  await browser.close();
}
console.log(JSON.stringify(taken));
