import { create } from "@bufbuild/protobuf";
import {
  GitInitializer_CloneTargetMode as CloneTargetMode,
  type EnvironmentGitStatus,
  type EnvironmentInitializer,
  type EnvironmentInitializer_Spec,
  EnvironmentInitializer_SpecSchema,
  EnvironmentInitializerSchema,
} from "../../gen/gitpod/v1/environment_pb.js";
import { sameRepository } from "./initializer.ts";
import { isCommit } from "./refs.ts";
import { parseShape, type UrlShape, type UrlTarget } from "./url-shape.ts";

// A context URL says what to check out only together with the repository: where a ref ends and a file path begins, or
// what the head of a pull request is, the checkout that was made from it tells.

type Checkout = Pick<EnvironmentGitStatus, "cloneUrl" | "branch" | "latestCommit">;

interface Target {
  targetMode: CloneTargetMode;
  cloneTarget: string;
}

const target = (targetMode: CloneTargetMode, cloneTarget = ""): Target => ({ targetMode, cloneTarget });

function refTarget({ path, only, exact }: UrlTarget & { kind: "ref" }, { branch, latestCommit }: Checkout): Target {
  const whole = path.join("/");
  if (only !== "tag" && branch && `${whole}/`.startsWith(`${branch}/`))
    return target(CloneTargetMode.REMOTE_BRANCH, branch);
  // Without a file path behind it the ref is the whole rest of the address.
  const isWhole = exact || path.length === 1;
  if (only === "tag" && isWhole) return target(CloneTargetMode.REMOTE_TAG, whole);
  if (only === "branch" && isWhole) return target(CloneTargetMode.REMOTE_BRANCH, whole);
  // On a branch that the address does not name, somebody has checked out another one.
  if (branch) return isWhole ? target(CloneTargetMode.REMOTE_BRANCH, whole) : target(CloneTargetMode.REMOTE_HEAD);
  if (isCommit(path[0] ?? "")) return target(CloneTargetMode.REMOTE_COMMIT, latestCommit);
  return isWhole ? target(CloneTargetMode.REMOTE_TAG, whole) : target(CloneTargetMode.REMOTE_COMMIT, latestCommit);
}

function targetOf(asked: UrlTarget, checkout: Checkout): Target {
  switch (asked.kind) {
    case "default":
    case "issue":
      return target(CloneTargetMode.REMOTE_HEAD);
    case "commit": {
      const isSame = checkout.latestCommit.startsWith(asked.sha.toLowerCase());
      return target(CloneTargetMode.REMOTE_COMMIT, isSame ? checkout.latestCommit : asked.sha);
    }
    case "pull_request":
      return checkout.branch
        ? target(CloneTargetMode.REMOTE_BRANCH, checkout.branch)
        : target(CloneTargetMode.REMOTE_COMMIT, checkout.latestCommit);
    case "ref":
      return refTarget(asked, checkout);
  }
}

function shapeOf(url: string): UrlShape | undefined {
  try {
    return parseShape(url, { schemes: ["file", "git"] });
  } catch {
    return undefined;
  }
}

/** The git spec that a context URL resolved to, by the checkout made from it; as it is where nothing is known of one. */
function resolvedSpec(spec: EnvironmentInitializer_Spec, checkout: Checkout | undefined): EnvironmentInitializer_Spec {
  if (spec.spec.case !== "contextUrl" || !checkout?.cloneUrl) return spec;
  const shape = shapeOf(spec.spec.value.url);
  if (!shape) return spec;
  const own = shape.splits.find(({ cloneUrl }) => sameRepository(cloneUrl, checkout.cloneUrl));
  const [likeliest] = shape.splits;
  const { target: asked, cloneUrl } = own ?? likeliest;
  const isFork = !own && asked.kind === "pull_request";
  const value = {
    // The checkout says https whatever it was cloned by.
    remoteUri: own ? cloneUrl : checkout.cloneUrl,
    upstreamRemoteUri: isFork ? cloneUrl : "",
    ...targetOf(asked, checkout),
  };
  return create(EnvironmentInitializer_SpecSchema, { spec: { case: "git", value } });
}

/**
 * An initializer whose primary context URL, if it has one, is replaced by the git spec that it resolved to. Undefined
 * for one without specs.
 */
export function resolvedInitializer(
  initializer: EnvironmentInitializer | undefined,
  checkout: Checkout | undefined,
): EnvironmentInitializer | undefined {
  const [primary, ...others] = initializer?.specs ?? [];
  if (!primary) return undefined;
  return create(EnvironmentInitializerSchema, { specs: [resolvedSpec(primary, checkout), ...others] });
}
