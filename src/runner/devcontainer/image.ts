import { randomBytes } from "node:crypto";
import { type ContainerEngine, EngineError, type EngineWork, type ImageFacts } from "../containers/engine.ts";
import { shellQuoted } from "../supervisor/shell.ts";
import type { UnixUser } from "../users.ts";
import { type ContextPlace, openContext } from "./context.ts";
import { addFeatures } from "./features.ts";
import { type ContainerPlan, filled, type ImageSource, imageMetadata, remoteUser } from "./plan.ts";

// The image of a dev container: fetched or built, then given an account of the environment's user. Nobody can guess its
// name: images of an engine are there for everybody who may build on it, and a checkout may have been copied into one.

/** An image that is ready for a container. */
export interface DevContainerImage {
  image: string;
  /** Name of the user in it. */
  userName: string;
  /** Variables of processes in it. */
  variables: Record<string, string>;
  warnings: string[];
}

export interface ImageWork extends EngineWork {
  engine: ContainerEngine;
  place: ContextPlace & { home: string };
  /** Folder of the runner's own that may be made and is removed again. */
  scratch: string;
  labels: Readonly<Record<string, string>>;
}

const REPOSITORY = "berth-devcontainer";
const NAME_BYTES = 16;
const LAYER_MS = 10 * 60_000;
const MAX_VARIABLES_CHARACTERS = 64 * 1024;

/** Shell text that gives a user an account in an image, with nothing but what every shell has built in. */
function accountScript({ uid, gid }: UnixUser, name: string, home: string): string {
  return `set -e
name=${shellQuoted(name)} uid=${uid} gid=${gid} home=${shellQuoted(home)}
[ -d /etc ] || mkdir /etc
for each in passwd group; do [ -e "/etc/$each" ] || : >"/etc/$each"; done
shell=/bin/sh before= entries=
[ ! -x /bin/bash ] || shell=/bin/bash
while IFS= read -r line || [ -n "$line" ]; do
  rest=\${line#*:*:} id=\${rest%%:*}
  case $line in
    "$name":*) before=\${line%:*} before=\${before##*:}; [ ! -x "\${line##*:}" ] || shell=\${line##*:} ;;
    *) [ "$id" = "$uid" ] || entries="$entries$line
" ;;
  esac
done </etc/passwd
printf '%s%s:x:%s:%s::%s:%s\\n' "$entries" "$name" "$uid" "$gid" "$home" "$shell" >/etc/passwd
entries=
while IFS= read -r line || [ -n "$line" ]; do
  rest=\${line#*:*:} id=\${rest%%:*}
  case $line in
    "$name":*) ;;
    *) [ "$id" = "$gid" ] || entries="$entries$line
" ;;
  esac
done </etc/group
printf '%s%s:x:%s:\\n' "$entries" "$name" "$gid" >/etc/group
case $before in /home/?*) if [ -d "$before" ]; then chown -R "$uid:$gid" "$before" || :; fi ;; esac`;
}

async function buildBase(work: ImageWork, source: ImageSource & { kind: "build" }, tag: string): Promise<void> {
  const { dockerfile, archive, complete, cancel } = await openContext(work.place, source);
  // Which of the two has failed is asked below.
  complete.catch(() => undefined);
  const { args, target } = source;
  try {
    await work.engine.build(
      { tag, labels: work.labels, context: archive, dockerfile, args, ...(target && { target }) },
      work,
    );
    await complete;
  } catch (error) {
    if (error instanceof EngineError) throw new Error(`the image could not be built: ${error.message}`);
    throw error;
  } finally {
    cancel();
  }
}

async function fetchBase({ engine, ...work }: ImageWork, image: string, tag: string): Promise<void> {
  if (!(await engine.hasImage(image))) {
    try {
      await engine.pull(image, work);
    } catch (error) {
      if (error instanceof EngineError) throw new Error(`image ${image} could not be pulled: ${error.message}`);
      throw error;
    }
  }
  await engine.tag(image, tag);
}

/** Puts the account on top; without one the bare ids have to do. Answers a warning, or an empty text. */
async function addAccount(work: ImageWork, base: string, tag: string, script: string): Promise<string> {
  const { engine, labels } = work;
  // An image may ask for any signal, and the entry waits for this one.
  const build = (text: string) =>
    engine.build({ tag, labels, network: "none", text }, { ...work, timeoutMs: LAYER_MS });
  const start = `FROM ${base}\nUSER 0:0\nSTOPSIGNAL SIGTERM\n`;
  const instruction = JSON.stringify(["/bin/sh", "-c", script]);
  try {
    await build(`${start}RUN ${instruction}\n`);
    return "";
  } catch (error) {
    if (!(error instanceof EngineError)) throw error;
    await build(start);
    return "the user of the environment has no name in the dev container: its image lacks what is needed to add one";
  }
}

function variablesOf(plan: ContainerPlan, facts: ImageFacts, folder: string): Record<string, string> {
  const metadata = imageMetadata(facts.labels["devcontainer.metadata"]);
  const fill = (values: Record<string, string>, container: Record<string, string>) =>
    Object.fromEntries(Object.entries(values).map(([name, text]) => [name, filled(text, { folder, container })]));
  const own = fill({ ...metadata.containerVariables, ...plan.containerVariables }, { ...facts.variables });
  const container = { ...facts.variables, ...own };
  return { ...container, ...fill({ ...metadata.remoteVariables, ...plan.remoteVariables }, container) };
}

/**
 * Makes the image of a dev container. Throws with a text for people if it cannot be had, CommandTimeout, or the signal's
 * reason.
 */
export async function makeImage(work: ImageWork, plan: ContainerPlan): Promise<DevContainerImage> {
  const { engine, place } = work;
  const name = `${REPOSITORY}:${randomBytes(NAME_BYTES).toString("hex")}`;
  const base = `${name}-base`;
  const featured = `${name}-features`;
  const { source } = plan;
  try {
    if (source.kind === "build") await buildBase(work, source, base);
    else await fetchBase(work, source.image, base);
    const hasFeatures = Object.keys(plan.features).length > 0;
    if (hasFeatures) await addFeatures(work, plan, base, featured);
    const top = hasFeatures ? featured : base;
    const facts = await engine.imageFacts(top);
    if (!facts) throw new Error("the image of the dev container is gone");
    const userName = remoteUser(
      [plan.user, imageMetadata(facts.labels["devcontainer.metadata"]).user, facts.user],
      place.user.name,
    );
    const script = accountScript(place.user, userName, place.home);
    const warnings = [await addAccount(work, top, name, script)];
    const variables = variablesOf(plan, facts, place.folder);
    const isTooMuch = JSON.stringify(variables).length > MAX_VARIABLES_CHARACTERS;
    if (isTooMuch) warnings.push("the variables of the dev container are too long and were left out");
    return { image: name, userName, variables: isTooMuch ? {} : variables, warnings: warnings.filter(Boolean) };
  } finally {
    for (const each of [base, featured]) await engine.removeImage(each).catch(() => undefined);
  }
}
