import { randomBytes } from "node:crypto";
import { v7 as uuidv7 } from "uuid";
import { ResourceOperation, ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import { UserStatus } from "../../../gen/gitpod/v1/user_pb.js";
import { RefusedStart } from "../../domain/errors.ts";
import { SYSTEM } from "../../domain/principal.ts";
import { TokenKind, tokenText } from "../../domain/tokens.ts";
import type { Db } from "../../store/db.ts";
import { findOrganizations, findUsersByEmail, type UserRef } from "../../store/operator.ts";
import { record } from "../../store/record.ts";
import { insertToken } from "../../store/tokens.ts";
import { say, tell } from "../output.ts";
import { readOptions, required, wholeNumber } from "../usage.ts";
import { type AdminCommand, onInstallation, only } from "./operator.ts";

const OPTIONS = "--email ADDRESS [--organization ID|NAME] [--days 1-90] [--description TEXT] [--read-only]";
const USAGE = `berth admin token create ${OPTIONS}`;
const DAY_MS = 24 * 60 * 60_000;

async function findUser(db: Db, email: string, organization: string | undefined): Promise<UserRef> {
  const organizations = organization && (await findOrganizations(db.point, organization)).map(({ id }) => id);
  const found = (await findUsersByEmail(db.point, { email })).filter(
    (user) => user.status === UserStatus.ACTIVE && (!organizations || organizations.includes(user.organization.id)),
  );
  const user = only(found, "organization", ({ organization: { id, name } }) => `${id} ${name}`);
  if (!user) throw new RefusedStart(`no active user has the address ${email}: berth admin restore makes one an admin`);
  return user;
}

async function createToken(
  db: Db,
  { id: userId, organization }: UserRef,
  options: { description: string; days: number; readOnly: boolean },
): Promise<string> {
  const [tokenId, at] = [uuidv7(), new Date()];
  const text = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
  await db.begin(async (tx) => {
    await insertToken(tx, {
      ...{ id: tokenId, text, kind: TokenKind.PERSONAL_ACCESS, organizationId: organization.id },
      ...{ subjectId: userId, subjectPrincipal: Principal.USER },
      ...{ description: options.description, readOnly: options.readOnly },
      ...{ createdAt: at, expiresAt: new Date(at.getTime() + options.days * DAY_MS) },
    });
    await record(tx, {
      organizationId: organization.id,
      resourceType: ResourceType.PERSONAL_ACCESS_TOKEN,
      resourceId: tokenId,
      operation: ResourceOperation.CREATE,
      creatorId: userId,
      at,
      audit: { id: uuidv7(), actor: SYSTEM, action: "Personal access token created" },
    });
  });
  return text;
}

export const tokenCreateCommand: AdminCommand = {
  name: "token create",
  options: OPTIONS,
  about: "print a personal access token for a user, valid for 30 days unless told otherwise",
  async run(args, env) {
    const values = readOptions(USAGE, args, {
      email: { type: "string" },
      organization: { type: "string" },
      days: { type: "string", default: "30" },
      description: { type: "string", default: "Created by the operator" },
      "read-only": { type: "boolean", default: false },
    });
    const email = required(USAGE, "email", values.email);
    const { description, "read-only": readOnly } = values;
    const days = wholeNumber("days", values.days, 1, 90);
    await onInstallation(env, async (db) => {
      const user = await findUser(db, email, values.organization);
      const text = await createToken(db, user, { description: description.slice(0, 255), days, readOnly });
      tell(`A token of ${email} in ${user.organization.name}, valid for ${days} days; it is shown only here:`);
      say(text);
    });
  },
};
