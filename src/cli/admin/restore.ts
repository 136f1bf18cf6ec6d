import { v7 as uuidv7 } from "uuid";
import { RefusedStart } from "../../domain/errors.ts";
import { findOrganizations, type Restored, restoreAdmin } from "../../store/operator.ts";
import { tell } from "../output.ts";
import { readOptions, required, UsageError } from "../usage.ts";
import { type AdminCommand, onInstallation, only } from "./operator.ts";

const OPTIONS = "--email ADDRESS [--organization ID|NAME] [--name NAME]";
const USAGE = `berth admin restore ${OPTIONS}`;

const OUTCOMES: Record<Restored, string> = {
  unchanged: "was an active admin already",
  restored: "is an active admin again",
  added: "was added as an admin",
};

export const restoreCommand: AdminCommand = {
  name: "restore",
  options: OPTIONS,
  about: "make a person an active admin of an organization, whether or not they are in it",
  async run(args, env) {
    const text = { type: "string" } as const;
    const values = readOptions(USAGE, args, { email: text, organization: text, name: text });
    const email = required(USAGE, "email", values.email).toLowerCase();
    if (!/^[^@\s]+@[^@\s]+$/.test(email)) throw new UsageError("--email must be a mail address");
    await onInstallation(env, async (db) => {
      const organizations = await findOrganizations(db.point, values.organization);
      const organization = only(organizations, "organization", ({ id, name }) => `${id} ${name}`);
      if (!organization) throw new RefusedStart("there is no such organization");
      const input = { organizationId: organization.id, email, name: values.name ?? "", at: new Date(), newId: uuidv7 };
      const outcome = await db.begin((tx) => restoreAdmin(tx, input));
      tell(`${email} ${OUTCOMES[outcome]} of ${organization.name}`);
    });
  },
};
