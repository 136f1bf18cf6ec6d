import { create } from "@bufbuild/protobuf";
import { SubjectSchema } from "../../../gen/gitpod/v1/identity_pb.js";
import { type App, actorOf } from "../../app.ts";
import { editRefusal, MAX_DEFINITION_BYTES, type Move, noRoom, runRefusal } from "../../domain/automation.ts";
import { denied, precondition } from "../../domain/errors.ts";
import type { Caller } from "../../domain/principal.ts";
import { definitionBytes } from "../../store/automation/start.ts";
import type { Tx } from "../../store/db.ts";
import type { StoredEnvironment } from "../../store/environments.ts";
import type { Attribution } from "../../store/record.ts";

// What every change of a service, task or execution asks of its environment: a right, and that it is not over.

function allow(allowed: boolean, action: string): void {
  if (!allowed) throw denied(`you may see the services and tasks of this environment, but not ${action} them`);
}

function refuse(reason: string | undefined): void {
  if (reason) throw precondition(reason);
}

const mayEdit = ({ relation }: StoredEnvironment) => relation.owner || relation.self;
const mayUse = (environment: StoredEnvironment) => mayEdit(environment) || environment.relation.user;

/** Creating and changing. */
export function checkEdit(environment: StoredEnvironment): void {
  allow(mayEdit(environment), "change");
  refuse(editRefusal(environment));
}

/** Removing, which organization admins may do too: to tidy up. */
export function checkDelete(caller: Caller, environment: StoredEnvironment): void {
  allow(mayEdit(environment) || caller.orgAdmin, "delete");
}

export function checkStart(environment: StoredEnvironment): void {
  allow(mayUse(environment), "start");
  checkRuns(environment);
}

/** The environment is to run; nothing starts it by the way. */
export const checkRuns = (environment: StoredEnvironment) => refuse(runRefusal(environment));

export function checkStop(caller: Caller, environment: StoredEnvironment): void {
  allow(mayUse(environment) || caller.orgAdmin, "stop");
}

/** What a rule made of a wish: the state to store, or undefined if all is as it should be. */
export function decided<State>(move: Move<State>): State | undefined {
  if (move.kind === "refused") throw precondition(move.reason);
  return move.kind === "changed" ? move.next : undefined;
}

/** RESOURCE_EXHAUSTED when an environment has no room for one more. */
export function checkRoom(count: number, most: number, what: string): void {
  if (count >= most) throw noRoom(most, what);
}

/** RESOURCE_EXHAUSTED when the definitions of an environment, as the transaction has made them, are too large. */
export async function checkSize(tx: Tx, { id }: StoredEnvironment): Promise<void> {
  if ((await definitionBytes(tx, id)) > MAX_DEFINITION_BYTES)
    throw noRoom(MAX_DEFINITION_BYTES, "bytes of services and tasks");
}

export const byCaller = (app: App, caller: Caller): Attribution => ({
  actor: actorOf(caller),
  newId: app.newId,
  at: app.now(),
});

export const subjectOf = ({ id, principal }: Caller) => create(SubjectSchema, { id, principal });
