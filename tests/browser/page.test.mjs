// The page in a real browser, served by `openlora explore` over 100,000 receipts. What the tests need stands in the
// environment: PAGE (its address), EMPTY (that of a page over a new state directory), FILES (a directory), CHROMIUM.

import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, beforeEach, test } from 'node:test';

import { launch } from './chromium.mjs';

const { PAGE, EMPTY, FILES } = process.env;
const key = readFileSync(path.join(FILES, 'log.pub'), 'utf8').trim();
const SECTIONS = ['', 'receipts', 'receipts/77', 'verify', 'verify?receipt=77', 'adapters', 'earners', 'epochs'];

let browser;
let page;
let complaints;

before(async () => {
  browser = await launch();
});
after(() => browser.close());

beforeEach(async () => {
  await page?.context().close();
  page = await (await browser.newContext({ acceptDownloads: true, viewport: { width: 1200, height: 900 } })).newPage();
  complaints = [];
  page.setDefaultTimeout(30_000);
  page.on('console', (message) => message.type() !== 'log' && complaints.push(message.text()));
  page.on('pageerror', (error) => complaints.push(String(error)));
  page.on('request', (request) => [PAGE, EMPTY].some((own) => request.url().startsWith(own)) || complaints.push(`asked ${request.url()}`));
});

async function open(section, address = PAGE) {
  await page.goto(`${address}#/${section}`);
  await shown();
}

const shown = () => page.waitForSelector('main[aria-busy=false]');
const text = (selector = 'main') => page.locator(selector).innerText();

async function search(words) {
  await page.getByRole('searchbox').fill(words);
  await page.keyboard.press('Enter');
}

async function pinKey(line) {
  await page.getByLabel('A log’s key line').fill(line);
  await page.getByRole('button', { name: 'Pin this key' }).click();
}

async function choose(name) {
  await page.locator('#proof').setInputFiles(path.join(FILES, name));
  return page.locator('.verdict', { hasText: name }).getAttribute('data-outcome');
}

/** The receipt's page has the proof; where it was saved. */
async function download(seq) {
  await open(`receipts/${seq}`);
  const [file] = await Promise.all([page.waitForEvent('download'), page.getByRole('link', { name: 'Download proof' }).click()]);
  assert.equal(file.suggestedFilename(), `receipt-${seq}.tlog-proof`);
  await file.saveAs(path.join(FILES, file.suggestedFilename()));
  return file.suggestedFilename();
}

test('the first view tells whose log it is, how many receipts, and the newest', async () => {
  await open('');
  assert.match(await text(), /100\u202f000[\s\S]*demo\.example\/openlora/);
  assert.ok((await text()).includes(key.split(' ')[2].slice('log='.length)));
  assert.equal(await page.locator('tbody tr').count(), 8);
  assert.match(await text(), /no chain configured/);
  assert.deepEqual(complaints, []);
});

test('a receipt is found by number, by request id, and by adapter', async () => {
  await open('');
  await search('77');
  await page.waitForURL(/#\/receipts\/77$/);
  await page.getByRole('heading', { name: /Receipt #77/ }).waitFor();
  const request = await page.locator('dt:text-is("Request id") + dd').innerText();
  await open('');
  await search(`0x${request.toUpperCase()}`);
  await page.waitForURL(/#\/receipts\/77$/);
  await search('hAiKu');
  await page.waitForURL(/#\/adapters\?wanted=hAiKu$/);
  await page.getByRole('heading', { name: 'Adapters' }).waitFor(); // until then the view before it is there, with links of that name
  await page.locator('main table').getByRole('link', { name: 'haiku' }).click();
  await page.waitForURL(/#\/receipts\?adapter=[0-9a-f]{64}$/);
  await page.getByText('Only those with adapter').waitFor();
  await shown();
  const rows = await page.locator('tbody tr').allInnerTexts();
  assert.equal(rows.length, 25);
  assert.ok(rows.every((row) => row.includes('haiku')));
  await page.getByRole('link', { name: 'Older' }).click();
  await page.waitForURL(/before=/);
  await shown();
  assert.equal(await page.locator('tbody tr').count(), 25);
  await search('f'.repeat(64));
  await page.getByText('No such receipt').waitFor();
  assert.deepEqual(complaints.filter((one) => !one.includes('404')), []);
});

test('a receipt’s proof is downloaded, dropped and verified; then it is tampered with', async () => {
  const name = await download(99_942);
  await open('verify');
  assert.equal(await choose(name), 'unknown');
  assert.match(await text('.verdict'), /Consistent, log unknown/);
  await pinKey(key);
  assert.equal(await page.locator('.verdict').getAttribute('data-outcome'), 'verified');
  assert.equal(await page.locator('.steps .passed').count(), 9);
  assert.match(await text('.verdict'), /Verified[\s\S]*99\u202f942/);

  const proof = readFileSync(path.join(FILES, name), 'utf8');
  const document = JSON.parse(Buffer.from(/^extra (.*)$/m.exec(proof)[1], 'base64'));
  document.out_tokens += 1;
  const forged = Buffer.from(JSON.stringify(document)).toString('base64');
  writeFileSync(path.join(FILES, 'forged.tlog-proof'), proof.replace(/^extra .*$/m, `extra ${forged}`));
  assert.equal(await choose('forged.tlog-proof'), 'tampered');
  assert.match(await text('.verdict'), /first thing that is wrong: leaf/);
  assert.equal(await page.locator('.steps .failed').count(), 1);
  assert.ok(await page.locator('.steps .skipped').count() > 0);

  assert.equal(await choose('strangers.tlog-proof'), 'unknown');
  assert.equal(await choose('log.pub'), 'unreadable');
  assert.deepEqual(complaints, []);
});

test('a file that is really dropped is verified', async () => {
  await open('verify');
  const content = readFileSync(path.join(FILES, 'strangers.tlog-proof'), 'utf8');
  const transfer = await page.evaluateHandle((proof) => {
    const made = new DataTransfer();
    made.items.add(new File([proof], 'dropped'));
    return made;
  }, content);
  await page.locator('.drop').dispatchEvent('drop', { dataTransfer: transfer });
  await page.locator('.verdict[data-outcome=unknown]').waitFor();
  assert.deepEqual(complaints, []);
});

test('pinned keys stay in this browser; the node’s own is only offered', async () => {
  await open('verify');
  assert.match(await text('.claim'), /This node’s claim[\s\S]*no proof/);
  await page.getByRole('button', { name: /compared it/ }).click();
  assert.equal(await page.locator('.claim').count(), 0);
  await page.reload();
  await page.goto(`${PAGE}#/verify?receipt=3`);
  await page.locator('.verdict[data-outcome=verified]').waitFor();
  await pinKey(key.replace(/nonce=./, 'nonce=f').replace(/nonce=ff/, 'nonce=f0'));
  assert.match(await text('.problem'), /its fields give/);
  await page.getByRole('button', { name: 'Remove' }).click();
  assert.equal(await page.locator('.verdict').getAttribute('data-outcome'), 'unknown');
  assert.deepEqual(complaints, []);
});

test('markup in names and documents is text, and a private adapter’s name is not told', async () => {
  for (const section of ['adapters', 'receipts/16', 'receipts']) {
    await open(section);
    assert.equal(await page.locator('main img, main b').count(), 0);
    assert.ok(!(await page.title()).startsWith('1'));
    assert.ok(!(await text()).includes('secret'));
  }
  await open('adapters');
  assert.ok((await text()).includes('<img src=x onerror="document.title=1">'));
  assert.deepEqual(complaints, []);
});

test('every section fits a phone and a desk, in light and dark, and has a heading', async () => {
  for (const [width, colorScheme] of [[360, 'light'], [390, 'dark'], [1200, 'dark']]) {
    await page.setViewportSize({ width, height: 800 });
    await page.emulateMedia({ colorScheme });
    for (const section of SECTIONS) {
      await open(section);
      const [wide, unnamed] = await page.evaluate(() => [
        document.documentElement.scrollWidth - innerWidth,
        [...document.querySelectorAll('a, button, input, textarea')].filter((one) => !(one.innerText || one.ariaLabel || one.labels?.length)).length,
      ]);
      assert.ok(wide <= 0, `${section} at ${width}: ${wide} too wide`);
      assert.equal(unnamed, 0, section);
      assert.equal(await page.getByRole('heading', { level: 1 }).count(), 1, section);
    }
  }
  assert.deepEqual(complaints, []);
});

test('the keyboard is enough to come to a verdict', async () => {
  await open('verify');
  const choosing = page.waitForEvent('filechooser'); // early: the browser is told to leave its own dialog out
  await page.locator('#search input').focus();
  for (let presses = 0; presses < 20; presses += 1) {
    await page.keyboard.press('Tab');
    if (await page.evaluate(() => document.activeElement.id === 'proof')) break;
  }
  await page.keyboard.press('Enter');
  await (await choosing).setFiles(path.join(FILES, 'strangers.tlog-proof'));
  await page.locator('.verdict[data-outcome=unknown]').waitFor();
  assert.deepEqual(complaints, []);
});

test('nothing there yet, nothing configured, nobody answers: each is said', async () => {
  await open('', EMPTY);
  assert.match(await text(), /No receipt log yet/);
  await open('receipts', EMPTY);
  assert.match(await text(), /No receipts yet/);
  await open('adapters', EMPTY);
  assert.match(await text(), /No server runs/);
  await open('epochs', EMPTY);
  assert.match(await text(), /No chain configured/);
  assert.deepEqual(complaints, []);
  await open('receipts/100000');
  assert.match(await text(), /no receipt 100000/);
  await page.route('**/api/**', (route) => route.abort());
  await open('earners');
  assert.match(await text(), /does not answer/);
});
