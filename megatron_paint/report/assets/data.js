// The data of the report, and its pages of samples and answers: in this file, beside it, or from the server of a live report.
"use strict";
(() => {
  const MOST_PAGES = 24; // that are kept in memory
  const parse = (id) => JSON.parse(document.getElementById(id).textContent);
  paint.data = parse("report-data");
  const inline = parse("report-pages");
  const cache = new Map(); // key -> promise of a page
  const waiting = new Map(); // key -> what to call with the text of a page

  const decode = async (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };

  // A browser that has opened a file from disk reads other files only as scripts. Only names of pages become addresses.
  const PAGE = /^r\d+_e?\d+_\d+$/;
  const addresses = window.trustedTypes
    ? trustedTypes.createPolicy("pages", {
        createScriptURL: (address) => {
          const prefix = `${encodeURIComponent(paint.data.pages)}/`;
          const key = address.slice(prefix.length, -3);
          if (address !== `${prefix}${key}.js` || !PAGE.test(key)) throw new TypeError(`No page: ${address}`);
          return address;
        },
      })
    : { createScriptURL: (address) => address };

  paint.receivePage = (key, text) => {
    const found = waiting.get(key);
    waiting.delete(key);
    if (found) found(text);
  };

  const fromScript = (key) =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.nonce = document.querySelector("script[nonce]").nonce;
      waiting.set(key, resolve);
      script.onload = () => script.remove();
      script.onerror = () => {
        waiting.delete(key);
        script.remove();
        reject(new Error(`${paint.data.pages}/${key}.js cannot be read: keep this folder beside the report`));
      };
      script.src = addresses.createScriptURL(`${encodeURIComponent(paint.data.pages)}/${key}.js`);
      document.head.append(script);
    });

  const fromServer = async (key) => {
    const answer = await fetch(`/pages/${key}`);
    if (!answer.ok) throw new Error(`the server has no page ${key}`);
    return answer.text();
  };

  const load = async (key) => {
    if (!PAGE.test(key)) throw new Error(`there is no page ${key}`);
    if (key in inline) return decode(inline[key]);
    return decode(await (paint.data.live ? fromServer(key) : fromScript(key)));
  };

  paint.page = (key) => {
    const known = cache.get(key);
    if (known) {
      cache.delete(key); // the newest key is the last one
      cache.set(key, known);
      return known;
    }
    const promise = load(key);
    promise.catch(() => cache.delete(key));
    cache.set(key, promise);
    if (cache.size > MOST_PAGES) cache.delete(cache.keys().next().value);
    return promise;
  };
  paint.forgetPages = () => cache.clear();
  // Reads a page for a moment: a search passes all pages, and should not push out those that are looked at.
  paint.passingPage = (key) => cache.get(key) ?? load(key);

  // The rows of a list are columns of equal length, as in paint.data.samples.
  paint.pageKey = (rows, index) => `r${rows.run[index]}_${rows.page[index]}`;
  paint.entry = async (rows, index) => {
    const page = await paint.page(paint.pageKey(rows, index));
    return { ...page.entries[rows.place[index]], texts: page.tokens };
  };

  // Whether a row has a value in this column: one of this run, or of any. No sample selects tokens: the column is empty.
  paint.known = (rows, name, run = null) => {
    const isValue = (value) => value !== null && !(name === "selected" && value === 0);
    return (rows[name] ?? []).some((value, index) => isValue(value) && (run === null || rows.run[index] === run));
  };

  // The rows that have the same values in these columns as this row, which is one of them.
  paint.alike = (rows, index, names) => {
    const belongs = (other) => names.every((name) => rows[name][other] === rows[name][index]);
    return rows.run.map((_, other) => other).filter(belongs);
  };

  const addressesOf = ({ run, page, place }) => run.map((number, index) => `${number}/${page[index]}/${place[index]}`);
  // The new index of each old row. New rows of one run move those of the runs after it. A row that is gone has none.
  paint.movedRows = (before, after) => {
    const indices = new Map(addressesOf(after).map((address, index) => [address, index]));
    return addressesOf(before).map((address) => indices.get(address));
  };
})();
