import { Code, createClient, createRouterTransport } from "@connectrpc/connect";
import { expect, test } from "vitest";
import { EventService } from "../gen/gitpod/v1/event_pb.js";
import type { EnvironmentOpsService } from "../gen/supervisor/v1/environmentopts_pb.js";
import { type MethodName, withPending } from "../src/pending.ts";
import { failure } from "./supervisor-harness.ts";

async function* nothing(): AsyncGenerator<never> {}

test("pending RPCs of both kinds answer UNIMPLEMENTED by name, the others are served", async () => {
  const service = withPending(EventService, ["watchEvents", "getAuditLog"], {
    listAuditLogs: () => ({ entries: [{ id: "served" }] }),
  });
  const client = createClient(
    EventService,
    createRouterTransport((router) => void router.service(EventService, service)),
  );
  expect((await client.listAuditLogs({})).entries).toMatchObject([{ id: "served" }]);
  const { rawMessage } = await failure(client.watchEvents({})[Symbol.asyncIterator]().next(), Code.Unimplemented);
  expect(rawMessage).toBe("gitpod.v1.EventService.WatchEvents is not implemented");
  const unary = withPending(EventService, ["listAuditLogs", "getAuditLog"], { watchEvents: () => nothing() });
  const other = createClient(
    EventService,
    createRouterTransport((router) => void router.service(EventService, unary)),
  );
  await failure(other.listAuditLogs({}), Code.Unimplemented);
});

// The compiler is the test here: a directive above a line that compiles is itself an error.
test("an RPC in neither place, in both, listed twice or unknown does not compile", () => {
  const listAuditLogs = () => ({ entries: [] });
  const getAuditLog = () => ({});
  withPending(EventService, ["watchEvents"], { listAuditLogs, getAuditLog });
  // @ts-expect-error watchEvents is in neither place
  withPending(EventService, [], { listAuditLogs, getAuditLog });
  // @ts-expect-error listAuditLogs is in both
  withPending(EventService, ["watchEvents", "listAuditLogs"], { listAuditLogs, getAuditLog });
  // @ts-expect-error listed twice
  withPending(EventService, ["watchEvents", "watchEvents"], { listAuditLogs, getAuditLog });
  // @ts-expect-error no RPC of this name
  const names = ["noSuchRpc"] as const satisfies readonly MethodName<typeof EnvironmentOpsService>[];
  expect(names).toHaveLength(1);
});
