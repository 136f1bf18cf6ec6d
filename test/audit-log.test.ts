import type { MessageInitShape } from "@bufbuild/protobuf";
import { timestampDate, timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  AuditLogEntryKind,
  type ListAuditLogsResponse_AuditLogEntry as Entry,
  type ListAuditLogsRequest_FilterSchema,
  ResourceType,
} from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { SortOrder } from "../gen/gitpod/v1/pagination_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import type { BerthClient } from "../src/client.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount, share } from "./harness/tenants.ts";

const { PROJECT, RUNNER, SECRET } = ResourceType;
const { USER, SERVICE_ACCOUNT, UNSPECIFIED } = Principal;
type Filter = MessageInitShape<typeof ListAuditLogsRequest_FilterSchema>;

// Long before whatever the plane writes by itself.
const START = Date.UTC(2020, 0, 1);
const [ann, bob] = [uuidv7(), uuidv7()];
const [website, shop, host] = [uuidv7(), uuidv7(), uuidv7()];

let plane: TestPlane;
let admin: BerthClient;
let member: TestUser;
let reader: TestUser;
/** Ids of the entries that this test wrote, oldest first. */
const written: string[] = [];

interface NewEntry {
  actor: string | null;
  principal: Principal;
  subject: string;
  type: ResourceType;
}

async function write(entry: NewEntry, createdAt: Date, organizationId = plane.organizationId): Promise<string> {
  const id = uuidv7();
  await plane.plane.app.db.write`
    insert into audit_log (id, organization_id, actor_id, actor_principal, subject_id, subject_type, kind, action, created_at)
    values (${id}, ${organizationId}, ${entry.actor}, ${entry.principal}, ${entry.subject}, ${entry.type},
      ${AuditLogEntryKind.RESOURCE_CHANGE}, 'changed', ${createdAt})`;
  return id;
}

beforeAll(async () => {
  plane = await startTestPlane();
  admin = plane.admin;
  member = await plane.addUser();
  reader = await plane.addUser();
  const role = ResourceRole.ORG_AUDIT_LOG_READER;
  await share(plane, reader.id, { type: ResourceType.ORGANIZATION, id: plane.organizationId, role });
  const entries: NewEntry[] = [
    { actor: ann, principal: USER, subject: website, type: PROJECT },
    { actor: bob, principal: SERVICE_ACCOUNT, subject: website, type: PROJECT },
    { actor: ann, principal: USER, subject: host, type: RUNNER },
    { actor: null, principal: UNSPECIFIED, subject: host, type: RUNNER },
    { actor: bob, principal: SERVICE_ACCOUNT, subject: shop, type: PROJECT },
    { actor: ann, principal: USER, subject: uuidv7(), type: SECRET },
  ];
  // Two of them at the same moment.
  const seconds = [0, 1, 2, 2, 3, 4];
  for (const [index, entry] of entries.entries())
    written.push(await write(entry, new Date(START + seconds[index]! * 1000)));
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const at = (seconds: number, nanos = 0) => ({ ...timestampFromDate(new Date(START + seconds * 1000)), nanos });
/** Numbers of the entries of this test in a list, in its order. */
const numbers = (entries: readonly Entry[]) => entries.map(({ id }) => written.indexOf(id)).filter((each) => each >= 0);
const list = async (filter: Filter, client = admin) => numbers((await client.events.listAuditLogs({ filter })).entries);
const OLD = { to: at(60) };

describe("who may read it", () => {
  test("PLT-45 a member may not, a group with ORG_AUDIT_LOG_READER may; rows cannot be changed by SQL either", async () => {
    const auditLogEntryId = written[0]!;
    expect(await codeOf(member.client.events.listAuditLogs({}))).toBe("PermissionDenied");
    expect(await codeOf(member.client.events.getAuditLog({ auditLogEntryId }))).toBe("PermissionDenied");
    expect(await codeOf(member.client.events.getAuditLog({ auditLogEntryId: uuidv7() }))).toBe("PermissionDenied");
    expect(await list(OLD, reader.client)).toEqual([5, 4, 3, 2, 1, 0]);
    expect((await reader.client.events.getAuditLog({ auditLogEntryId })).entry?.id).toBe(auditLogEntryId);
    const { db } = plane.plane.app;
    for (const statement of ["update audit_log set action = 'x'", "delete from audit_log"])
      await expect(db.write.unsafe(statement)).rejects.toThrow("immutable");
    expect(await list(OLD)).toHaveLength(6);
  });

  test("a service account with the role may, one without may not", async () => {
    const robot = await addServiceAccount(plane);
    expect(await codeOf(robot.client.events.listAuditLogs({}))).toBe("PermissionDenied");
    const role = ResourceRole.ORG_AUDIT_LOG_READER;
    await share(plane, robot.id, { type: ResourceType.ORGANIZATION, id: plane.organizationId, role });
    expect(await list(OLD, robot.client)).toHaveLength(6);
  });

  test("entries of another organization do not exist", async () => {
    const organizationId = await addOrganization(plane);
    const stranger = await plane.addUser({ organizationId, role: OrganizationRole.ADMIN });
    const entry = { actor: ann, principal: USER, subject: website, type: PROJECT };
    const theirs = await write(entry, new Date(START), organizationId);
    const { entries } = await stranger.client.events.listAuditLogs({ filter: { ...OLD, actorIds: [ann] } });
    expect(entries.map(({ id }) => id)).toEqual([theirs]);
    const unknown = await refusal(admin.events.getAuditLog({ auditLogEntryId: uuidv7() }));
    const foreign = await refusal(admin.events.getAuditLog({ auditLogEntryId: theirs }));
    expect(foreign.rawMessage).toBe(unknown.rawMessage.replace(/[0-9a-f-]{36}/, theirs));
    expect([foreign.code, unknown.code]).toEqual([Code.NotFound, Code.NotFound]);
    expect(await list({ ...OLD, subjectIds: [website] })).toEqual([1, 0]);
  });
});

describe("lists", () => {
  test("an entry says who did what to what when, and stays as it is", async () => {
    const { entry } = await admin.events.getAuditLog({ auditLogEntryId: written[1]! });
    expect(entry).toMatchObject({
      ...{ id: written[1], actorId: bob, actorPrincipal: SERVICE_ACCOUNT, subjectId: website, subjectType: PROJECT },
      ...{ action: "changed", kind: AuditLogEntryKind.RESOURCE_CHANGE },
    });
    expect(timestampDate(entry!.createdAt!).getTime()).toBe(START + 1000);
    const bySystem = await admin.events.getAuditLog({ auditLogEntryId: written[3]! });
    expect(bySystem.entry).toMatchObject({ actorId: "", actorPrincipal: UNSPECIFIED });
    expect(bySystem.details).toBeUndefined();
  });

  test("a change that is made through the API is in it, newest first", async () => {
    const before = await admin.events.listAuditLogs({});
    const { runner } = await admin.runners.createRunner({ name: "Host", provider: RunnerProvider.LINUX_HOST });
    const { entries } = await admin.events.listAuditLogs({});
    const { subject } = await admin.identity.getAuthenticatedIdentity({});
    const made = entries.filter(({ id }) => !before.entries.some((each) => each.id === id));
    expect(new Set(made.map(({ subjectId }) => subjectId))).toEqual(new Set([runner?.runnerId]));
    expect(entries.slice(0, made.length)).toEqual(made);
    expect(made.map(({ actorId, actorPrincipal }) => [actorId, actorPrincipal])).toEqual(
      made.map(() => [subject?.id, USER]),
    );
  });

  test.each<[string, Filter, number[]]>([
    ["nothing", {}, [5, 4, 3, 2, 1, 0]],
    ["an actor", { actorIds: [ann] }, [5, 2, 0]],
    ["two actors, one of them twice and in capitals", { actorIds: [bob, ann, bob.toUpperCase()] }, [5, 4, 2, 1, 0]],
    ["a kind of actor", { actorPrincipals: [SERVICE_ACCOUNT] }, [4, 1]],
    ["the system", { actorPrincipals: [UNSPECIFIED] }, [3]],
    ["a subject", { subjectIds: [website] }, [1, 0]],
    ["several subjects", { subjectIds: [shop, host] }, [4, 3, 2]],
    ["a type of subject", { subjectTypes: [RUNNER] }, [3, 2]],
    ["several types", { subjectTypes: [RUNNER, SECRET, RUNNER] }, [5, 3, 2]],
    ["everything at once", { actorIds: [ann, bob], actorPrincipals: [USER], subjectTypes: [PROJECT] }, [0]],
    ["an actor who did nothing", { actorIds: [uuidv7()] }, []],
    ["an actor under another kind", { actorIds: [ann], actorPrincipals: [SERVICE_ACCOUNT] }, []],
  ])("by %s", async (_what, filter, expected) => {
    expect(await list({ ...filter, ...OLD })).toEqual(expected);
  });

  test("PLT-45 `from` is inclusive, `to` exclusive, both to the nanosecond", async () => {
    expect(await list({ from: at(1), to: at(3) })).toEqual([3, 2, 1]);
    expect(await list({ from: at(1, 1), to: at(3, 1) })).toEqual([4, 3, 2]);
    expect(await list({ from: at(2), to: at(2, 1) })).toEqual([3, 2]);
    const last = { seconds: 253_402_300_799n, nanos: 999_999_999 };
    expect(await list({ from: { seconds: -62_135_596_800n }, to: last })).toHaveLength(6);
  });

  test("an empty range, another sort field and a foreign filter are refused, and named", async () => {
    const fieldOf = async (call: Promise<unknown>) => violatedFields(await refusal(call));
    for (const to of [at(2), at(1, 999_999_999)])
      expect(await fieldOf(admin.events.listAuditLogs({ filter: { from: at(2), to } }))).toEqual(["filter.from"]);
    expect(await fieldOf(admin.events.listAuditLogs({ sort: { field: "action" } }))).toEqual(["sort.field"]);
    const many = Array.from({ length: 26 }, () => uuidv7());
    expect(await codeOf(admin.events.listAuditLogs({ filter: { actorIds: many } }))).toBe("InvalidArgument");
  });

  test("by time in both directions, page by page, also where two entries share a moment", async () => {
    const filters: Filter[] = [OLD, { ...OLD, actorPrincipals: [USER, SERVICE_ACCOUNT, UNSPECIFIED] }];
    for (const filter of filters) {
      for (const direction of [SortOrder.UNSPECIFIED, SortOrder.DESC, SortOrder.ASC]) {
        const sort = { field: "createdAt", order: direction };
        const found: number[] = [];
        let token = "";
        do {
          const page = await admin.events.listAuditLogs({ filter, sort, pagination: { pageSize: 1, token } });
          expect(page.entries).toHaveLength(1);
          found.push(...numbers(page.entries));
          token = page.pagination?.nextToken ?? "";
        } while (token);
        expect(found).toEqual(direction === SortOrder.ASC ? [0, 1, 2, 3, 4, 5] : [5, 4, 3, 2, 1, 0]);
      }
    }
  });

  test("a token belongs to its caller, filter and order", async () => {
    const pagination = { pageSize: 1 };
    const first = await admin.events.listAuditLogs({ filter: OLD, pagination });
    const token = first.pagination!.nextToken;
    const again = { pagination: { ...pagination, token }, filter: OLD };
    expect(numbers((await admin.events.listAuditLogs(again)).entries)).toEqual([4]);
    expect(await codeOf(reader.client.events.listAuditLogs(again))).toBe("InvalidArgument");
    expect(await codeOf(admin.events.listAuditLogs({ ...again, filter: {} }))).toBe("InvalidArgument");
    expect(await codeOf(admin.events.listAuditLogs({ ...again, sort: { order: SortOrder.ASC } }))).toBe(
      "InvalidArgument",
    );
  });
});
