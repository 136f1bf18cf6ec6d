import { RunnerPhase } from "../../../gen/gitpod/v1/runner_pb.js";
import { Refusal } from "../../domain/errors.ts";
import type { Link } from "../../store/runners.ts";

/** Refuses a call that does not quote the link in force. */
export function checkLink<T extends Link>(runner: T, linkId: string): T {
  checkExists(runner);
  if (runner.linkId !== linkId) throw new Refusal("aborted", "another process has registered for this runner");
  return runner;
}

/** Its tokens are gone with a runner, but a call may have been let in just before. */
export function checkExists<T extends Link>(runner: T): T {
  if (runner.phase === RunnerPhase.DELETED) throw new Refusal("unauthenticated", "the runner is deleted");
  return runner;
}
