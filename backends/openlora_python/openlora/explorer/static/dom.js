// Builds elements. Text only ever becomes text nodes, so markup in names and documents stays what it is: characters.

/** An element; properties beginning with "on" are listeners, others attributes (null and false: none). */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? '' : String(value));
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** A list of terms and what is said of each: [[term, child], …]. */
export const facts = (entries) =>
  element('dl', { class: 'facts' }, entries.flatMap(([term, ...said]) => [element('dt', {}, term), element('dd', {}, ...said)]));

/** Hexadecimal in full, which wraps and can be selected with one click. */
export const hash = (text) => element('code', { class: 'hash' }, text);

/** The beginning of a hash, with the whole as its title. */
export const short = (text, length = 10) => element('code', { title: text }, text.length > length ? `${text.slice(0, length)}…` : text);

export const pill = (text, kind) => element('span', { class: `pill ${kind}` }, text);

export const empty = (title, ...words) => element('div', { class: 'empty' }, element('h2', {}, title), element('p', {}, ...words));

export const link = (href, ...children) => element('a', { href }, ...children);

/** A table whose cells know their column's name, so that narrow screens can show rows as cards. */
export function table(caption, columns, rows) {
  const head = columns.map(({ title, kind }) => element('th', { scope: 'col', class: kind }, title));
  const body = rows.map((cells) =>
    element('tr', {}, cells.map((cell, place) =>
      element('td', { 'data-label': columns[place].title, class: columns[place].kind }, element('div', {}, cell)))));
  return element('div', { class: 'table' },
    element('table', {}, element('caption', {}, caption), element('thead', {}, element('tr', {}, head)), element('tbody', {}, body)));
}
