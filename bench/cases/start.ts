import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { chmod, chown, mkdir, mkdtemp, rm } from "node:fs/promises";
import { type IncomingMessage, request } from "node:http";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { IdentityService } from "../../gen/gitpod/v1/identity_pb.js";
import { TokenKind, tokenText } from "../../src/domain/tokens.ts";
import { freePort } from "../../test/harness/free-port.ts";
import type { Bench } from "../bench.ts";
import { interleaved, medianOf, ratioOf } from "../measure.ts";
import { runningPostgres, start } from "../processes.ts";
import type { Row } from "../report.ts";

const MAIN = fileURLToPath(new URL("../../src/main.ts", import.meta.url));
const INITDB = ["-U", "berth", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"];

interface Times {
  /** Without data: the program, and what initdb alone takes. */
  freshMs: number;
  initdbMs: number;
  /** With data: the program, and what Node and Postgres alone take, one after the other. */
  againMs: number;
  floorMs: number;
}

async function firstCall(port: number, token: string): Promise<void> {
  const path = `/${IdentityService.typeName}/${IdentityService.method.getAuthenticatedIdentity.name}`;
  const headers = { "content-type": "application/json", authorization: `Bearer ${token}` };
  const call = request({ host: "127.0.0.1", port, path, method: "POST", headers, agent: false }).end("{}");
  const [response] = (await once(call, "response")) as [IncomingMessage];
  response.resume();
  await once(response, "end");
  if (response.statusCode !== 200) throw new Error(`the first call was answered with ${response.statusCode}`);
}

async function measure(): Promise<Times> {
  const folder = await mkdtemp(join(tmpdir(), "berth-start-"));
  await chmod(folder, 0o711);
  const dataDir = join(folder, "data");
  const token = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
  const port = await freePort();
  const env = {
    PATH: process.env.PATH,
    HOME: process.env.HOME,
    BERTH_DATA_DIR: dataDir,
    BERTH_PORT: String(port),
    BERTH_RUNNER: "off",
    BERTH_BOOTSTRAP_ADMIN_TOKEN: token,
  };
  const berth = async () => {
    const from = performance.now();
    const started = await start({ command: process.execPath, args: [MAIN], env }, "berth is ready");
    await firstCall(port, token);
    return { ...started, ms: performance.now() - from };
  };
  try {
    const fresh = await berth();
    const postgres = await runningPostgres(dataDir);
    await fresh.stop("SIGTERM");
    const again = await berth();
    await again.stop("SIGTERM");
    const node = await start({ command: process.execPath, args: ["-e", "0"] });
    const server = await start(postgres, "ready to accept connections");
    await server.stop("SIGINT");
    const empty = join(folder, "empty");
    await mkdir(empty, { mode: 0o700 });
    if (postgres.uid !== undefined) await chown(empty, postgres.uid, postgres.gid ?? postgres.uid);
    const command = join(dirname(postgres.command), "initdb");
    const initdb = await start({ ...postgres, command, args: ["-D", empty, ...INITDB] });
    return { freshMs: fresh.ms, initdbMs: initdb.ms, againMs: again.ms, floorMs: node.ms + server.ms };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** From the start of the program to the answer of the first call, without a runner. */
export async function startUp(bench: Bench): Promise<Row[]> {
  const { times } = await interleaved(bench.rounds, { times: measure });
  const row = (figure: (each: Times) => number, floor: (each: Times) => number) => ({
    ...{ unit: "ms" as const, figure: medianOf(times, figure), floor: medianOf(times, floor) },
    ratio: ratioOf(times.map(figure), times.map(floor), Number),
  });
  return [
    {
      operation: "start to first call, with data",
      ...row(
        (each) => each.againMs,
        (each) => each.floorMs,
      ),
      goal: { bound: "<=", value: 450, of: "figure" },
      note: "floor: node -e 0, then Postgres until it is ready",
    },
    {
      operation: "start to first call, fresh",
      ...row(
        (each) => each.freshMs,
        (each) => each.initdbMs,
      ),
      goal: { bound: "<=", value: 2.05 },
      note: "floor: initdb alone",
    },
  ];
}
