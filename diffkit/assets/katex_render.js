// stdin: [[tex, display], ...]; stdout: [{html} | {error}, ...]
// argv[2]: the folder of the unpacked katex package
const katex = require(process.argv[2] + "/dist/katex.js");
const jobs = JSON.parse(require("fs").readFileSync(0, "utf8"));
const draw = ([tex, displayMode]) => {
  const options = { displayMode, throwOnError: true, strict: "ignore", trust: false };
  try {
    return { html: katex.renderToString(tex, options) };
  } catch (e) {
    return { error: String(e.message || e) };
  }
};
process.stdout.write(JSON.stringify(jobs.map(draw)));
