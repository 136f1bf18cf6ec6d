import {
  type EnvironmentInitializer,
  type EnvironmentInitializer_Spec,
  type GitInitializer,
  GitInitializer_CloneTargetMode as Mode,
} from "../../gen/gitpod/v1/environment_pb.js";
import type { ParseContextURLResponse } from "../../gen/gitpod/v1/runner_pb.js";
import { ScmError } from "../scm/errors.ts";
import type { AdmittedUrl, Guard } from "../scm/guard.ts";
import { checkoutLocation, initializerProblems } from "../scm/initializer.ts";
import { isSafeRef } from "../scm/refs.ts";
import { ContentError } from "./git.ts";

/** What to check out after the clone. */
export type CloneTarget = { mode: "head" } | { mode: "branch" | "new_branch" | "tag" | "commit"; name: string };

/** One repository to put into the workspace. */
export interface ClonePlan {
  url: string;
  upstream: string;
  target: CloneTarget;
  /** Relative to the workspace, without `..`. */
  location: string;
  /** The address, checked; its URL is fit to be shown. */
  admitted: AdmittedUrl;
}

/** How the runner turns a context URL into repository and revision. */
export type ResolveContext = (url: string, signal: AbortSignal) => Promise<ParseContextURLResponse>;

const SCP_FORM = /^(?:([\w.+-]+)@)?([\w.-]+):(?!\/\/)(.+)$/;
const TARGET_MODES: Partial<Record<Mode, "branch" | "new_branch" | "tag" | "commit">> = {
  [Mode.REMOTE_BRANCH]: "branch",
  [Mode.LOCAL_BRANCH]: "new_branch",
  [Mode.REMOTE_TAG]: "tag",
  [Mode.REMOTE_COMMIT]: "commit",
};

/** What is wrong with an initializer, in one text; undefined if nothing. */
export function initializerProblem(
  initializer: EnvironmentInitializer | undefined,
  schemes: readonly string[],
): string | undefined {
  const [problem] = initializerProblems(initializer, { schemes, field: "content.initializer" });
  return problem && `${problem.field} ${problem.message}`;
}

/** `user@host:path` as the ssh URL it stands for; other addresses as they are. */
export function asUrl(address: string): string {
  const [, user = "", host = "", path = ""] = SCP_FORM.exec(address) ?? [];
  if (!host || URL.parse(address)?.host) return address;
  return `ssh://${user && `${user}@`}${host}/${path.replace(/^\/+/, "")}`;
}

/** Runs a step of the source-control library; what it says about a host is fit for people. */
async function scm<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    throw error instanceof ScmError ? new ContentError(error.message) : error;
  }
}

function ofGit({ remoteUri: url, upstreamRemoteUri: upstream, targetMode, cloneTarget: name }: GitInitializer) {
  const mode = targetMode === Mode.UNSPECIFIED && name ? "branch" : TARGET_MODES[targetMode];
  const target: CloneTarget = mode ? { mode, name } : { mode: "head" };
  return { url, upstream, target };
}

/** Commit before tag before branch: a pull request gives its head branch, the fork as origin, the base as upstream. */
function ofContext({ git }: ParseContextURLResponse) {
  const { cloneUrl: url = "", upstreamRemoteUrl: upstream = "", commit, tag, branch } = git ?? {};
  let target: CloneTarget = { mode: "head" };
  if (commit) target = { mode: "commit", name: commit };
  else if (tag) target = { mode: "tag", name: tag };
  else if (branch && isSafeRef(branch)) target = { mode: "branch", name: branch };
  return { url, upstream, target };
}

async function repositoryOf({ spec }: EnvironmentInitializer_Spec, resolve: ResolveContext, signal: AbortSignal) {
  if (spec.case === "git") return ofGit(spec.value);
  if (spec.case === "contextUrl") return ofContext(await scm(resolve(spec.value.url, signal)));
  throw new ContentError("the initializer names neither git nor a context URL");
}

/** What to clone where, the primary checkout first. Throws ContentError for what cannot work. */
export async function planClones(
  guard: Guard,
  initializer: EnvironmentInitializer | undefined,
  resolve: ResolveContext,
  signal: AbortSignal,
): Promise<ClonePlan[]> {
  const problem = initializerProblem(initializer, guard.schemes);
  if (problem) throw new ContentError(problem);
  const plans: ClonePlan[] = [];
  for (const spec of initializer?.specs ?? []) {
    const { url, upstream, target } = await repositoryOf(spec, resolve, signal);
    const admitted = await scm(guard.admit(asUrl(url), { signal }));
    if (upstream) await scm(guard.admit(asUrl(upstream), { signal }));
    plans.push({ url, upstream, target, location: checkoutLocation(spec), admitted });
  }
  return plans;
}
