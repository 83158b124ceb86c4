// stdin: [[tex, display], ...]; stdout: [{html} | {error}, ...]; argv[2]: the folder of the unpacked katex package
const katex = require(process.argv[2] + "/dist/katex.js");
const jobs = JSON.parse(require("fs").readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(jobs.map(([tex, display]) => {
  try { return { html: katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: "ignore", trust: false }) }; }
  catch (e) { return { error: String(e.message || e) }; }
})));
