import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import { ResourceRole } from "../gen/gitpod/v1/group_pb.js";
import { OrganizationRole } from "../gen/gitpod/v1/organization_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { UserStatus } from "../gen/gitpod/v1/user_pb.js";
import { removeFromGroups, syncBuiltInGroups } from "../src/store/groups.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf } from "./harness/refusal.ts";
import { addServiceAccount, share } from "./harness/tenants.ts";

let plane: TestPlane;

beforeAll(async () => {
  plane = await startTestPlane();
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

/** Names of the built-in groups that somebody is in. */
async function builtIn(memberId: string): Promise<string[]> {
  const rows = await plane.plane.app.db.point<{ name: string }[]>`
    select g.name from group_members m join groups g on g.id = m.group_id
    where m.member_id = ${memberId} and g.system_managed order by g.name`;
  return rows.map(({ name }) => name);
}

/** What whoever changes a user or service account has to do, in the same transaction. */
async function changed(memberId: string): Promise<void> {
  const member = { organizationId: plane.organizationId, memberId };
  const { app } = plane.plane;
  await app.db.begin((tx) => syncBuiltInGroups(tx, member, { newId: uuidv7, at: app.now() }));
  app.hub.wake("events");
}

describe("built-in groups", () => {
  test("follow status and role of users and the end of service accounts, and tell only when something changed", async () => {
    const { db } = plane.plane.app;
    const user = await plane.addUser({ role: OrganizationRole.ADMIN });
    const robot = await addServiceAccount(plane);
    expect([await builtIn(user.id), await builtIn(robot.id)]).toEqual([["org-admins", "org-members"], ["org-members"]]);

    await db.write`update users set role = ${OrganizationRole.MEMBER} where id = ${user.id}`;
    await changed(user.id);
    expect(await builtIn(user.id)).toEqual(["org-members"]);

    const stream = await watchEvents(plane.admin);
    const told = async () => {
      const runner = await plane.admin.runners.createRunner({ name: "last", provider: RunnerProvider.LINUX_HOST });
      await stream.next(eventText(ResourceType.RUNNER, ResourceOperation.CREATE, runner.runner?.runnerId ?? ""));
      return stream.events.filter((text) => text.startsWith("GROUP_MEMBERSHIP_CHANGED")).length;
    };
    await changed(user.id);
    expect(await told()).toBe(0);
    await db.write`update users set status = ${UserStatus.SUSPENDED} where id = ${user.id}`;
    await changed(user.id);
    expect(await builtIn(user.id)).toEqual([]);
    expect(await told()).toBe(1);
    stream.stop();

    await db.write`update service_accounts set suspended = true where id = ${robot.id}`;
    await changed(robot.id);
    expect(await builtIn(robot.id)).toEqual([]);
  });

  test("whoever leaves is in no group any more, and what was shared with them directly has ended", async () => {
    const { app } = plane.plane;
    const { runner } = await plane.admin.runners.createRunner({ name: "shared", provider: RunnerProvider.LINUX_HOST });
    const runnerId = runner?.runnerId ?? "";
    const user: TestUser = await plane.addUser();
    await share(plane, user.id, { type: ResourceType.RUNNER, id: runnerId, role: ResourceRole.RUNNER_USER });
    expect((await user.client.runners.getRunner({ runnerId })).runner?.runnerId).toBe(runnerId);

    const stream = await watchEvents(user.client);
    await app.db.begin((tx) =>
      removeFromGroups(tx, { organizationId: plane.organizationId, memberId: user.id }, app.now()),
    );
    app.hub.wake("events");
    const [assignment] = await app.db.point<{ resource_id: string }[]>`
      select resource_id from events where resource_type = ${ResourceType.ROLE_ASSIGNMENT} order by seq desc limit 1`;
    await stream.next(eventText(ResourceType.ROLE_ASSIGNMENT, ResourceOperation.DELETE, assignment!.resource_id));
    stream.stop();
    expect(await builtIn(user.id)).toEqual([]);
    expect(await codeOf(user.client.runners.getRunner({ runnerId }))).toBe("NotFound");
    expect(await app.db.point`select from groups where direct_share_of = ${user.id}`).toEqual([]);
  });
});
