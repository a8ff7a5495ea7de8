// Settlement in a real browser. PAGE: the address of a page over a node that has settled; EARNER: one that claimed.

import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { launch } from './chromium.mjs';

const { PAGE, EARNER } = process.env;
const complaints = [];
let browser;
let page;

before(async () => {
  browser = await launch();
  page = await browser.newPage();
  page.on('console', (message) => message.type() !== 'log' && complaints.push(message.text()));
  page.on('pageerror', (error) => complaints.push(String(error)));
  page.on('request', (request) => request.url().startsWith(PAGE) || complaints.push(`asked ${request.url()}`));
});
after(() => browser.close());

async function open(section) {
  await page.goto(`${PAGE}#/${section}`);
  await page.waitForSelector('main[aria-busy=false]');
  return page.locator('main').innerText();
}

test('the overview tells how far the log is anchored, and its deposit', async () => {
  assert.match(await open(''), /Anchored\s+84\s+chain 31\u202f?337[\s\S]*Deposited\s+1\u202f000\u202f000\u202f000/);
});

test('earners are listed, and the proof of a claim leads to the accepted root', async () => {
  assert.match(await open('earners'), /they give the root that was accepted on chain/);
  await page.getByRole('link', { name: EARNER }).click();
  await page.getByText('Proof of the claim').waitFor();
  assert.equal(await page.locator('.verdict.good').count(), 1);
  assert.match(await open(`earners?wanted=${EARNER.toLowerCase()}`), /1 accounts|Earned/);
});

test('epochs tell their state, their receipts and what was void', async () => {
  const text = await open('epochs');
  assert.match(text, /Epoch 2 pending[\s\S]*50 … 83[\s\S]*status[\s\S]*Epoch 1 accepted[\s\S]*0 … 49/);
});

test('a receipt that can be settled names its block', async () => {
  assert.match(await open('receipts/3'), /Registry\s+chain 31337, block \d+/);
  assert.match(await open('verify?receipt=3'), /Consistent, log unknown/);
});

test('nothing was complained of, and nobody else was asked', () => {
  assert.deepEqual(complaints, []);
});
