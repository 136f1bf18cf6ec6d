import { clone, create } from "@bufbuild/protobuf";
import { LogSectionOutcome } from "../../gen/gitpod/v1/environment_logs_pb.js";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  type EnvironmentSpec,
  type EnvironmentSpec_Secret,
  type EnvironmentStatus_Secret,
  EnvironmentStatus_SecretSchema,
  EnvironmentStatusSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { basicCredentials } from "../domain/secret.ts";
import { readSmall } from "./files.ts";
import type { DeliveredSecret } from "./record.ts";
import {
  type Place,
  placeLink,
  removeLink,
  removeSecretFiles,
  VARIABLES_FILE,
  valueFile,
  writeSecretFile,
} from "./secrets/files.ts";
import { addHelper, credentialFile, removeHelper } from "./secrets/git-helper.ts";
import { type Delivery, deliveryOf, isInWorkspace } from "./secrets/plan.ts";
import { keepLogins } from "./secrets/registry.ts";
import { fetchValues } from "./secrets/values.ts";
import { type EnvironmentSite, textOf, userOf } from "./site.ts";
import { isSecretSettled, variablesMark } from "./status.ts";

// Steps that bring the secrets of an environment into it and take them out again.

/** Variables are handed to every process, and the kernel takes only so much. */
const MAX_VARIABLES_BYTES = 512 * 1024;
const MAX_KEPT_BYTES = 1024 * 1024;
const NEEDS_VALUE: ReadonlySet<Delivery["kind"]> = new Set(["variable", "file", "git", "registry"]);

/** An entry of the specification and what becomes of it here. */
interface Task {
  entry: EnvironmentSpec_Secret;
  delivery: Delivery;
}

/** How a delivery went. */
type Outcome = Partial<Pick<EnvironmentStatus_Secret, "phase" | "failureMessage" | "warningMessage">>;

const failed = (error: unknown): Outcome => ({ phase: ContentPhase.FAILED, failureMessage: textOf(error) });
const placeOf = (site: EnvironmentSite): Place => ({ environmentId: site.id, paths: site.paths, user: userOf(site) });

/** It is not in place yet, or no longer since the checkout is another one. */
function isDue(site: EnvironmentSite, { entry, delivery }: Task, hasContent: boolean): boolean {
  const isInCheckout = isInWorkspace(delivery, site.paths);
  if (isInCheckout && !hasContent) return false;
  if (!isSecretSettled(site.status, entry)) return true;
  const delivered = site.record.secrets.find(({ id }) => id === entry.id);
  return isInCheckout && delivered?.contentSession !== site.record.content.session;
}

/**
 * Brings the secrets of the specification into the environment and takes out what is not in it any more. Those that lie
 * in the checkout have to wait for the content. A value that cannot be had at the moment is tried again later; a secret
 * that cannot be delivered says why, and keeps nothing else from going on.
 */
export async function keepSecrets(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  hasContent: boolean,
  signal: AbortSignal,
): Promise<void> {
  const { host, paths } = site;
  const around = {
    hasEngine: host.engines.present !== undefined,
    inContainer: site.settings?.inContainer ?? false,
  };
  const tasks = spec.secrets.map((entry) => ({ entry, delivery: deliveryOf(entry, paths, around) }));
  const due = tasks.filter((task) => isDue(site, task, hasContent));
  const gone = site.record.secrets.filter(({ id }) => !tasks.some(({ entry }) => entry.id === id));
  const isStale = site.status.secrets.some(({ id }) => !tasks.some(({ entry }) => entry.id === id));
  if (due.length === 0 && gone.length === 0 && !isStale) return;
  if (!site.passed && !site.sections.isOpen("secrets")) site.sections.open("secrets");
  await announce(site, tasks, due);
  await withdraw(site, gone);
  await keepValues(site, tasks, due, signal);
  const outcomes = await deliver(site, tasks, due, gone, signal);
  await conclude(site, spec, tasks, due, outcomes);
  site.sections.end("secrets", LogSectionOutcome.SUCCESS);
}

/** Writes down and reports what is about to change: a crash must not leave something that nobody knows of. */
async function announce(site: EnvironmentSite, tasks: readonly Task[], due: readonly Task[]): Promise<void> {
  const { session } = site.record.content;
  const known = new Map(site.record.secrets.map((each) => [each.id, each]));
  for (const { entry, delivery } of due) {
    if (!NEEDS_VALUE.has(delivery.kind)) continue;
    const contentSession = isInWorkspace(delivery, site.paths) ? session : undefined;
    known.set(entry.id, { id: entry.id, delivery, contentSession });
  }
  const before = new Map(site.status.secrets.map((each) => [each.id, each]));
  // What goes is shown until it is gone.
  const going = site.status.secrets.filter(({ id }) => !tasks.some(({ entry }) => entry.id === id));
  const present = tasks.flatMap((task) => {
    const was = before.get(task.entry.id);
    if (!due.includes(task)) return was ?? [];
    const phase = was?.phase === ContentPhase.READY ? ContentPhase.UPDATING : ContentPhase.CREATING;
    return statusOf(task, { phase });
  });
  await site.edit((record) => {
    record.secrets = [...known.values()];
    record.status.secrets = [...going, ...present];
  });
}

const statusOf = ({ entry: { id, session, name } }: Task, outcome: Outcome): EnvironmentStatus_Secret =>
  create(EnvironmentStatus_SecretSchema, { id, session, secretName: name, ...outcome });

/** Takes secrets out of the environment, all but variables and logins, whose file is written anew anyway. */
async function withdraw(site: EnvironmentSite, gone: readonly DeliveredSecret[]): Promise<void> {
  const place = placeOf(site);
  for (const { id, delivery } of gone) {
    if (delivery.kind === "file") await removeLink(place, delivery.root, delivery.link, id);
    if (delivery.kind === "git") await removeHelper(place, delivery.host);
    site.secretValues.delete(id);
  }
  await removeSecretFiles(
    place,
    gone.map(({ id }) => id),
  );
}

/** Gets the values that are needed now, and those of all variables, which are written together. */
async function keepValues(
  site: EnvironmentSite,
  tasks: readonly Task[],
  due: readonly Task[],
  signal: AbortSignal,
): Promise<void> {
  const wanted = tasks.filter((task) => {
    if (!NEEDS_VALUE.has(task.delivery.kind) || (!due.includes(task) && task.delivery.kind !== "variable"))
      return false;
    return site.secretValues.get(task.entry.id)?.session !== task.entry.session;
  });
  const entries = wanted.map(({ entry }) => entry);
  const values = await fetchValues(site.host, site.id, entries, signal);
  for (const { id, session } of entries) {
    const value = values.get(id);
    if (value === undefined) site.secretValues.delete(id);
    else site.secretValues.set(id, { session, value });
  }
  site.log.hide(wanted.flatMap(({ entry, delivery }) => confidential(delivery, values.get(entry.id) ?? "")));
}

/** What must not be readable in a log of a value. */
function confidential({ kind }: Delivery, value: string): string[] {
  if (kind !== "git" && kind !== "registry") return [value];
  const credentials = basicCredentials(value) ?? "";
  return [value, credentials, credentials.slice(credentials.indexOf(":") + 1)];
}

/** Puts what is due in place; answers how each went, by id. */
async function deliver(
  site: EnvironmentSite,
  tasks: readonly Task[],
  due: readonly Task[],
  gone: readonly DeliveredSecret[],
  signal: AbortSignal,
): Promise<Map<string, Outcome>> {
  const outcomes = new Map<string, Outcome>();
  for (const task of due) {
    signal.throwIfAborted();
    outcomes.set(task.entry.id, await deliverOne(site, task).catch(failed));
  }
  await writeVariables(site, tasks, outcomes);
  await writeLogins(site, tasks, due, gone, outcomes);
  return outcomes;
}

/** What is to be said about a file that is not, or not yet, where it was asked for. */
function elsewhere(site: EnvironmentSite, id: string, delivery: Delivery & { kind: "file" }): string {
  const { variable, inContainer } = delivery;
  if (!variable) return "";
  const isOnHost = site.status.devcontainer?.phase === DevContainerPhase.FAILED;
  if (!inContainer || isOnHost) return `its path is not in the environment: see $${variable}`;
  const isLate = site.container.client && !site.record.container?.placed?.ids.includes(id);
  return isLate ? `its path is in the dev container from its next start on: see $${variable} until then` : "";
}

async function deliverOne(site: EnvironmentSite, { entry, delivery }: Task): Promise<Outcome> {
  const place = placeOf(site);
  if (delivery.kind === "refused") return { phase: delivery.phase, failureMessage: delivery.reason };
  const value = site.secretValues.get(entry.id)?.value;
  if (NEEDS_VALUE.has(delivery.kind) && value === undefined) throw new Error("its value is not available any more");
  let warningMessage = "";
  if (delivery.kind === "file") {
    await writeSecretFile(place, entry.id, value ?? "");
    const moved = await placeLink(place, delivery.root, delivery.link, entry.id);
    warningMessage = [elsewhere(site, entry.id, delivery), moved].filter(Boolean).join("; ");
  }
  if (delivery.kind === "git") {
    await writeSecretFile(place, entry.id, credentialFile(value ?? ""));
    await addHelper(place, delivery.host, entry.id);
  }
  return { phase: ContentPhase.READY, warningMessage };
}

/** The variable that a task sets, with its text; undefined if it sets none. */
function variableOf(
  site: EnvironmentSite,
  { entry, delivery }: Task,
  outcome: Outcome | undefined,
): [string, string] | undefined {
  if (delivery.kind === "variable") {
    const value = site.secretValues.get(entry.id)?.value;
    return value === undefined ? undefined : [delivery.name, value];
  }
  const phase = outcome?.phase ?? site.status.secrets.find(({ id }) => id === entry.id)?.phase;
  if (delivery.kind !== "file" || !delivery.variable || phase !== ContentPhase.READY) return undefined;
  return [delivery.variable, delivery.link];
}

/** Writes all variables; one that there is no room for has failed. */
async function writeVariables(
  site: EnvironmentSite,
  tasks: readonly Task[],
  outcomes: Map<string, Outcome>,
): Promise<void> {
  const variables: Record<string, string> = {};
  let bytes = 0;
  for (const task of tasks) {
    const [name, text] = variableOf(site, task, outcomes.get(task.entry.id)) ?? [];
    if (name === undefined || text === undefined) continue;
    const size = Buffer.byteLength(JSON.stringify(text)) + name.length;
    if (bytes + size <= MAX_VARIABLES_BYTES) {
      bytes += size;
      variables[name] = text;
    } else if (outcomes.has(task.entry.id)) {
      outcomes.set(task.entry.id, failed("there is no room for more variables"));
    }
  }
  try {
    await writeSecretFile(placeOf(site), VARIABLES_FILE, JSON.stringify(variables));
  } catch (error) {
    const due = tasks.filter(({ entry, delivery }) => delivery.kind === "variable" && outcomes.has(entry.id));
    for (const { entry } of due) outcomes.set(entry.id, failed(error));
  }
}

/** Writes the logins to registries, if any of them changes. */
async function writeLogins(
  site: EnvironmentSite,
  tasks: readonly Task[],
  due: readonly Task[],
  gone: readonly DeliveredSecret[],
  outcomes: Map<string, Outcome>,
): Promise<void> {
  const left = gone.flatMap(({ delivery }) => (delivery.kind === "registry" ? delivery.host : []));
  const logins = new Map<string, string>();
  const entries = due.flatMap(({ entry, delivery }) => {
    const value = site.secretValues.get(entry.id)?.value;
    if (delivery.kind !== "registry" || value === undefined) return [];
    logins.set(delivery.host, value);
    return entry;
  });
  if (logins.size === 0 && left.length === 0) return;
  const stays = new Set(tasks.flatMap(({ delivery }) => (delivery.kind === "registry" ? delivery.host : [])));
  try {
    await keepLogins(
      placeOf(site),
      logins,
      left.filter((host) => !stays.has(host)),
    );
  } catch (error) {
    for (const { id } of entries) outcomes.set(id, failed(error));
  }
}

/** Reports how it went. */
async function conclude(
  site: EnvironmentSite,
  spec: EnvironmentSpec,
  tasks: readonly Task[],
  due: readonly Task[],
  outcomes: ReadonlyMap<string, Outcome>,
): Promise<void> {
  const before = new Map(site.status.secrets.map((each) => [each.id, each]));
  const next = clone(EnvironmentStatusSchema, site.status);
  next.secrets = tasks.flatMap((task) => {
    const outcome = outcomes.get(task.entry.id);
    return outcome ? statusOf(task, outcome) : (before.get(task.entry.id) ?? []);
  });
  const atStart = site.passed ? site.record.secretVariables : variablesMark(spec);
  if (next.devcontainer) next.devcontainer.secretsInSync = variablesMark(spec) === atStart;
  for (const { entry } of due) {
    const { failureMessage, warningMessage } = outcomes.get(entry.id) ?? {};
    site.log.write(`Secret ${entry.name}: ${failureMessage || warningMessage || "ready"}`);
  }
  const isWanted = new Set(tasks.map(({ entry }) => entry.id));
  await site.edit((record) => {
    record.status = next;
    record.secrets = record.secrets.filter(({ id }) => isWanted.has(id));
    record.secretVariables = atStart;
  });
}

/** Removes the values from the disk of an environment that has stopped: it gets those of then with its next start. */
export async function forgetSecretValues(site: EnvironmentSite): Promise<void> {
  const { secrets, user } = site.record;
  site.secretValues.clear();
  if (!user || secrets.length === 0) return;
  await removeSecretFiles(placeOf(site), [VARIABLES_FILE, ...secrets.map(({ id }) => id)]);
}

/** Keeps values that an earlier runner process has put into a running environment out of its log. */
export async function hideDelivered(site: EnvironmentSite): Promise<void> {
  const { paths, record } = site;
  if (record.secrets.length === 0) return;
  const read = (path: string) => readSmall(path, MAX_KEPT_BYTES).catch(() => undefined);
  const files = await Promise.all(record.secrets.map(({ id }) => read(valueFile(paths, id))));
  const values = files.flatMap((text = "") => [text, /^password=(.*)$/m.exec(text)?.[1] ?? ""]);
  const variables = Object.values(parsed((await read(valueFile(paths, VARIABLES_FILE))) ?? "{}"));
  site.log.hide([...values, ...variables.filter((text) => typeof text === "string")]);
}

function parsed(text: string): object {
  try {
    return Object(JSON.parse(text));
  } catch {
    return {};
  }
}
