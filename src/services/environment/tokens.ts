import { EnvironmentPhase, type EnvironmentSpec_EnvironmentPort } from "../../../gen/gitpod/v1/environment_pb.js";
import { ResourceType } from "../../../gen/gitpod/v1/event_pb.js";
import type { OrganizationPolicies } from "../../../gen/gitpod/v1/organization_pb.js";
import { type App, actorOf, newTokenText, transact } from "../../app.ts";
import { addressBelow, admits, type PortVisit, portOf, withPortToken } from "../../domain/environment-ports.ts";
import { denied, invalid, notFound, precondition } from "../../domain/errors.ts";
import { policyRefusal } from "../../domain/policies.ts";
import type { Caller } from "../../domain/principal.ts";
import { REDEEM_MS, RUNNER_ACCESS_MS, TokenKind } from "../../domain/tokens.ts";
import type { Sql, Tx } from "../../store/db.ts";
import { findEnvironment, getEnvironment, type StoredEnvironment } from "../../store/environments.ts";
import { readPolicies } from "../../store/organizations.ts";
import { recordAccess } from "../../store/record.ts";
import { insertToken, type NewToken } from "../../store/tokens.ts";
import { allow } from "./move.ts";

/** A token that the runner's endpoints accept for one environment, for an hour. */
async function mint(
  app: App,
  tx: Tx,
  caller: Caller,
  stored: StoredEnvironment,
  token: Pick<NewToken, "kind" | "port" | "authNonce" | "toRedeem">,
  what: string,
): Promise<string> {
  const text = newTokenText(app, token.kind);
  const at = app.now();
  await insertToken(tx, {
    ...token,
    id: app.newId(),
    text,
    organizationId: stored.organizationId,
    subjectId: caller.id,
    subjectPrincipal: caller.principal,
    environmentId: stored.id,
    createdAt: at,
    expiresAt: new Date(at.getTime() + (token.toRedeem ? REDEEM_MS : RUNNER_ACCESS_MS)),
  });
  await recordAccess(tx, {
    id: app.newId(),
    organizationId: stored.organizationId,
    actor: actorOf(caller),
    subjectId: stored.id,
    subjectType: ResourceType.ENVIRONMENT,
    action: `${what} issued`,
    at,
  });
  return text;
}

/** CreateEnvironmentLogsToken, CreateEnvironmentAccessToken. */
export async function issueToken(
  app: App,
  caller: Caller,
  id: string,
  kind: typeof TokenKind.LOGS | typeof TokenKind.ENVIRONMENT_ACCESS,
): Promise<string> {
  return transact(app, async (tx) => {
    const stored = await getEnvironment(tx, caller, id, true);
    const isLogs = kind === TokenKind.LOGS;
    allow(stored.relation.owner || stored.relation.user || (stored.relation.self && isLogs), "enter");
    const closed = [EnvironmentPhase.DELETED, ...(isLogs ? [] : [EnvironmentPhase.DELETING])];
    if (closed.includes(stored.status.phase)) throw precondition("the environment is deleted or being deleted");
    return mint(app, tx, caller, stored, { kind }, isLogs ? "Logs token" : "Access token");
  });
}

interface Door {
  stored: StoredEnvironment;
  /** Absent when the environment does not list the port. */
  port: EnvironmentSpec_EnvironmentPort | undefined;
  admitted: boolean;
  policies: OrganizationPolicies;
}

/** A port as the caller finds it. One that admits a caller shows the environment to people who may not read it. */
async function findDoor(sql: Sql | Tx, caller: Caller, environmentId: string, number: number): Promise<Door> {
  const stored = await findEnvironment(sql, caller, environmentId);
  const port = stored && portOf(stored.spec, number);
  const admitted = port !== undefined && admits(port, stored?.metadata.creator?.id, caller.id);
  if (!stored || !(stored.readable || admitted)) throw notFound("environment", environmentId);
  const { policies } = await readPolicies(sql, caller.organizationId);
  return { stored, port, admitted, policies };
}

const isGone = ({ status }: StoredEnvironment) =>
  status.phase === EnvironmentPhase.DELETING || status.phase === EnvironmentPhase.DELETED;

/** A port that admits the caller, refused otherwise. */
async function openDoor(tx: Tx, caller: Caller, id: string, number: number) {
  const { stored, port, admitted, policies } = await findDoor(tx, caller, id, number);
  if (!port) throw precondition(`the environment does not list port ${number}`);
  if (!admitted) throw denied("the port does not admit you");
  if (policies.portSharingDisabled) {
    const message = "sharing ports is switched off in this organization";
    throw policyRefusal("failed_precondition", "port_sharing_disabled", message);
  }
  if (isGone(stored)) throw precondition("the environment is deleted or being deleted");
  return { stored, port };
}

function mintForPort(
  app: App,
  tx: Tx,
  caller: Caller,
  { stored, port }: Awaited<ReturnType<typeof openDoor>>,
  toRedeem: boolean,
) {
  const token = { kind: TokenKind.PORT_ACCESS, port: port.port, authNonce: port.authNonce, toRedeem };
  return mint(app, tx, caller, stored, token, `Access token for port ${port.port}`);
}

/** CreatePortAccessToken: opens one port for whom it admits. */
export async function issuePortToken(app: App, caller: Caller, id: string, number: number): Promise<string> {
  return transact(app, async (tx) => mintForPort(app, tx, caller, await openDoor(tx, caller, id, number), false));
}

/**
 * As CreatePortAccessToken, for a browser: where to send it with a token that its runner exchanges, once. FAILED_PRECONDITION while the environment does
 * not run, INVALID_ARGUMENT for an address that is not the port's.
 */
export async function enterPort(
  app: App,
  caller: Caller,
  { environmentId, port, returnTo }: PortVisit,
): Promise<string> {
  return transact(app, async (tx) => {
    const door = await openDoor(tx, caller, environmentId, port);
    const url = door.stored.status.environmentUrls?.ports.find((each) => each.port === port)?.url;
    if (!url) throw precondition("the environment is not running");
    const address = addressBelow(url, returnTo);
    if (!address) throw invalid({ field: "return_to", message: "is no address of the port" });
    return withPortToken(address, await mintForPort(app, tx, caller, door, true));
  });
}

/** AllowPortAccess: whether the caller may reach a port. */
export async function mayReachPort(app: App, caller: Caller, id: string, number: number): Promise<boolean> {
  const { stored, admitted, policies } = await findDoor(app.db.point, caller, id, number);
  return admitted && !policies.portSharingDisabled && !isGone(stored);
}
