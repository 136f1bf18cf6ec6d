import { randomBytes } from "node:crypto";
import { v7 as uuidv7 } from "uuid";
import { ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import { RefusedStart } from "../../domain/errors.ts";
import { SYSTEM } from "../../domain/principal.ts";
import { EXCHANGE_TOKEN_MS } from "../../domain/runner.ts";
import { TokenKind, tokenText } from "../../domain/tokens.ts";
import type { Db } from "../../store/db.ts";
import { findRunners } from "../../store/operator.ts";
import { recordAccess } from "../../store/record.ts";
import { insertToken } from "../../store/tokens.ts";
import { say, tell } from "../output.ts";
import { readOptions, required } from "../usage.ts";
import { type AdminCommand, onInstallation, only } from "./operator.ts";

const OPTIONS = "--runner ID|NAME";
const USAGE = `berth admin runner token ${OPTIONS}`;

async function issueExchangeToken(db: Db, runner: { id: string; organizationId: string }): Promise<string> {
  const at = new Date();
  const text = tokenText(TokenKind.RUNNER_EXCHANGE, randomBytes);
  const { id: runnerId, organizationId } = runner;
  await db.begin(async (tx) => {
    await insertToken(tx, {
      ...{ id: uuidv7(), text, kind: TokenKind.RUNNER_EXCHANGE, organizationId },
      ...{ subjectId: runnerId, subjectPrincipal: Principal.RUNNER, runnerId },
      ...{ createdAt: at, expiresAt: new Date(at.getTime() + EXCHANGE_TOKEN_MS) },
    });
    await recordAccess(tx, {
      ...{ id: uuidv7(), organizationId, actor: SYSTEM, at },
      ...{ subjectId: runnerId, subjectType: ResourceType.RUNNER, action: "Runner exchange token issued" },
    });
  });
  return text;
}

export const runnerTokenCommand: AdminCommand = {
  name: "runner token",
  options: OPTIONS,
  about: "print a credential with which a runner signs in (BERTH_RUNNER_EXCHANGE_TOKEN)",
  async run(args, env) {
    const values = readOptions(USAGE, args, { runner: { type: "string" } });
    const wanted = required(USAGE, "runner", values.runner);
    await onInstallation(env, async (db) => {
      const runner = only(await findRunners(db.point, wanted), "runner", ({ id, name }) => `${id} ${name}`);
      if (!runner) throw new RefusedStart(`there is no runner ${wanted} that has a process`);
      const text = await issueExchangeToken(db, runner);
      tell(`An exchange token of runner ${runner.name}, good for one sign-in within 24 hours; it is shown only here:`);
      say(text);
    });
  },
};
