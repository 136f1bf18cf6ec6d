import { create } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";
import {
  CreateEnvironmentPreconditionFailureDetailsSchema,
  type CreateEnvironmentRequest,
  type Environment,
  type EnvironmentSpec,
  EnvironmentSpecSchema,
} from "../../../gen/gitpod/v1/environment_pb.js";
import { Principal } from "../../../gen/gitpod/v1/identity_pb.js";
import type { OrganizationPolicies } from "../../../gen/gitpod/v1/organization_pb.js";
import { type App, actorOf, transact } from "../../app.ts";
import { goalProblems, newEnvironment, requiredKernelControls, specProblems } from "../../domain/environment.ts";
import { denied, notFound, precondition, refuseProblems } from "../../domain/errors.ts";
import { policyRefusal } from "../../domain/policies.ts";
import type { Caller } from "../../domain/principal.ts";
import { currentSecrets } from "../../environment-secrets.ts";
import { initializerHosts, initializerProblems, repositoryName } from "../../scm/initializer.ts";
import type { Sql, Tx } from "../../store/db.ts";
import { getClass, getClassHoldingRunner, type StoredClass } from "../../store/environment-classes.ts";
import {
  countRunningOnRunner,
  insertEnvironment,
  ownsSession,
  type StoredEnvironment,
} from "../../store/environments.ts";
import { missingSignIns } from "../../store/host-tokens.ts";
import { readPolicies } from "../../store/organizations.ts";
import { findDotfiles } from "../../store/users.ts";
import { checkCapacity, checkHoldsRepository, checkPolicies, checkQuotas, checkRunner, quotaUse } from "./limits.ts";
import { shown } from "./view.ts";

const NAME_SUFFIX_BYTES = 3;

const quotaApplies = (caller: Caller) => caller.principal === Principal.USER;

// What a new environment has to respect, in the order in which a caller is told.

function checkSource(caller: Caller, policies: OrganizationPolicies, spec: EnvironmentSpec | undefined): void {
  if (caller.orgAdmin) return;
  if (policies.membersRequireProjects) {
    throw policyRefusal("permission_denied", "members_require_projects", "environments must be created from a project");
  }
  checkHoldsRepository(caller, policies, spec?.content?.initializer);
}

function checkClass(stored: StoredClass): void {
  if (!stored.message.enabled) throw precondition("the environment class is disabled");
  if (!stored.uses) throw denied("creating environments on this runner needs the role user on it");
}

/** Whether the runner of a class can take a new environment of it now. */
function checkUsable(stored: StoredClass, localRunners: boolean): void {
  checkRunner({ kind: stored.runnerKind, phase: stored.runnerPhase }, localRunners);
  if (!stored.fits) throw precondition("the environment class no longer fits the configuration of its runner");
}

/** A repository on a host that people sign in to is fetched with the creator's own credential. */
function checkSignedIn(missing: readonly string[]): void {
  if (!missing.length) return;
  const value = { missingAuthenticationTokensForHosts: [...missing] };
  throw precondition(`sign in to ${missing.join(", ")} first`, [
    { desc: CreateEnvironmentPreconditionFailureDetailsSchema, value },
  ]);
}

/** What the organization allows, and what the caller has set for new environments. */
export interface Rules {
  policies: OrganizationPolicies;
  localRunners: boolean;
  dotfilesRepository: string;
}

export async function readRules(sql: Sql, caller: Caller): Promise<Rules> {
  const [policies, dotfilesRepository] = await Promise.all([
    readPolicies(sql, caller.organizationId),
    findDotfiles(sql, caller.id),
  ]);
  return { ...policies, dotfilesRepository };
}

/** What an environment is to be made of, once its source and its class have been chosen. */
export interface Wanted extends Pick<CreateEnvironmentRequest, "annotations" | "sessionId"> {
  spec: EnvironmentSpec;
  /** Empty for a generated one. */
  name?: string;
  environmentClass: StoredClass;
  /** Empty without a project. */
  projectId: string;
}

async function checkWanted(app: App, caller: Caller, wanted: Wanted, rules: Rules): Promise<void> {
  const { spec, annotations, sessionId, environmentClass } = wanted;
  const initializer = spec.content?.initializer;
  const schemes = app.config.scm.schemes;
  checkClass(environmentClass);
  const problems = initializerProblems(initializer, { schemes, field: "spec.content.initializer" });
  refuseProblems([...problems, ...specProblems(spec, annotations)]);
  if (sessionId && !(await ownsSession(app.db.point, caller, sessionId))) throw notFound("session", sessionId);
  checkUsable(environmentClass, rules.localRunners);
  checkPolicies(rules.policies, spec);
}

function newState(app: App, caller: Caller, wanted: Wanted, rules: Rules, now: Date): StoredEnvironment {
  const { policies, dotfilesRepository } = rules;
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
  return {
    ...state,
    organizationId: caller.organizationId,
    reportEpoch: 0,
    reportSeq: 0,
    relation: { owner: true, user: false, self: false, runner: false },
  };
}

/**
 * Makes an environment and wants it to run, after all checks but those of its source. `confirm` looks once more at what
 * it is made from, in the transaction that makes it.
 */
export async function make(
  app: App,
  caller: Caller,
  wanted: Wanted,
  rules: Rules,
  confirm: (tx: Tx) => Promise<void> = async () => undefined,
): Promise<Environment> {
  const { policies, localRunners } = rules;
  const { id: classId, runnerId } = wanted.environmentClass.message;
  const now = app.now();
  await checkWanted(app, caller, wanted, rules);
  const environment = newState(app, caller, wanted, rules, now);
  const creator = { id: caller.id, organizationId: caller.organizationId, limited: quotaApplies(caller) };
  const hosts = initializerHosts(wanted.spec.content?.initializer);
  const insert: Parameters<typeof transact<void>>[1] = async (tx, touched, last) => {
    await confirm(tx);
    // Sent together and answered one after the other, so that the locks are not held longer than it takes to look.
    const [missing, use, current, running, secrets] = await Promise.all([
      missingSignIns(tx, { runnerId, subjectId: caller.id }, hosts, now),
      quotaUse(tx, creator, policies),
      getClassHoldingRunner(tx, caller, classId),
      countRunningOnRunner(tx, runnerId),
      currentSecrets(app, tx, environment, true),
    ]);
    checkSignedIn(missing);
    checkQuotas(use, policies, true);
    checkClass(current);
    checkUsable(current, localRunners);
    checkCapacity(running, current.maxEnvironments);
    environment.spec = { ...environment.spec, secrets };
    last(insertEnvironment(tx, environment, actorOf(caller), app.newId(), now));
    touched(runnerId);
  };
  // All of them wait for the lock of the runner.
  await transact(app, insert, runnerId);
  return shown(caller, environment);
}

/** CreateEnvironment: makes an environment and wants it to run. */
export async function createEnvironment(app: App, caller: Caller, request: CreateEnvironmentRequest) {
  const { point } = app.db;
  const spec = request.spec ?? create(EnvironmentSpecSchema);
  // Asked for together; that there is no such class is told when it is its turn.
  const asked = getClass(point, caller, spec.machine?.class ?? "");
  asked.catch(() => undefined);
  const rules = await readRules(point, caller);
  checkSource(caller, rules.policies, request.spec);
  refuseProblems(goalProblems(request.spec));
  const environmentClass = await asked;
  const { name, annotations, sessionId } = request;
  return make(app, caller, { spec, name, annotations, sessionId, environmentClass, projectId: "" }, rules);
}
