import { accessSync, constants } from "node:fs";
import { join } from "node:path";

const FOLDERS = ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"];

export function isProgram(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/** Absolute path of a program of the system, or of one in the PATH of this process; undefined if there is none. */
export function findProgram(name: string): string | undefined {
  const folders = [...FOLDERS, ...(process.env.PATH ?? "").split(":").filter((folder) => folder.startsWith("/"))];
  return folders.map((folder) => join(folder, name)).find(isProgram);
}
