import { randomBytes } from "node:crypto";
import { v7 as uuidv7 } from "uuid";
import { UserStatus } from "../../../gen/gitpod/v1/user_pb.js";
import { RefusedStart } from "../../domain/errors.ts";
import { SYSTEM } from "../../domain/principal.ts";
import { TokenKind, tokenText } from "../../domain/tokens.ts";
import type { Db } from "../../store/db.ts";
import { findOrganizations, findUsersByEmail, type UserRef } from "../../store/operator.ts";
import { issuePersonalAccessToken } from "../../store/personal-access-tokens.ts";
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
  const text = tokenText(TokenKind.PERSONAL_ACCESS, randomBytes);
  const { days, ...more } = options;
  const token = { id: uuidv7(), text, organizationId: organization.id, userId, ...more, validForMs: days * DAY_MS };
  const by = { actor: SYSTEM, newId: uuidv7, at: new Date() };
  await db.begin((tx) => issuePersonalAccessToken(tx, token, by));
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
