import { create } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";
import {
  CreateEnvironmentPreconditionFailureDetailsSchema,
  type CreateEnvironmentRequest,
  type Environment,
  type EnvironmentInitializer,
  type EnvironmentSpec,
  EnvironmentSpecSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import type { OrganizationPolicies } from "../../../gen/gitpod/v1/organization_pb.js";
import { type App, actorOf, transact, transactOnce } from "../../app.ts";
import { goalProblems, newEnvironment, requiredKernelControls, specProblems } from "../../domain/environment.ts";
import { denied, notFound, precondition, Refusal, refuseProblems } from "../../domain/errors.ts";
import { isUuid } from "../../domain/ids.ts";
import { policyRefusal } from "../../domain/policies.ts";
import type { Caller } from "../../domain/principal.ts";
import { firstSecrets } from "../../environment-secrets.ts";
import { initializerHosts, initializerProblems, repositoryName } from "../../scm/initializer.ts";
import {
  type Asked,
  basisQuery,
  type Conditions,
  holdForCreation,
  type Inputs,
  insertEnvironment,
  readBasis,
} from "../../store/creation.ts";
import type { Beside } from "../../store/credentials.ts";
import type { Sql, Tx } from "../../store/db.ts";
import type { UsableClass } from "../../store/environment-classes.ts";
import { ownsSession, type StoredEnvironment } from "../../store/environments.ts";
import type { Limits } from "../../store/organizations.ts";
import { checkCapacity, checkHoldsRepository, checkPolicies, checkQuotas, checkRunner } from "./limits.ts";
import { shown } from "./view.ts";

const NAME_SUFFIX_BYTES = 3;

// What a new environment has to respect, in the order in which a caller is told.

function checkSource(caller: Caller, policies: OrganizationPolicies, spec: EnvironmentSpec | undefined): void {
  if (caller.orgAdmin) return;
  if (policies.membersRequireProjects) {
    throw policyRefusal("permission_denied", "members_require_projects", "environments must be created from a project");
  }
  checkHoldsRepository(caller, policies, spec?.content?.initializer);
}

function checkClass(stored: UsableClass): void {
  if (!stored.message.enabled) throw precondition("the environment class is disabled");
  if (!stored.uses) throw denied("creating environments on this runner needs the role user on it");
}

/** Whether the runner of a class can take a new environment of it now. */
function checkUsable(stored: UsableClass, localRunners: boolean): void {
  checkRunner({ kind: stored.runnerKind, phase: stored.runnerPhase }, localRunners);
  if (!stored.fits) throw precondition("the environment class no longer fits the configuration of its runner");
}

/**
 * A repository on a host that people sign in to is fetched with the creator's own credential. A host can have two names,
 * the more exact first: the first one that has an integration counts.
 */
function checkSignedIn(spec: EnvironmentSpec, { signIns, tokens }: Inputs): void {
  const named = initializerHosts(spec.content?.initializer).flatMap(
    (names) => names.find((name) => signIns.has(name)) ?? [],
  );
  const missing = [...new Set(named)].filter((host) => signIns.get(host) && !tokens.has(host));
  if (!missing.length) return;
  const value = { missingAuthenticationTokensForHosts: missing };
  throw precondition(`sign in to ${missing.join(", ")} first`, [
    { desc: CreateEnvironmentPreconditionFailureDetailsSchema, value },
  ]);
}

/** What an environment is to be made of, once its source and its class have been chosen, and what that depends on. */
export interface Wanted extends Pick<CreateEnvironmentRequest, "annotations" | "sessionId"> {
  spec: EnvironmentSpec;
  /** Empty for a generated one. */
  name?: string;
  /** Empty without a project. */
  projectId: string;
  basis: Limits & { dotfilesRepository: string };
  environmentClass: UsableClass;
  inputs: Inputs;
}

async function checkWanted(app: App, sql: Sql | Tx, caller: Caller, wanted: Wanted): Promise<void> {
  const { spec, annotations, sessionId, basis, environmentClass, inputs } = wanted;
  const initializer = spec.content?.initializer;
  const schemes = app.config.scm.schemes;
  checkClass(environmentClass);
  const problems = initializerProblems(initializer, { schemes, field: "spec.content.initializer" });
  refuseProblems([...problems, ...specProblems(spec, annotations)]);
  if (sessionId && !(await ownsSession(sql, caller, sessionId))) throw notFound("session", sessionId);
  checkUsable(environmentClass, basis.localRunners);
  checkPolicies(basis.policies, spec);
  checkSignedIn(spec, inputs);
}

function newState(app: App, caller: Caller, wanted: Wanted, now: Date): StoredEnvironment {
  const { policies, dotfilesRepository } = wanted.basis;
  const [primary] = wanted.spec.content?.initializer?.specs ?? [];
  const state = newEnvironment({
    id: app.newId(),
    spec: wanted.spec,
    name: wanted.name ?? "",
    annotations: wanted.annotations,
    nameSuffix: Buffer.from(app.random(NAME_SUFFIX_BYTES)).toString("hex"),
    repositoryName: repositoryName(primary),
    sessionId: wanted.sessionId.toLowerCase() || app.newId(),
    sessions: { machine: app.newId(), content: app.newId(), devcontainer: app.newId(), automationsFile: app.newId() },
    creator: caller,
    environmentClass: wanted.environmentClass.message,
    projectId: wanted.projectId,
    secrets: [],
    defaults: {
      dotfilesRepository,
      devcontainerImage: policies.defaultEnvironmentImage,
      kernelControls: requiredKernelControls(policies),
      maximumLifetimeMs: policies.maximumEnvironmentLifetime ? durationMs(policies.maximumEnvironmentLifetime) : 0,
    },
    now,
  });
  const { organizationId } = caller;
  const secrets = firstSecrets(app, { ...state, organizationId }, wanted.inputs);
  return {
    ...state,
    spec: { ...state.spec, secrets },
    organizationId,
    reportEpoch: 0,
    reportSeq: 0,
    relation: { owner: true, user: false, self: false, runner: false },
  };
}

// Of more than these the rules for initializers know nothing; that there are too many is told when it is its turn.
const MAX_HOSTS = 32;

/** Hosts whose integrations and credentials matter to an initializer. */
export const hostsOf = (initializer: EnvironmentInitializer | undefined): string[] =>
  initializerHosts(initializer).flat().slice(0, MAX_HOSTS);

/** What the statement that stores an environment holds, and on what condition it does so. */
function conditionsOf(
  caller: Caller,
  { basis, spec, projectId, environmentClass, inputs }: Wanted,
  at: Date,
): Conditions {
  const { policies, localRunners } = basis;
  const hasQuotas = caller.principal === Principal.USER;
  return {
    ...{ caller, localRunners, inputs, at, projectId },
    runnerId: environmentClass.message.runnerId,
    hosts: hostsOf(spec.content?.initializer),
    most: hasQuotas ? Number(policies.maximumEnvironmentsPerUser) : 0,
    mostRunning: hasQuotas ? Number(policies.maximumRunningEnvironmentsPerUser) : 0,
  };
}

/** Stores what is wanted; undefined if something that it depends on is not any more as it was found. */
async function store(app: App, sql: Sql | Tx, caller: Caller, wanted: Wanted, at: Date) {
  const environment = newState(app, caller, wanted, at);
  const by = { actor: actorOf(caller), auditId: app.newId() };
  const isStored = await insertEnvironment(sql, environment, conditionsOf(caller, wanted, at), by);
  return isStored ? environment : undefined;
}

/** Finds what is wanted and what it depends on, and checks where it comes from. */
export type Look = (sql: Sql | Tx, at: Date, beside?: object) => Promise<Wanted>;

/** As `store`, while nobody can change what it depends on: looks at all of it again, and says what is in the way. */
function storeHolding(app: App, caller: Caller, look: Look, before: Wanted) {
  const at = app.now();
  const conditions = conditionsOf(caller, before, at);
  const { runnerId } = conditions;
  return transact(
    app,
    async (tx, touched) => {
      const use = await holdForCreation(tx, conditions);
      const wanted = await look(tx, at);
      await checkWanted(app, tx, caller, wanted);
      if (caller.principal === Principal.USER) checkQuotas(use, wanted.basis.policies, true);
      // Another class may be the best one of a project now.
      if (wanted.environmentClass.message.runnerId !== runnerId) return undefined;
      checkCapacity(use.onRunner, wanted.environmentClass.maxEnvironments);
      touched(runnerId);
      return store(app, tx, caller, wanted, at);
    },
    runnerId,
  );
}

/**
 * Makes an environment and wants it to run. As a rule nothing changes between the look and the statement that stores it,
 * which makes sure of that. `beside` is what has been read for the look already.
 */
export async function make(app: App, caller: Caller, look: Look, beside?: object): Promise<Environment> {
  const at = app.now();
  const wanted = await look(app.db.point, at, beside);
  await checkWanted(app, app.db.point, caller, wanted);
  const { runnerId } = wanted.environmentClass.message;
  // All on one runner wait for its lock.
  const stored = await transactOnce(app, (sql) => store(app, sql, caller, wanted, at), {
    touched: runnerId,
    crowd: runnerId,
  });
  const environment = stored ?? (await storeHolding(app, caller, look, wanted));
  if (!environment) throw new Refusal("aborted", "what the environment is made from has changed meanwhile, try again");
  return shown(caller, environment);
}

/** What CreateEnvironment reads along with the credential of its caller. */
export function besideCreateEnvironment({ spec }: CreateEnvironmentRequest): Beside | undefined {
  const classId = spec?.machine?.class ?? "";
  const values = [classId, hostsOf(spec?.content?.initializer), null] satisfies Asked;
  return isUuid(classId) ? { query: basisQuery, values } : undefined;
}

/** CreateEnvironment: makes an environment and wants it to run. */
export async function createEnvironment(
  app: App,
  caller: Caller,
  request: CreateEnvironmentRequest,
  beside?: object,
): Promise<Environment> {
  const { name, annotations, sessionId } = request;
  const spec = request.spec ?? create(EnvironmentSpecSchema);
  const classId = spec.machine?.class ?? "";
  const asked = [isUuid(classId) ? classId : null, hostsOf(spec.content?.initializer), null] as const;
  const look: Look = async (sql, at, found) => {
    const basis = await readBasis(sql, caller, asked, at, found);
    checkSource(caller, basis.policies, request.spec);
    refuseProblems(goalProblems(request.spec));
    if (!basis.found) throw notFound("environment class", classId);
    return { ...{ spec, name, annotations, sessionId, projectId: "", basis }, ...basis.found };
  };
  return make(app, caller, look, beside);
}
