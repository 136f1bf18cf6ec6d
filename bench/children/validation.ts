import { create, type DescMethod, type Message } from "@bufbuild/protobuf";
import type { UnaryRequest } from "@connectrpc/connect";
import { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { validation, warmValidation } from "../../src/rpc/validate.ts";
import { environmentRequest } from "../stage.ts";
import { serve } from "./serve.ts";

/** In microseconds. */
export interface ValidationTimes {
  getUs: number;
  createUs: number;
  /** A check by hand of what GetEnvironmentRequest must be. */
  handUs: number;
  /** The first request of a type, with everything warmed up as at the start of the product. */
  firstUs: number;
}

export interface ValidationApi {
  measure(): Promise<ValidationTimes>;
}

const ID = "01a1fdc2-3974-7300-93b4-382857b75669";
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;
const TURNS = 20_000;

function messageOf(method: DescMethod, value: object): Message {
  return create(method.input, value as never);
}

async function timed(turns: number, step: () => unknown): Promise<number> {
  const from = performance.now();
  for (let turn = 0; turn < turns; turn += 1) await step();
  return ((performance.now() - from) * 1000) / turns;
}

// The interceptor of the product, around nothing.
serve<object, ValidationApi>(async () => {
  warmValidation([EnvironmentService]);
  const validate = validation()(async () => ({}) as never);
  const { getEnvironment, createEnvironment } = EnvironmentService.method;
  const call = (method: DescMethod, value: object) => {
    const request = { stream: false, method, service: EnvironmentService, message: messageOf(method, value) };
    return () => validate(request as unknown as UnaryRequest);
  };
  const get = call(getEnvironment, { environmentId: ID });
  const byHand = messageOf(getEnvironment, { environmentId: ID }) as Message & { environmentId: string };
  const check = async () => {
    if (!UUID.test(byHand.environmentId)) throw new Error("environment_id must be a UUID");
  };
  const measure = async () => {
    const firstUs = await timed(1, call(createEnvironment, environmentRequest(ID)));
    await timed(TURNS, get);
    await timed(TURNS, check);
    return {
      firstUs,
      getUs: await timed(TURNS, get),
      createUs: await timed(TURNS / 4, call(createEnvironment, environmentRequest(ID))),
      handUs: await timed(TURNS, check),
    };
  };
  return { api: { measure } };
});
