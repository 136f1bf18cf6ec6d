import { toJson } from "@bufbuild/protobuf";
import { ListAuditLogsResponse_AuditLogEntrySchema } from "../../../gen/gitpod/v1/event_pb.js";
import { RefusedStart } from "../../domain/errors.ts";
import { auditEntryMessage, type ExportedEntry, exportAuditEntries } from "../../store/audit-log.ts";
import type { Db } from "../../store/db.ts";
import { findOrganizations } from "../../store/operator.ts";
import { pour } from "../output.ts";
import { readOptions, time } from "../usage.ts";
import { type AdminCommand, onInstallation, only } from "./operator.ts";

const OPTIONS = "[--organization ID|NAME] [--from TIME] [--to TIME]";
const BATCH = 1000;
const FIRST = "00000000-0000-0000-0000-000000000000";

/** One line of JSON: an entry as the API shows it, with the credential that it was done with. */
function lineOf({ organizationId, credentialId, issuerId, ...entry }: ExportedEntry): string {
  const shown = toJson(ListAuditLogsResponse_AuditLogEntrySchema, auditEntryMessage(entry)) as object;
  return `${JSON.stringify({ organizationId, ...shown, credentialId, issuerId })}\n`;
}

async function* lines(db: Db, accept: (entry: ExportedEntry) => boolean): AsyncGenerator<string> {
  for (let after = FIRST; ; ) {
    const entries = await exportAuditEntries(db.list, after, BATCH);
    for (const entry of entries) if (accept(entry)) yield lineOf(entry);
    const last = entries.at(-1);
    if (!last || entries.length < BATCH) return;
    after = last.id;
  }
}

export const auditExportCommand: AdminCommand = {
  name: "audit export",
  options: OPTIONS,
  about: "print the audit log as lines of JSON, oldest first; from is inclusive, to exclusive",
  async run(args, env) {
    const text = { type: "string" } as const;
    const values = readOptions(`berth admin audit export ${OPTIONS}`, args, {
      organization: text,
      from: text,
      to: text,
    });
    const [from, to] = [time("from", values.from), time("to", values.to)];
    await onInstallation(env, async (db) => {
      const wanted = values.organization;
      const found = wanted === undefined ? [] : await findOrganizations(db.point, wanted);
      const organization = only(found, "organization", ({ id, name }) => `${id} ${name}`);
      if (wanted !== undefined && !organization) throw new RefusedStart("there is no such organization");
      const accept = ({ organizationId, createdAt }: ExportedEntry) =>
        (!organization || organizationId === organization.id) &&
        (!from || createdAt >= from) &&
        (!to || createdAt < to);
      await pour(lines(db, accept));
    });
  },
};
