import { afterAll, beforeAll, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { RunnerProvider } from "../gen/gitpod/v1/runner_configuration_pb.js";
import { startTestPlane, type TestPlane } from "./harness/plane.ts";
import { refusal } from "./harness/refusal.ts";
import { changePolicies } from "./harness/tenants.ts";

let helpful: TestPlane;
let plain: TestPlane;

beforeAll(async () => {
  helpful = await startTestPlane({ BERTH_DOCS_URL: "https://docs.example.org/berth/" });
  plain = await startTestPlane();
});

afterAll(async () => {
  await helpful[Symbol.asyncDispose]();
  await plain[Symbol.asyncDispose]();
});

/** The details of a refusal by a handler, and of one that comes before the message is read. */
async function refused(plane: TestPlane) {
  await changePolicies(plane, { allowLocalRunners: false });
  const runner = { name: "local", provider: RunnerProvider.LINUX_HOST };
  const reader = await plane.addUser({ readOnlyToken: true });
  const errors = [
    await refusal(plane.admin.runners.createRunner(runner)),
    await refusal(reader.client.runners.createRunner(runner)),
  ];
  return errors.map((error) => error.findDetails(ActionableErrorDetailsSchema)[0]);
}

test("what a person can do something about has a code, a sentence and, with a base for help links, a link", async () => {
  const link = (code: string) => ({
    ...{ actionId: "read_docs", label: "Read about it" },
    target: { case: "externalUrl", value: `https://docs.example.org/berth/errors#${code}` },
  });
  expect(await refused(helpful)).toMatchObject([
    { errorCode: "allow_local_runners", actions: [link("allow_local_runners")] },
    {
      errorCode: "AUTH_TOKEN_READ_ONLY",
      userMessage: "this token may only read",
      actions: [link("auth_token_read_only")],
    },
  ]);
  expect((await refused(plain)).map((details) => details?.actions)).toEqual([[], []]);
});
