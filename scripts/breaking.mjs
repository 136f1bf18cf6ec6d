// Compares the schema with that of a git revision, by default HEAD, and fails if a client of it would break. The
// validation schema is not in git, so the revision is built beside a rendered one.
import { execFileSync } from "node:child_process";
import { cpSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const revision = process.argv[2] ?? "HEAD";
const folder = mkdtempSync(join(tmpdir(), "berth-breaking-"));
const run = (file, args, options = {}) => execFileSync(file, args, { cwd: root, stdio: "inherit", ...options });

try {
  run("node", ["scripts/render-validate.mjs"]);
  const archive = execFileSync("git", ["archive", "--format=tar", revision, "--", "proto", "buf.yaml"], { cwd: root });
  run("tar", ["-x"], { cwd: folder, input: archive, stdio: ["pipe", "inherit", "inherit"] });
  cpSync(join(root, ".buf"), join(folder, ".buf"), { recursive: true });
  run("buf", ["build", "proto", "-o", "image.binpb"], { cwd: folder });
  run("buf", ["breaking", "proto", "--against", join(folder, "image.binpb")]);
} catch (error) {
  process.exitCode = error.status ?? 1;
} finally {
  rmSync(folder, { recursive: true, force: true });
}
