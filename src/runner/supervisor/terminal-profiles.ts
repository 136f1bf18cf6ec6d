import { basename, isAbsolute } from "node:path";
import { create } from "@bufbuild/protobuf";
import {
  type ListTerminalProfilesRequest,
  type TerminalProfile,
  TerminalProfileSchema,
} from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { readSmallFile } from "./config.ts";
import { isExecutable } from "./files.ts";

const SHELLS_FILE = "/etc/shells";
const MAX_SHELLS_BYTES = 64 * 1024;

/** Shells that the machine offers to its users, in its order. */
async function detectedShells(): Promise<string[]> {
  let text: string;
  try {
    text = readSmallFile(SHELLS_FILE, MAX_SHELLS_BYTES);
  } catch {
    return [];
  }
  const paths = new Set(text.split("\n").map((line) => line.replace(/#.*/, "").trim()));
  const shells: string[] = [];
  for (const path of paths) {
    if (isAbsolute(path) && (await isExecutable(path))) shells.push(path);
  }
  return shells;
}

/** Profiles of the caller by name, then detected ones whose name is still free; a name without a path hides both. */
export async function terminalProfiles(request: ListTerminalProfilesRequest): Promise<TerminalProfile[]> {
  const { configProfiles, includeDetectedProfiles } = request;
  const configured = Object.entries(configProfiles).filter(([, { path }]) => path !== "");
  const profiles = configured
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([profileName, { path }]) => create(TerminalProfileSchema, { profileName, path }));
  const times = new Map<string, number>();
  for (const path of includeDetectedProfiles ? await detectedShells() : []) {
    const name = basename(path);
    const time = (times.get(name) ?? 0) + 1;
    times.set(name, time);
    const profileName = time === 1 ? name : `${name} (${time})`;
    if (Object.hasOwn(configProfiles, profileName)) continue;
    profiles.push(create(TerminalProfileSchema, { profileName, path, isAutoDetected: true }));
  }
  return profiles;
}
