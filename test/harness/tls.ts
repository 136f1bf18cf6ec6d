import { execFile } from "node:child_process";
import { chmod, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";

const run = promisify(execFile);

/** A key for servers on 127.0.0.1, and a file with the authority that vouches for it, which everybody can read. */
export interface TestAuthority extends AsyncDisposable {
  key: string;
  cert: string;
  file: string;
}

export async function newAuthority(): Promise<TestAuthority> {
  const folder = await mkdtemp(join(tmpdir(), "berth-tls-"));
  const [keyFile, file] = [join(folder, "key.pem"), join(folder, "authority.pem")];
  const options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
  const names = ["-subj", "/CN=berth test", "-addext", "subjectAltName=IP:127.0.0.1"];
  await run("openssl", ["req", "-x509", ...options, ...names, "-keyout", keyFile, "-out", file]);
  await chmod(folder, 0o755);
  return {
    key: await readFile(keyFile, "utf8"),
    cert: await readFile(file, "utf8"),
    file,
    [Symbol.asyncDispose]: () => rm(folder, { recursive: true, force: true }),
  };
}
