// Compiles the publishable package. Usage: node scripts/build.ts [OUT]; OUT, by default dist, is replaced.
import { spawnSync } from "node:child_process";
import { cpSync, rmSync } from "node:fs";
import { join, resolve } from "node:path";

const root = join(import.meta.dirname, "..");
const out = resolve(process.argv[2] ?? join(root, "dist"));

rmSync(out, { recursive: true, force: true });
const tsc = spawnSync(join(root, "node_modules/.bin/tsc"), ["-p", "tsconfig.build.json", "--outDir", out], {
  cwd: root,
  stdio: "inherit",
});
if (tsc.error) throw tsc.error;
if (tsc.status !== 0) process.exit(tsc.status ?? 1);

cpSync(join(root, "gen"), join(out, "gen"), { recursive: true });
cpSync(join(root, "src/store/migrations"), join(out, "src/store/migrations"), { recursive: true });
