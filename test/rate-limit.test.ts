import { createContextValues } from "@connectrpc/connect";
import { expect, test } from "vitest";
import { IdentityService } from "../gen/gitpod/v1/identity_pb.js";
import { RetryInfoSchema } from "../gen/google/rpc/error_details_pb.js";
import type { Refusal } from "../src/domain/errors.ts";
import { callKey, newCall } from "../src/rpc/call.ts";
import { rateLimit } from "../src/rpc/rate-limit.ts";

/** Lets a call of a public RPC from an address pass, or gives the refusal. */
function exchange(limit: ReturnType<typeof rateLimit>) {
  return (address: string): Refusal | undefined => {
    const contextValues = createContextValues().set(callKey, newCall(undefined, address));
    const method = IdentityService.method.exchangeToken;
    try {
      limit({ service: IdentityService, method, header: new Headers(), contextValues });
      return undefined;
    } catch (error) {
      return error as Refusal;
    }
  };
}

test("public calls are limited to 30 a minute and address, and say when to come back", () => {
  let now = 0;
  const call = exchange(rateLimit(50, () => now));
  for (let index = 0; index < 30; index += 1) expect(call("192.0.2.1")).toBeUndefined();
  const refused = call("192.0.2.1");
  expect(refused?.kind).toBe("resource_exhausted");
  const retry = refused?.details.find(({ desc }) => desc === RetryInfoSchema);
  expect(retry?.value).toMatchObject({ retryDelay: { seconds: 2n } });
  expect(call("192.0.2.2")).toBeUndefined();
  now = 2000;
  expect(call("192.0.2.1")).toBeUndefined();
  expect(call("192.0.2.1")?.kind).toBe("resource_exhausted");
});

test("no limit is a limit of 0", () => {
  const call = exchange(rateLimit(0, () => 0));
  for (let index = 0; index < 100; index += 1) expect(call("192.0.2.1")).toBeUndefined();
});
