import { Code, ConnectError, createClient, createRouterTransport, type Interceptor } from "@connectrpc/connect";
import { expect, test } from "vitest";
import { IdentityService } from "../gen/gitpod/v1/identity_pb.js";
import { RetryInfoSchema } from "../gen/google/rpc/error_details_pb.js";
import { callKey, newCall } from "../src/rpc/call.ts";
import { rateLimit } from "../src/rpc/rate-limit.ts";

/** Calls a public RPC from an address, at a time in milliseconds; the code of the answer. */
function exchange(limiter: Interceptor) {
  return async (address: string): Promise<ConnectError | undefined> => {
    const from: Interceptor = (next) => (request) => {
      request.contextValues.set(callKey, newCall(undefined, address));
      return next(request);
    };
    const transport = createRouterTransport(
      (router) => void router.rpc(IdentityService.method.exchangeToken, () => ({ accessToken: "ok" })),
      { router: { interceptors: [from, limiter] } },
    );
    return createClient(IdentityService, transport)
      .exchangeToken({ exchangeToken: "x" })
      .then(
        () => undefined,
        (error) => ConnectError.from(error),
      );
  };
}

test("public calls are limited to 30 a minute and address, and say when to come back", async () => {
  let now = 0;
  const call = exchange(rateLimit(50, () => now));
  for (let index = 0; index < 30; index += 1) expect(await call("192.0.2.1")).toBeUndefined();
  const refused = await call("192.0.2.1");
  expect(refused?.code).toBe(Code.ResourceExhausted);
  expect(refused?.findDetails(RetryInfoSchema)[0]?.retryDelay?.seconds).toBe(2n);
  expect(await call("192.0.2.2")).toBeUndefined();
  now = 2000;
  expect(await call("192.0.2.1")).toBeUndefined();
  expect((await call("192.0.2.1"))?.code).toBe(Code.ResourceExhausted);
});

test("no limit is a limit of 0", async () => {
  const call = exchange(rateLimit(0, () => 0));
  for (let index = 0; index < 100; index += 1) expect(await call("192.0.2.1")).toBeUndefined();
});
