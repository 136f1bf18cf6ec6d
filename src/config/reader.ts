import { readFileSync, statSync } from "node:fs";
import { isIP } from "node:net";

/** Wrong operator input: the program ends with exit code 2 and this text, which names the variable. */
export class ConfigError extends Error {}

export type Environment = Record<string, string | undefined>;

// Every variable of the product. One that exists but is not built yet is refused, so that nobody relies on it silently.
const VARIABLES = new Set([
  "BERTH_HOST",
  "BERTH_PORT",
  "BERTH_PUBLIC_URL",
  "BERTH_DATA_DIR",
  "BERTH_MASTER_KEY",
  "BERTH_MASTER_KEY_FILE",
  "BERTH_BOOTSTRAP",
  "BERTH_BOOTSTRAP_ORG_NAME",
  "BERTH_BOOTSTRAP_ADMIN_EMAIL",
  "BERTH_BOOTSTRAP_ADMIN_NAME",
  "BERTH_BOOTSTRAP_ADMIN_TOKEN",
  "BERTH_BOOTSTRAP_ADMIN_TOKEN_FILE",
  "BERTH_BOOTSTRAP_TOKEN_FILE",
  "BERTH_PUBLIC_EMAIL_DOMAINS",
  "BERTH_GATEWAYS",
  "BERTH_OIDC_PROVIDERS",
  "BERTH_SESSION_IDLE",
  "BERTH_SESSION_MAX",
  "BERTH_RETURN_TO_ORIGINS",
  "BERTH_LOOPBACK_ISSUERS",
  "BERTH_AUDIT_RETENTION_DAYS",
  "BERTH_RATE_LIMIT",
  "BERTH_TRUSTED_PROXIES",
  "BERTH_METRICS_TOKEN",
  "BERTH_DOCS_URL",
  "BERTH_LOG_LEVEL",
  "BERTH_SCM_FALLBACK",
  "BERTH_SCM_ALLOW_HOSTS",
  "BERTH_GIT_SCHEMES",
  "BERTH_RUNNER",
  "BERTH_RUNNER_HOST",
  "BERTH_RUNNER_PORT",
  "BERTH_RUNNER_PUBLIC_URL",
  "BERTH_RUNNER_PORT_DOMAIN",
  "BERTH_RUNNER_SSH_PORTS",
  "BERTH_RUNNER_DATA_DIR",
  "BERTH_RUNNER_MAX_ENVIRONMENTS",
  "BERTH_RUNNER_LOG_DAYS",
  "BERTH_RUNNER_ALLOW_UNENFORCED",
  "BERTH_RUNNER_HOST_DEVCONTAINER",
  "BERTH_RUNNER_CONTAINER_ENGINE",
  "BERTH_RUNNER_SANDBOX",
  "BERTH_RUNNER_API_URL",
  "BERTH_RUNNER_EXCHANGE_TOKEN",
  "BERTH_RUNNER_EXCHANGE_TOKEN_FILE",
]);
// What clients read, and what a runner gives the processes of an environment: `berth` may be started beside them.
const OF_OTHERS = new Set([
  ...["BERTH_TOKEN", "BERTH_ENVIRONMENT_ID"],
  ...["BERTH_AUTOMATION", "BERTH_SESSION", "BERTH_EXECUTION_ID", "BERTH_OUTPUT", "BERTH_RUN"],
]);

/** A host name. */
export const HOST = /^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$/;
const UNITS: Readonly<Record<string, number>> = { s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };
const MAX_OBJECTS = 100;
const MAX_SECRET_BYTES = 64 * 1024;

/** Reads variables; throws ConfigError, which names the variable and never shows its value. */
export class Reader {
  readonly env: Environment;

  constructor(env: Environment) {
    this.env = env;
    for (const name of Object.keys(env)) {
      if (name.startsWith("BERTH_") && !VARIABLES.has(name) && !OF_OTHERS.has(name)) {
        throw new ConfigError(`${name} is not a variable that this version knows`);
      }
    }
  }

  optional(name: string): string | undefined {
    return this.env[name]?.trim() || undefined;
  }

  text(name: string, fallback: string): string {
    return this.optional(name) ?? fallback;
  }

  oneOf<const T extends string>(name: string, values: readonly T[], fallback: T): T {
    const value = this.text(name, fallback);
    const found = values.find((each) => each === value);
    if (!found) throw new ConfigError(`${name} must be one of ${values.join(", ")}`);
    return found;
  }

  flag(name: string, fallback: boolean): boolean {
    return this.oneOf(name, ["on", "off"], fallback ? "on" : "off") === "on";
  }

  integer(name: string, fallback: number, min: number, max: number): number {
    const value = this.text(name, String(fallback));
    const number = Number(value);
    if (!/^\d+$/.test(value) || number < min || number > max) {
      throw new ConfigError(`${name} must be a whole number from ${min} to ${max}`);
    }
    return number;
  }

  /** A span of time such as `90s`, `15m`, `24h` or `7d`, in milliseconds. */
  duration(name: string, fallback: string, min: number, max: number): number {
    const [, number = "", unit = ""] = /^(\d{1,9})([smhd])$/.exec(this.text(name, fallback)) ?? [];
    const ms = Number(number) * (UNITS[unit] ?? Number.NaN);
    if (!(ms >= min && ms <= max)) {
      throw new ConfigError(
        `${name} must be a time from ${min / 1000}s to ${max / 1000}s, such as 90s, 15m, 24h or 7d`,
      );
    }
    return ms;
  }

  url(name: string, fallback: string): string {
    const url = plainUrl(this.text(name, fallback));
    if (url === undefined) {
      throw new ConfigError(`${name} must be an http or https URL without query, fragment or credentials`);
    }
    return url;
  }

  host(name: string, fallback: string): string {
    const value = this.text(name, fallback);
    if (!HOST.test(value) && !isIP(value)) throw new ConfigError(`${name} must be a host name or an IP address`);
    return value;
  }

  /** A list separated by commas, each item of which passes a check; `what` says which items do. */
  list(name: string, isValid: (item: string) => boolean, what: string): string[] {
    const items = this.text(name, "")
      .split(",")
      .map((item) => item.trim())
      .filter(Boolean);
    const wrong = items.find((item) => !isValid(item));
    if (wrong !== undefined) throw new ConfigError(`${name} must list ${what}`);
    return items;
  }

  /** A JSON list of objects that hold these texts and nothing else; undefined if it is not set. */
  objects<const K extends string>(name: string, keys: readonly K[]): Partial<Record<K, string>>[] | undefined {
    const text = this.optional(name);
    if (text === undefined) return undefined;
    const shape = `${name} must be a JSON list of objects with the texts ${keys.join(", ")}`;
    const items = parseJson(text);
    if (!Array.isArray(items) || items.length > MAX_OBJECTS) throw new ConfigError(shape);
    for (const item of items) {
      const isObject = typeof item === "object" && item !== null && !Array.isArray(item);
      const fits = ([key, value]: [string, unknown]) => keys.includes(key as K) && typeof value === "string";
      if (!isObject || !Object.entries(item).every(fits)) throw new ConfigError(shape);
    }
    return items;
  }

  /** A secret given as a variable or as a file; both at once is a mistake. */
  secret(name: string): string | undefined {
    const file = this.optional(`${name}_FILE`);
    const value = this.optional(name);
    if (file && value) throw new ConfigError(`${name} and ${name}_FILE are both set`);
    if (!file) return value;
    const content = readSecret(file);
    if (content === undefined) throw new ConfigError(`${name}_FILE cannot be read`);
    // An empty file is one that somebody has yet to fill, and not the wish for a value of our own making.
    if (!content) throw new ConfigError(`${name}_FILE names an empty file`);
    return content;
  }
}

/** An http(s) URL without query, fragment, credentials and trailing slash; undefined for any other text. */
export function plainUrl(text: string): string | undefined {
  const url = URL.parse(text);
  if (!url || !/^https?:$/.test(url.protocol) || /[?#@\s]/.test(text)) return undefined;
  return text.replace(/\/+$/, "");
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** The text in a file, without blanks around it; undefined if it cannot be read. */
export function readSecret(file: string): string | undefined {
  try {
    return statSync(file).size > MAX_SECRET_BYTES ? undefined : readFileSync(file, "utf8").trim();
  } catch {
    return undefined;
  }
}
