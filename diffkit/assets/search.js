// Search of the static site, with the small part of Fuse's interface that the page's script calls.
// MiniSearch, packed into this file where npm was there, finds words, their beginnings and their
// misspellings; without it every word of the query must occur. What a query names exactly comes
// first: a paper by its method, author or number, then a name of the library.
window.Fuse = class {
  constructor(entries) {
    const low = (s) => (s || "").toLowerCase();
    this.entries = entries.map((e, id) => ({
      id, item: e, title: e.title, section: e.section, text: e.text,
      keywords: (e.keywords || []).join(" \n "), names: (e.keywords || []).map(low),
    }));
    if (!window.MiniSearch) return;
    // DPMSolverPP is found as a whole and by its parts
    const parts = (w) => w.split(/(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])/);
    const words = (s) => s.split(/[\s\p{P}]+/u).filter(Boolean);
    this.mini = new window.MiniSearch({
      fields: ["section", "keywords", "title", "text"],
      tokenize: (s) => words(s).flatMap((w) => (parts(w).length > 1 ? [w, ...parts(w)] : [w])),
      searchOptions: {
        tokenize: words, combineWith: "AND",
        boost: { section: 4, keywords: 6, title: 3 },
        prefix: (w, i, all) => i === all.length - 1 || w.length > 2,
        fuzzy: (w) => (w.length > 4 ? 0.3 : false),
        boostDocument: (id) => (this.entries[id].names.length ? 2 : 1),
      },
    });
    this.mini.addAll(this.entries);
  }

  rank(e, whole) { // what a query deserves that names an entry exactly
    // of several pages under one name the one that is about little else
    if (e.names.includes(whole)) return 4 + 1 / e.names.length;
    if ((e.section || "").toLowerCase() === whole) return 3;
    if (e.names.some((n) => n.split(/[\s-]+/).includes(whole))) return 2;
    if (e.names.some((n) => n.includes(whole))) return 1;
    return 0;
  }

  plain(words) { // every word must occur; whole words before beginnings before parts
    const score = (field, word, weight) => {
      const text = (field || "").toLowerCase(), i = text.indexOf(word), end = i + word.length;
      if (i < 0) return 0;
      const letter = /[a-z0-9_]/, starts = i === 0 || !letter.test(text[i - 1]);
      const ends = end === text.length || !letter.test(text[end]);
      return weight * (starts && ends ? 4 : starts ? 2 : 1);
    };
    return this.entries.map((e) => {
      const scores = words.map((w) => score(e.section, w, 10) + score(e.keywords, w, 8)
        + score(e.title, w, 4) + score(e.text, w, 1));
      return { id: e.id, score: scores.every((s) => s) ? scores.reduce((a, b) => a + b, 0) : 0 };
    }).filter((hit) => hit.score);
  }

  search(query, { limit = 20 } = {}) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean), whole = words.join(" ");
    const hits = this.mini ? this.mini.search(query) : this.plain(words);
    return hits.map(({ id, score }) => ({ entry: this.entries[id], score }))
      .map(({ entry, score }) => ({ entry, rank: this.rank(entry, whole), score }))
      .sort((a, b) => b.rank - a.rank || b.score - a.score)
      .slice(0, limit).map(({ entry, score }) => ({ item: entry.item, score }));
  }
};
