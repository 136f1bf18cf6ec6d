import { defineConfig } from "vitest/config";
import type { Reporter } from "vitest/node";

/** A run in which every test was skipped has shown nothing, so it fails as one without files does. */
const somethingRan: Reporter = {
  onTestRunEnd(modules) {
    const ran = modules.some((module) =>
      [...module.children.allTests()].some((test) => test.result().state !== "skipped"),
    );
    if (!ran) process.exitCode = 1;
  },
};

export default defineConfig({
  test: {
    environment: "node",
    include: ["test/**/*.test.ts"],
    globalSetup: ["test/harness/database.ts"],
    testTimeout: 60_000,
    hookTimeout: 60_000,
    teardownTimeout: 60_000,
    pool: "forks",
    // Each file may start a database of its own.
    maxWorkers: 2,
    reporters: ["default", somethingRan],
    watch: false,
    passWithNoTests: false,
    // A forgotten `.only` would pass without running the rest.
    allowOnly: false,
  },
});
