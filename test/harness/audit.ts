import type { ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import type { TestPlane } from "./plane.ts";

/** Texts of the audit entries about one resource, in order. */
export async function auditActions({ plane: { app } }: TestPlane, subjectId: string): Promise<string[]> {
  const rows = await app.db.point<{ action: string }[]>`
    select action from audit_log where subject_id = ${subjectId} order by id`;
  return rows.map((row) => row.action);
}

/** How many audit entries and events there are of one type. */
export async function traces(
  { plane: { app } }: TestPlane,
  type: ResourceType,
): Promise<{ audit: number; events: number }> {
  const [row] = await app.db.point<{ audit: number; events: number }[]>`
    select (select count(*)::int from audit_log where subject_type = ${type}) as audit,
      (select count(*)::int from events where resource_type = ${type}) as events`;
  return row ?? { audit: 0, events: 0 };
}
