import { openSync } from "node:fs";

// Node opens everything close-on-exec, but what a native library opened is inherited by every process started later.

const inheritable = new Set<number>();
let nothing: number | undefined;

/** Hides a descriptor from processes that are started from now on; returns what ends that, to be called before it is closed. */
export function hideFromChildren(descriptor: number): () => void {
  inheritable.add(descriptor);
  return () => void inheritable.delete(descriptor);
}

type Stdio = "ignore" | "pipe" | number;

/** The first three descriptors of a child, followed by /dev/null in the place of each hidden one. */
export function childStdio(first: [Stdio, Stdio, Stdio]): Stdio[] {
  const stdio: Stdio[] = [...first];
  for (const descriptor of inheritable) {
    // Left alone by `ignore`, which means /dev/null for the first three only.
    while (stdio.length <= descriptor) stdio.push("ignore");
    nothing ??= openSync("/dev/null", "r+");
    stdio[descriptor] = nothing;
  }
  return stdio;
}
