import { join } from "node:path";
import { readSmallFile, type SupervisorConfig } from "./config.ts";

const MAX_ENV_FILE_BYTES = 1024 * 1024;
const PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/** The variables of every process of the environment; nothing of the supervisor's own environment is among them. */
export class ProcessEnvironment {
  readonly #config: SupervisorConfig;
  #fromFile: Record<string, string> = {};
  #secrets: Record<string, string> = {};

  constructor(config: SupervisorConfig) {
    this.#config = config;
  }

  /**
   * Reads the files anew, since secrets change while the environment runs; an unreadable one leaves the last values.
   * What one process gets in addition wins over all but the environment's id, which its processes are found by.
   */
  read(more: Readonly<Record<string, string>> = {}): Record<string, string> {
    const { environmentId, envFile, root, userName, shell } = this.#config;
    this.#fromFile = fromFile(envFile) ?? this.#fromFile;
    this.#secrets = fromFile(join(root, "secrets", "env")) ?? this.#secrets;
    return {
      HOME: join(root, "home"),
      USER: userName,
      LOGNAME: userName,
      SHELL: shell,
      PATH,
      LANG: "C.UTF-8",
      ...this.#fromFile,
      ...this.#secrets,
      ...more,
      BERTH_ENVIRONMENT_ID: environmentId,
      GITPOD_ENVIRONMENT_ID: environmentId,
    };
  }
}

/** Undefined for a file that is missing for a moment or broken from inside: processes must still start. */
function fromFile(path: string): Record<string, string> | undefined {
  try {
    return variables(JSON.parse(readSmallFile(path, MAX_ENV_FILE_BYTES)));
  } catch {
    return undefined;
  }
}

function variables(value: unknown): Record<string, string> {
  if (typeof value !== "object" || value === null) return {};
  const isVariable = (entry: [string, unknown]): entry is [string, string] =>
    /^[^=\0]+$/.test(entry[0]) && typeof entry[1] === "string" && !entry[1].includes("\0");
  return Object.fromEntries(Object.entries(value).filter(isVariable));
}
