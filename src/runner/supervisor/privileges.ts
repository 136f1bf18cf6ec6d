import { SupervisorConfigError } from "./config.ts";

/**
 * Becomes the environment's user for good, with no other groups than its own. Root without a user to become is
 * refused; so is a user other than the present one when not root.
 */
export function dropPrivileges({ uid, gid }: { uid?: number; gid?: number }): void {
  const { getuid, setgroups, setgid, setuid } = process;
  if (!getuid || !setgroups || !setgid || !setuid) throw new SupervisorConfigError("needs a POSIX system");
  const current = getuid();
  if (current !== 0) {
    if (uid !== undefined && uid !== current) throw new SupervisorConfigError("only root can become another user");
    return;
  }
  if (uid === undefined || gid === undefined)
    throw new SupervisorConfigError("started as root, uid and gid must be given");
  setgroups([gid]);
  setgid(gid);
  setuid(uid);
  if (getuid() !== uid || regainsRoot(setuid)) throw new Error("privileges were not dropped");
}

function regainsRoot(setuid: (id: number) => void): boolean {
  try {
    setuid(0);
    return true;
  } catch {
    return false;
  }
}
