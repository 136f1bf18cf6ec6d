import { isAbsolute, normalize } from "node:path";

// What an environment sees of the host's files, as arguments of bubblewrap. Pure: whether something is there is looked
// up before.

/** A folder or file of the host in the view of an environment. */
export type Mount =
  /** An empty folder in its place. */
  | { kind: "hidden"; path: string }
  /** Nothing that could be opened or connected to, in the place of a file. */
  | { kind: "blocked"; path: string }
  /** Itself, but not to be written to. */
  | { kind: "kept"; path: string }
  /** A folder of the environment's own in its place. */
  | { kind: "own"; path: string; source: string }
  /** Itself, where something else would hide or protect it. */
  | { kind: "shown"; path: string; writable: boolean };

/** Everything that differs from the host; paths are absolute and without links. */
export interface View {
  hidden: readonly string[];
  blocked: readonly string[];
  kept: readonly string[];
  own: readonly { path: string; source: string }[];
  shown: readonly { path: string; writable: boolean }[];
}

const isInside = (path: string, folder: string) => path.startsWith(folder === "/" ? "/" : `${folder}/`);

/** The innermost of the mounts that a path lies in. */
const around = (mounts: readonly Mount[], path: string): Mount | undefined =>
  mounts.findLast((mount) => isInside(path, mount.path));

const hides = (mount: Mount | undefined) => mount?.kind === "hidden" || mount?.kind === "own";

/** Whether a mount changes anything, given those around it. */
function counts(mount: Mount, outer: Mount | undefined): boolean {
  if (mount.kind === "own") return true;
  if (mount.kind !== "shown") return !hides(outer);
  return hides(outer) || (mount.writable && outer?.kind === "kept");
}

/**
 * The mounts of a view in the order they are made, outer ones first; those that would change nothing are left out.
 * Throws for a path that is not absolute and plain.
 */
export function mountsOf({ hidden, blocked, kept, own, shown }: View): Mount[] {
  const wanted: Mount[] = [
    ...kept.map((path) => ({ kind: "kept" as const, path })),
    ...hidden.map((path) => ({ kind: "hidden" as const, path })),
    ...blocked.map((path) => ({ kind: "blocked" as const, path })),
    ...own.map((each) => ({ kind: "own" as const, ...each })),
    ...shown.map((each) => ({ kind: "shown" as const, ...each })),
  ];
  for (const mount of wanted) requirePlain(mount.path);
  for (const { source } of own) requirePlain(source);
  const mounts: Mount[] = [];
  // What lies in something has the longer path.
  for (const mount of wanted.sort((a, b) => a.path.length - b.path.length)) {
    if (counts(mount, around(mounts, mount.path))) mounts.push(mount);
  }
  return mounts;
}

function requirePlain(path: string): void {
  const isPlain = isAbsolute(path) && normalize(path) === path && (path === "/" || !path.endsWith("/"));
  if (!isPlain || path.includes("\0")) throw new Error(`${JSON.stringify(path)} is not a plain absolute path`);
}

function argumentsOf(mount: Mount): string[] {
  switch (mount.kind) {
    case "hidden":
      return ["--tmpfs", mount.path];
    case "blocked":
      return ["--ro-bind", "/dev/null", mount.path];
    case "kept":
      return ["--ro-bind", mount.path, mount.path];
    case "own":
      return ["--bind", mount.source, mount.path];
    case "shown":
      return [mount.writable ? "--bind" : "--ro-bind", mount.path, mount.path];
  }
}

/** Folders on the way from an empty one to what is shown in it, which others than the runner have to pass as well. */
function wayTo({ path }: Mount, outer: Mount | undefined): string[] {
  if (outer?.kind !== "hidden") return [];
  const names = path.slice(outer.path.length + 1).split("/");
  return names.slice(0, -1).map((_, index) => [outer.path, ...names.slice(0, index + 1)].join("/"));
}

/** Arguments of bubblewrap for mounts in their order; each path is an argument by itself. */
export const mountArguments = (mounts: readonly Mount[]): string[] => [
  ...["--dev-bind", "/", "/"],
  ...mounts.flatMap((mount, index) => [
    ...wayTo(mount, around(mounts.slice(0, index), mount.path)).flatMap((folder) => [
      ...["--perms", "0755", "--dir", folder],
    ]),
    ...argumentsOf(mount),
  ]),
];

function stepOf(mount: Mount): string[] {
  switch (mount.kind) {
    case "hidden":
      return ["empty", mount.path];
    case "blocked":
      return ["read", "/dev/null", mount.path];
    case "kept":
      return ["read", mount.path, mount.path];
    case "own":
      return ["bind", mount.source, mount.path];
    case "shown":
      return [mount.writable ? "bind" : "read", mount.path, mount.path];
  }
}

/**
 * Makes the same mounts in a view that is there already. Arguments: programs that mount and unmount, a folder in which
 * the host is to be seen as it was, which is gone afterwards, and the steps. A place in an empty folder is made.
 */
export const ARRANGE = `set -eu
umask 022
mount=$1 umount=$2 host=$3
shift 3
place() {
  if [ -e "$2" ]; then return; fi
  if [ -d "$host$1" ]; then mkdir -- "$2"; else : >"$2"; fi
}
while [ $# -gt 0 ]; do
  case $1 in
    folder) [ -d "$2" ] || mkdir -- "$2"; shift 2 ;;
    empty) "$mount" -n -t tmpfs -o mode=0755,nosuid,nodev tmpfs "$2"; shift 2 ;;
    bind) place "$2" "$3"; "$mount" -n -o bind "$host$2" "$3"; shift 3 ;;
    read) place "$2" "$3"; "$mount" -n -o bind,ro "$host$2" "$3"; shift 3 ;;
    *) exit 1 ;;
  esac
done
"$umount" -n -l "$host"`;

/** Steps of ARRANGE for mounts in their order. */
export const mountSteps = (mounts: readonly Mount[]): string[] =>
  mounts.flatMap((mount, index) => [
    ...wayTo(mount, around(mounts.slice(0, index), mount.path)).flatMap((folder) => ["folder", folder]),
    ...stepOf(mount),
  ]);

/** A place in a folder of the environment's that something of the host's is shown at. */
export interface MountPoint {
  /** The environment's folder. */
  folder: string;
  /** Below that folder. */
  path: string;
  /** What is shown there. */
  target: string;
}

/** The places that must exist in the environment's own folders before the mounts can be made. */
export const mountPoints = (mounts: readonly Mount[]): MountPoint[] =>
  mounts.flatMap((mount, index) => {
    const outer = around(mounts.slice(0, index), mount.path);
    if (outer?.kind !== "own") return [];
    return [{ folder: outer.source, path: mount.path.slice(outer.path.length + 1), target: mount.path }];
  });
