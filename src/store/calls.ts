import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import {
  type Call,
  CallSchema,
  type CompleteCallRequest,
  CompleteCallRequestSchema,
} from "../../gen/berth/runner/v1/runner_control_pb.js";
import type { Sql } from "./db.ts";

/** Puts a question to a runner; its watch stream delivers it. */
export async function insertCall(sql: Sql, runnerId: string, call: Call, at: Date): Promise<void> {
  const deadline = call.deadline ? timestampDate(call.deadline) : at;
  await sql`insert into runner_calls (id, runner_id, call, deadline, created_at)
    values (${call.callId}, ${runnerId}, ${toBinary(CallSchema, call)}, ${deadline}, ${at})`;
}

/** Questions that still wait for an answer, oldest first. */
export async function openCalls(sql: Sql, runnerId: string, now: Date, limit: number): Promise<Call[]> {
  const rows = await sql<{ call: Uint8Array }[]>`
    select call from runner_calls where runner_id = ${runnerId} and completed_at is null and deadline > ${now}
    order by created_at limit ${limit}`;
  return rows.map((row) => fromBinary(CallSchema, row.call));
}

/** A question that this runner is to answer and has not yet; undefined otherwise. */
export async function findOpenCall(sql: Sql, runnerId: string, callId: string, now: Date): Promise<Call | undefined> {
  const [row] = await sql<{ call: Uint8Array }[]>`
    select call from runner_calls
    where id = ${callId} and runner_id = ${runnerId} and completed_at is null and deadline > ${now}`;
  return row && fromBinary(CallSchema, row.call);
}

/** Stores an answer; the first one wins, one that comes too late is dropped. */
export async function completeCall(
  sql: Sql,
  runnerId: string,
  completion: CompleteCallRequest,
  at: Date,
): Promise<void> {
  await sql`update runner_calls set completion = ${toBinary(CompleteCallRequestSchema, completion)}, completed_at = ${at}
    where id = ${completion.callId} and runner_id = ${runnerId} and completed_at is null and deadline > ${at}`;
}

/** The answer, once there is one. */
export async function findCompletion(sql: Sql, callId: string): Promise<CompleteCallRequest | undefined> {
  const [row] = await sql<
    { completion: Uint8Array | null }[]
  >`select completion from runner_calls where id = ${callId}`;
  return row?.completion ? fromBinary(CompleteCallRequestSchema, row.completion) : undefined;
}

/** Closes a question that nobody waits for any more. */
export async function dropCall(sql: Sql, callId: string): Promise<void> {
  await sql`delete from runner_calls where id = ${callId}`;
}
