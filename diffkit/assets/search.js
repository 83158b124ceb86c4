// Search of the static site, with the small part of Fuse's interface that the page's script calls.
// Where MiniSearch was packed into this file it finds misspelled words too; else every word of the
// query must occur. A paper that is named by its method, author or number comes first, then names
// of the library, then titles, then text.
window.Fuse = class {
  constructor(entries) {
    const low = (s) => (s || "").toLowerCase();
    this.entries = entries.map((e, id) => ({
      id, item: e, title: low(e.title), section: low(e.section), text: low(e.text),
      keywords: low((e.keywords || []).join(" ")), names: (e.keywords || []).map(low),
    }));
    if (!window.MiniSearch) return;
    this.mini = new window.MiniSearch({ fields: ["title", "section", "keywords", "text"] });
    this.mini.addAll(this.entries);
  }

  rank(e, whole) { // what a query that names it exactly deserves
    // the page that is about little else first
    if (e.names.some((n) => n === whole)) return 4 + 1 / e.names.length;
    if (e.section === whole) return 3;
    if (e.names.some((n) => n.split(/[\s-]+/).includes(whole))) return 2;
    if (e.title === whole || e.names.some((n) => n.includes(whole))) return 1;
    return 0;
  }

  plain(words) { // every word must occur
    const score = (field, word, weight) => {
      const i = field.indexOf(word);
      if (i < 0) return 0;
      const letter = /[a-z0-9_]/, end = i + word.length;
      const starts = i === 0 || !letter.test(field[i - 1]);
      const ends = end === field.length || !letter.test(field[end]);
      return weight * (starts && ends ? 4 : starts ? 2 : 1);
    };
    const hits = [];
    for (const e of this.entries) {
      const scores = words.map((w) => score(e.section, w, 10) + score(e.keywords, w, 8)
        + score(e.title, w, 4) + score(e.text, w, 1));
      if (scores.every((s) => s)) hits.push({ e, score: scores.reduce((a, b) => a + b, 0) });
    }
    return hits;
  }

  fuzzy(query) {
    const options = {
      combineWith: "AND", boost: { section: 4, keywords: 4, title: 3 },
      prefix: (w) => w.length > 2, fuzzy: (w) => (w.length > 4 ? 0.3 : false),
    };
    return this.mini.search(query, options)
      .map((r) => ({ e: this.entries[r.id], score: r.score }));
  }

  search(query, { limit = 20 } = {}) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean), whole = words.join(" ");
    let hits = this.plain(words);
    if (this.mini && hits.length < 5) {
      const seen = new Set(hits.map((h) => h.e));
      const least = Math.min(1, ...hits.map((h) => h.score));
      const more = this.fuzzy(query).filter((h) => !seen.has(h.e));
      const most = Math.max(1, ...more.map((h) => h.score));
      hits = hits.concat(more.map((h) => ({ e: h.e, score: least * h.score / (most + 1) })));
    }
    return hits.map((h) => ({ item: h.e.item, score: h.score + 1000 * this.rank(h.e, whole) }))
      .sort((a, b) => b.score - a.score).slice(0, limit);
  }
};
