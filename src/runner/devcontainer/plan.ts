import { basename, posix } from "node:path";
import { isImageReference } from "../../domain/image-reference.ts";

// What a dev container file asks for that a container can be made of. A repository is hostile: what is not named here is
// not done, and no text of it becomes more than an operand. Pure.

/** Where the image of a dev container comes from; paths are relative to the checkout. */
export type ImageSource =
  | { kind: "image"; image: string }
  | { kind: "build"; dockerfile: string; context: string; args: Record<string, string>; target: string };

/** A dev container as it can be had here. */
export interface ContainerPlan {
  source: ImageSource;
  /** Features with their options, by reference. */
  features: Record<string, unknown>;
  /** Order in which features are installed, as far as the file says. */
  featureOrder: string[];
  /** Who works in it; empty if the image says so. */
  user: string;
  /** Variables as the file has them. */
  containerVariables: Record<string, string>;
  remoteVariables: Record<string, string>;
  /** Properties of the file that have no effect here. */
  ignored: string[];
}

type Content = Readonly<Record<string, unknown>>;

/** They would open the host to whoever writes the file, or lay things out in another way. */
const IGNORED = [
  "runArgs",
  "mounts",
  "privileged",
  "capAdd",
  "securityOpt",
  "workspaceMount",
  "workspaceFolder",
  "appPort",
  "init",
];
const IGNORED_BUILD = ["options", "cacheFrom"];
const VARIABLE = /^[A-Za-z_][A-Za-z0-9_]*$/;
const STAGE = /^[A-Za-z0-9][\w.-]{0,127}$/;
const USER = /^[a-z_][a-z0-9_-]{0,31}$/;
const MAX_PATH = 4096;
const MAX_FEATURES = 50;

const isRecord = (value: unknown): value is Content =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** Values for the variables of a dev container file. */
export interface Substitution {
  /** The checkout, which is at the same path inside and outside of the container. */
  folder: string;
  /** Variables of the container. */
  container?: Readonly<Record<string, string>>;
}

/** Fills in the variables of a text. The variables of the runner itself are none of them: they count as not set. */
export function filled(text: string, { folder, container = {} }: Substitution): string {
  return text.replaceAll(/\$\{(\w+)(?::(\w+))?(?::([^}]*))?\}/g, (whole, kind: string, name = "", preset = "") => {
    switch (kind) {
      case "localWorkspaceFolder":
      case "containerWorkspaceFolder":
        return folder;
      case "localWorkspaceFolderBasename":
      case "containerWorkspaceFolderBasename":
        return basename(folder);
      case "localEnv":
        return preset;
      case "containerEnv":
        return container[name] ?? preset;
      default:
        return whole;
    }
  });
}

function optionalText(content: Content, name: string, path = name): string {
  const value = content[name];
  if (value === undefined || value === null) return "";
  if (typeof value !== "string" || value.includes("\0")) throw new Error(`${path} is not a text`);
  return value;
}

/** A path that the file gives, from the checkout on; it must not lead out of it. */
function pathBelow(file: string, path: string, property: string): string {
  const joined = posix.normalize(posix.join(posix.dirname(file), path));
  const leaves = path.startsWith("/") || joined === ".." || joined.startsWith("../");
  if (/\p{Cc}/u.test(joined)) throw new Error(`${property} has control characters`);
  if (leaves) throw new Error(`${property} leads out of the checkout`);
  if (joined.length > MAX_PATH) throw new Error(`${property} is too long`);
  return joined;
}

function variables(content: Content, name: string, path = name): Record<string, string> {
  const value = content[name];
  if (value === undefined || value === null) return {};
  if (!isRecord(value)) throw new Error(`${path} is not an object`);
  const entries = Object.entries(value).filter(([, text]) => text !== null);
  for (const [each, text] of entries) {
    if (!VARIABLE.test(each)) throw new Error(`${path} has a name that is not one of a variable`);
    if (typeof text !== "string" || text.includes("\0")) throw new Error(`${path}.${each} is not a text`);
  }
  return Object.fromEntries(entries as [string, string][]);
}

function buildOf(content: Content, file: string, folder: string): ImageSource | undefined {
  const nested = content.build ?? {};
  if (!isRecord(nested)) throw new Error("build is not an object");
  const dockerfile = optionalText(nested, "dockerfile", "build.dockerfile") || optionalText(content, "dockerFile");
  if (!dockerfile) return undefined;
  const context = optionalText(nested, "context", "build.context") || optionalText(content, "context") || ".";
  const target = filled(optionalText(nested, "target", "build.target"), { folder });
  if (target && !STAGE.test(target)) throw new Error("build.target is not the name of a stage");
  const args = Object.entries(variables(nested, "args", "build.args"));
  return {
    kind: "build",
    dockerfile: pathBelow(file, dockerfile, "build.dockerfile"),
    context: pathBelow(file, context, "build.context"),
    args: Object.fromEntries(args.map(([name, text]) => [name, filled(text, { folder })])),
    target,
  };
}

function sourceOf(content: Content, file: string, folder: string, preset: string): ImageSource {
  if (content.dockerComposeFile !== undefined) {
    throw new Error("dev containers of several containers (dockerComposeFile) are not supported by this runner");
  }
  const build = buildOf(content, file, folder);
  if (build) return build;
  const image = filled(optionalText(content, "image"), { folder }) || preset;
  if (!image)
    throw new Error("the dev container names neither an image nor a Dockerfile, and there is no default image");
  if (!isImageReference(image)) throw new Error("image is not an image reference");
  return { kind: "image", image };
}

function featuresOf({ features }: Content): Record<string, unknown> {
  if (features === undefined || features === null) return {};
  if (!isRecord(features)) throw new Error("features is not an object");
  const references = Object.keys(features);
  if (references.length > MAX_FEATURES) throw new Error(`there are more than ${MAX_FEATURES} features`);
  for (const reference of references) {
    // A path would be one on the host, and an address one that the runner reaches.
    if (!isImageReference(reference)) throw new Error("features have to come from a container registry");
    const options = Object.values(Object(features[reference]));
    const isPlain = options.every((value) => typeof value === "string" || typeof value === "boolean");
    if (!isPlain) throw new Error("options of features are texts or true and false");
  }
  return { ...features };
}

function featureOrderOf({ overrideFeatureInstallOrder: order }: Content): string[] {
  if (order === undefined || order === null) return [];
  if (Array.isArray(order) && order.every((each) => typeof each === "string" && isImageReference(each))) return order;
  throw new Error("overrideFeatureInstallOrder is not a list of features");
}

/**
 * What a dev container file at `file`, relative to the checkout `folder`, asks for; `preset` is the image of one that
 * names none. Throws with a text for people for what cannot be had.
 */
export function containerPlan(content: Content, file: string, folder: string, preset: string): ContainerPlan {
  const nested = isRecord(content.build) ? content.build : {};
  return {
    source: sourceOf(content, file, folder, preset),
    features: featuresOf(content),
    featureOrder: featureOrderOf(content),
    user: optionalText(content, "remoteUser") || optionalText(content, "containerUser"),
    containerVariables: variables(content, "containerEnv"),
    remoteVariables: variables(content, "remoteEnv"),
    ignored: [
      ...IGNORED.filter((name) => content[name] !== undefined),
      ...IGNORED_BUILD.filter((name) => nested[name] !== undefined).map((name) => `build.${name}`),
    ],
  };
}

/** Name of the user in a container: the first of these that is one, but not root; else the environment's own. */
export function remoteUser(wanted: readonly string[], own: string): string {
  const named = wanted.map((each) => each.split(":")[0] ?? "").find((each) => each !== "");
  return named !== undefined && named !== "root" && USER.test(named) ? named : own;
}

/** What the label `devcontainer.metadata` of an image says about its users and variables; the last entry counts. */
export function imageMetadata(
  label: string | undefined,
): Pick<ContainerPlan, "user" | "containerVariables" | "remoteVariables"> {
  const merged = { user: "", containerVariables: {}, remoteVariables: {} };
  for (const entry of metadataEntries(label)) {
    try {
      const { user, containerVariables, remoteVariables } = {
        user: optionalText(entry, "remoteUser") || optionalText(entry, "containerUser"),
        containerVariables: variables(entry, "containerEnv"),
        remoteVariables: variables(entry, "remoteEnv"),
      };
      Object.assign(merged.containerVariables, containerVariables);
      Object.assign(merged.remoteVariables, remoteVariables);
      merged.user = user || merged.user;
    } catch {
      // Whoever made the image is not there to hear about it.
    }
  }
  return merged;
}

function metadataEntries(label: string | undefined): Content[] {
  try {
    const value: unknown = JSON.parse(label ?? "[]");
    return (Array.isArray(value) ? value : [value]).filter(isRecord);
  } catch {
    return [];
  }
}
