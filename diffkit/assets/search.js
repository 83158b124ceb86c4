// Search of the static site: every word must occur; names come before titles, titles before text. It has the small part of the interface of Fuse that the page's script calls.
window.Fuse = class {
  constructor(entries) {
    this.entries = entries.map((e) => ({ item: e, section: (e.section || "").toLowerCase(), title: (e.title || "").toLowerCase(), text: (e.text || "").toLowerCase() }));
  }
  search(query, { limit = 20 } = {}) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean), whole = words.join(" "), hits = [];
    const score = (field, word, weight) => {
      const i = field.indexOf(word);
      if (i < 0) return 0;
      const start = i === 0 || !/[a-z0-9_]/.test(field[i - 1]), end = i + word.length === field.length || !/[a-z0-9_]/.test(field[i + word.length]);
      return weight * (start && end ? 4 : start ? 2 : 1);
    };
    for (const e of this.entries) {
      let total = e.section === whole ? 200 : e.title === whole ? 100 : 0, all = true;
      for (const w of words) {
        const s = score(e.section, w, 10) + score(e.title, w, 4) + score(e.text, w, 1);
        if (!s) { all = false; break; }
        total += s;
      }
      if (all) hits.push({ item: e.item, score: total });
    }
    return hits.sort((a, b) => b.score - a.score).slice(0, limit);
  }
};
