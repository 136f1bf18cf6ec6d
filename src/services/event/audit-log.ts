import type { ServiceImpl } from "@connectrpc/connect";
import type { EventService, ListAuditLogsRequest_Filter as Filter } from "../../../gen/gitpod/v1/event_pb.js";
import { SortOrder } from "../../../gen/gitpod/v1/pagination_pb.js";
import type { App } from "../../app.ts";
import { denied, invalid } from "../../domain/errors.ts";
import { closePage, openPage } from "../../domain/pages.ts";
import type { Caller } from "../../domain/principal.ts";
import { principal } from "../../rpc/authenticate.ts";
import { auditEntryMessage, auditPosition, getAuditEntry, listAuditEntries } from "../../store/audit-log.ts";

const SORT_FIELD = "createdAt";

function allow(caller: Caller): void {
  if (!caller.orgAdmin && !caller.auditReader) throw denied("only admins and readers of the audit log may read it");
}

function checkRange({ from, to }: Filter): void {
  if (!from || !to) return;
  const isBefore = from.seconds === to.seconds ? from.nanos < to.nanos : from.seconds < to.seconds;
  if (!isBefore) throw invalid({ field: "filter.from", message: "must be before filter.to" });
}

/** The audit log, for admins of the organization and whoever holds ORG_AUDIT_LOG_READER. */
export function auditLog(app: App) {
  return {
    async listAuditLogs({ filter, sort, pagination }, context) {
      const caller = principal(context);
      allow(caller);
      if (filter) checkRange(filter);
      if (sort?.field && sort.field !== SORT_FIELD) {
        throw invalid({ field: "sort.field", message: `must be ${SORT_FIELD}` });
      }
      const page = openPage(pagination, ["audit log", caller.id, filter, sort]);
      const ascending = sort?.order === SortOrder.ASC;
      const rows = await listAuditEntries(app.db.list, caller, filter, ascending, page);
      const { items, nextToken } = closePage(page, rows, auditPosition);
      return { entries: items.map(auditEntryMessage), pagination: { nextToken } };
    },
    async getAuditLog({ auditLogEntryId }, context) {
      const caller = principal(context);
      allow(caller);
      return { entry: auditEntryMessage(await getAuditEntry(app.db.point, caller, auditLogEntryId)) };
    },
  } satisfies Pick<ServiceImpl<typeof EventService>, "listAuditLogs" | "getAuditLog">;
}
