// Prints "N passed, N failed" and, if any were, "N skipped". Ends with the runner's exit code, or 1 if no test passed.
// Usage: node scripts/count-tests.mjs RESULTS EXIT_CODE, where RESULTS is written by vitest's JSON reporter.
import { readFileSync } from "node:fs";

const [path, exitCode] = process.argv.slice(2);
const code = Number(exitCode);

function readResults() {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch {
    return { numPassedTests: 0, numFailedTests: 0, numPendingTests: 0, numTodoTests: 0, testResults: [] };
  }
}

const results = readResults();
// A file that does not load, or whose hooks fail, has failed without a failed test.
const failedFiles = results.testResults.filter(
  (file) => file.status === "failed" && !file.assertionResults.some((test) => test.status === "failed"),
);
const passed = results.numPassedTests;
const skipped = results.numPendingTests + results.numTodoTests;
// Errors outside of tests, and a runner that died, show in the exit code alone.
const failed = results.numFailedTests + failedFiles.length || (code === 0 ? 0 : 1);
console.log(`${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ""}`);
process.exit(code || (passed > 0 && failed === 0 ? 0 : 1));
