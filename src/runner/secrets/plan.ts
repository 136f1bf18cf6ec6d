import { dirname, join } from "node:path";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  type EnvironmentSpec_Secret,
} from "../../../gen/gitpod/v1/environment_pb.js";
import { CONTROL_PLANE, isElsewhere, RUNNER, registryHost } from "../../domain/secret.ts";
import { CONTAINER_RUN_FOLDER, type EnvironmentPaths } from "../paths.ts";

// What becomes of a secret on this host. Pure.

interface FileDelivery {
  kind: "file";
  link: string;
  root: string;
  variable?: string;
  /** The path asked for, where the dev container has a container that can have it. */
  inContainer?: string;
}

/** How a secret gets into an environment. */
export type Delivery =
  | { kind: "variable"; name: string }
  /** A link at `link`, which must lie in `root`, to the value; `variable` names it where it is not the path asked for. */
  | FileDelivery
  | { kind: "git"; host: string }
  | { kind: "registry"; host: string }
  /** Nothing to do: it is read through the API. */
  | { kind: "none" }
  | { kind: "refused"; phase: ContentPhase.FAILED | ContentPhase.UNAVAILABLE; reason: string };

/** What came of the secrets at paths of a container's own, when it was started. */
export interface PlacedSecrets {
  /** Ids of the entries that have their link. */
  ids: string[];
  warnings: string[];
}

const ID = /^[0-9A-Za-z-]{1,64}$/;
const VARIABLE = /^[A-Za-z_][A-Za-z0-9_]*$/;
const HOST = /^[a-z0-9._-]+(:\d{1,5})?(\/[a-z0-9._-]+)?$/i;
const CONTROL_CHARACTERS = /\p{Cc}/u;
/** Processes of an environment are found by these. */
const OF_THE_RUNNER: ReadonlySet<string> = new Set(["BERTH_ENVIRONMENT_ID", "GITPOD_ENVIRONMENT_ID"]);

const failed = (reason: string): Delivery => ({ kind: "refused", phase: ContentPhase.FAILED, reason });
const unavailable = (reason: string): Delivery => ({ kind: "refused", phase: ContentPhase.UNAVAILABLE, reason });

/** Folders of a container that are not its own. */
const NOT_ITS_OWN = ["/proc", "/sys", "/dev", CONTAINER_RUN_FOLDER];

/** Whether a container can have a file there that nobody else sees; `paths` say where it has those of the runner. */
function isItsOwn(path: string, { root }: EnvironmentPaths): boolean {
  const dataDir = dirname(dirname(root));
  return ![...NOT_ITS_OWN, dataDir].some((folder) => path === folder || path.startsWith(`${folder}/`));
}

function fileDelivery(path: string, name: string, paths: EnvironmentPaths, { inContainer }: Around): Delivery {
  const segments = path.split("/").slice(1);
  const isPlain = !CONTROL_CHARACTERS.test(path) && segments.every((each) => !["", ".", ".."].includes(each));
  if (!path.startsWith("/") || !isPlain) return failed("the path of the file is not an absolute path");
  const root = [paths.home, paths.workspace].find((folder) => path.startsWith(`${folder}/`));
  if (root) return { kind: "file", link: path, root };
  return {
    kind: "file",
    link: join(paths.secretFiles, path),
    root: paths.secretFiles,
    variable: `BERTH_SECRET_FILE_${name}`,
    ...(inContainer && isItsOwn(path, paths) && { inContainer: path }),
  };
}

/** What a delivery depends on besides. */
export interface Around {
  /** There is a container engine. */
  hasEngine: boolean;
  /** The dev container is to have a container. */
  inContainer: boolean;
}

/** How an entry of the specification is delivered here. */
export function deliveryOf(entry: EnvironmentSpec_Secret, paths: EnvironmentPaths, around: Around): Delivery {
  const { id, name, mount, source } = entry;
  if (!ID.test(id)) return failed("its id is malformed");
  if (entry.credentialProxy) return unavailable("this runner has no proxy that could use the value");
  if (isElsewhere(entry.sourceDetails)) return failed("this runner cannot get tokens from JFrog");
  if (source !== CONTROL_PLANE && (source !== RUNNER || mount.case !== "gitCredentialHost"))
    return failed("this runner does not know where its value comes from");
  switch (mount.case) {
    case "environmentVariable":
      if (!VARIABLE.test(mount.value)) return failed("its name is not that of a variable");
      if (OF_THE_RUNNER.has(mount.value)) return failed(`the runner sets ${mount.value} itself`);
      return { kind: "variable", name: mount.value };
    case "filePath":
      return fileDelivery(mount.value, name, paths, around);
    case "gitCredentialHost":
      return HOST.test(mount.value) ? { kind: "git", host: mount.value } : failed("its host is malformed");
    case "containerRegistryBasicAuthHost": {
      if (!around.hasEngine) return unavailable("there is no container engine on this runner");
      const host = registryHost(mount.value);
      return host ? { kind: "registry", host } : failed("its registry is malformed");
    }
    case "apiOnly":
      return { kind: "none" };
    default:
      return failed("this runner does not know how to mount it");
  }
}

/** It lies in the checkout, so that it can only be put there when the content is. */
export const isInWorkspace = (delivery: Delivery, { workspace }: Pick<EnvironmentPaths, "workspace">): boolean =>
  delivery.kind === "file" && delivery.root === workspace;
