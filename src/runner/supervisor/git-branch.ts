import { failedPrecondition } from "./errors.ts";
import { type GitOptions, gitItems, gitOrFail } from "./git-command.ts";

const ORIGIN = "refs/remotes/origin/";

/**
 * The default branch: what origin's HEAD names, else `main` or `master` if origin has it, else the current one.
 * FAILED_PRECONDITION if there is none of them.
 */
export async function defaultBranch(options: GitOptions): Promise<string> {
  const known = new Map<string, string>();
  const candidates = ["HEAD", "main", "master"].map((name) => ORIGIN + name);
  await gitOrFail(options, ["for-each-ref", "--format=%(refname) %(symref)%00", ...candidates], (item) => {
    const [name = "", target = ""] = item.trim().split(" ");
    known.set(name, target);
  });
  const [head, ...names] = candidates.map((name) => ({ name, target: known.get(name) }));
  if (head?.target?.startsWith(ORIGIN)) return head.target.slice(ORIGIN.length);
  const present = names.find(({ target }) => target !== undefined);
  if (present) return present.name.slice(ORIGIN.length);
  let current = "";
  await gitItems(options, ["symbolic-ref", "--quiet", "--short", "HEAD"], (item) => {
    current = item.trim();
  });
  if (current === "") throw failedPrecondition("HEAD is detached and origin has no default branch");
  return current;
}
