import { isIP } from "node:net";
import { homedir, hostname } from "node:os";
import { join, resolve } from "node:path";
import { type LoginConfig, loginConfig } from "./config/login.ts";
import { ConfigError, type Environment, HOST, plainUrl, Reader } from "./config/reader.ts";

export { ConfigError };

/** Where the first credential of a pre-seeded installation comes from and where a generated one goes. */
export interface BootstrapConfig {
  enabled: boolean;
  organizationName: string;
  adminEmail: string;
  adminName: string;
  adminToken?: string;
  tokenFile?: string;
}

/** An entry point that the operator tells clients about. */
export interface GatewayConfig {
  name: string;
  url: string;
  region: string;
}

/** Settings of the control plane. */
export interface ServerConfig {
  host: string;
  port: number;
  publicUrl: string;
  dataDir: string;
  databaseUrl?: string;
  masterKey?: Uint8Array;
  bootstrap: BootstrapConfig;
  /** Domains at which anybody can get a mail address, in lower case, beside those that everybody knows. */
  publicEmailDomains: readonly string[];
  /** In the order of their names; at least one. */
  gateways: readonly GatewayConfig[];
  login: LoginConfig;
  metricsToken?: string;
  /** Base of help links in errors, without a slash at its end. */
  docsUrl?: string;
  logLevel: LogLevel;
  /** Calls per second and caller; 0 turns the limit off. */
  rateLimit: number;
  trustedProxies: readonly string[];
  scm: ScmConfig;
  auditRetentionDays: number;
  embeddedRunner: boolean;
  runner: RunnerHostConfig;
  /** For an embedded runner that has lost its credential. */
  runnerExchangeToken?: string;
}

/** What both processes need to talk to git hosts. */
export interface ScmConfig {
  fallback: boolean;
  allowHosts: readonly string[];
  schemes: readonly string[];
}

/** Settings of a Linux-host runner, embedded or alone. */
export interface RunnerHostConfig {
  name: string;
  host: string;
  port: number;
  publicUrl: string;
  dataDir: string;
  /** Folders besides `dataDir` that environments must not see. */
  hiddenFolders: readonly string[];
  maxEnvironments: number;
  /** Days for which logs of services and executions are kept. */
  logDays: number;
  /** Domain below which each port of an environment has a host of its own. */
  portDomain?: string;
  /** Ports that SSH servers of environments may have, both ends included. */
  sshPorts: { from: number; to: number };
  allowUnenforced: boolean;
  /** Whether bubblewrap keeps environments apart: where it works, never, or else the runner does not start. */
  sandbox: "auto" | "off" | "require";
  hostDevcontainer: "run" | "skip" | "fail";
  /** Engine for containers; `auto` is docker, else podman. */
  containerEngine: "auto" | "docker" | "podman" | "none";
  /** DOCKER_HOST of the runner; without it the usual socket. */
  dockerHost?: string;
  scm: ScmConfig;
  logLevel: LogLevel;
}

/** Settings of a runner that runs alone. */
export interface RunnerConfig extends RunnerHostConfig {
  apiUrl: string;
  exchangeToken?: string;
}

export type LogLevel = "debug" | "info" | "warn" | "error";
const KEY_BYTES = 32;
const KEY = /^[A-Za-z0-9+/]{43}=$/;
const NAME_LENGTH = { min: 3, max: 255 };

/** The bytes of a master key in base64; undefined for any other text. */
export function parseMasterKey(text: string): Uint8Array | undefined {
  const key = KEY.test(text) ? Buffer.from(text, "base64") : undefined;
  return key?.length === KEY_BYTES ? key : undefined;
}

function masterKey(read: Reader): Uint8Array | undefined {
  const text = read.secret("BERTH_MASTER_KEY");
  if (!text) return undefined;
  const key = parseMasterKey(text);
  const name = read.optional("BERTH_MASTER_KEY") ? "BERTH_MASTER_KEY" : "BERTH_MASTER_KEY_FILE";
  if (!key) throw new ConfigError(`${name} must hold ${KEY_BYTES} bytes in base64`);
  return key;
}

function isHostAndPort(text: string): boolean {
  const host = isIP(text) === 6 ? `[${text}]` : text;
  return !/[\s/\\?#@]|:$/.test(host) && URL.canParse(`https://${host}`);
}

function isNetwork(text: string): boolean {
  const [address = "", prefix] = text.split("/");
  const family = isIP(address);
  const longest = family === 6 ? 128 : 32;
  const isPrefix = prefix === undefined || (/^\d{1,3}$/.test(prefix) && Number(prefix) <= longest);
  return family !== 0 && isPrefix && text.split("/").length <= 2;
}

function dataDir(read: Reader): string {
  const own =
    process.getuid?.() === 0
      ? "/var/lib/berth"
      : join(read.env.XDG_STATE_HOME || join(homedir(), ".local/state"), "berth");
  return resolve(read.text("BERTH_DATA_DIR", own));
}

function emailDomains(read: Reader): string[] {
  const isDomain = (item: string) => HOST.test(item) && item.includes(".");
  return read.list("BERTH_PUBLIC_EMAIL_DOMAINS", isDomain, "domains").map((domain) => domain.toLowerCase());
}

function gateways(read: Reader, publicUrl: string): GatewayConfig[] {
  const given = read.objects("BERTH_GATEWAYS", ["name", "url", "region"]);
  if (!given) return [{ name: "default", url: publicUrl, region: "local" }];
  const found = given.map(({ name = "", url = "", region = "" }) => {
    const address = plainUrl(url);
    if (!name.trim() || address === undefined) {
      throw new ConfigError("BERTH_GATEWAYS must give each gateway a name and an http or https url");
    }
    return { name: name.trim(), url: address, region };
  });
  if (found.length === 0) throw new ConfigError("BERTH_GATEWAYS must name at least one gateway");
  if (new Set(found.map(({ name }) => name)).size < found.length)
    throw new ConfigError("BERTH_GATEWAYS must not name a gateway twice");
  return found.sort((a, b) => (a.name < b.name ? -1 : 1));
}

function scmConfig(read: Reader): ScmConfig {
  const schemes = ["file", "http", "git"];
  return {
    fallback: read.flag("BERTH_SCM_FALLBACK", true),
    allowHosts: read.list("BERTH_SCM_ALLOW_HOSTS", isHostAndPort, "host[:port] entries"),
    schemes: read.list("BERTH_GIT_SCHEMES", (item) => schemes.includes(item), schemes.join(", ")),
  };
}

const logLevel = (read: Reader) => read.oneOf("BERTH_LOG_LEVEL", ["debug", "info", "warn", "error"], "info");

function portDomain(read: Reader): string | undefined {
  const domain = read.optional("BERTH_RUNNER_PORT_DOMAIN")?.toLowerCase();
  if (domain && (!HOST.test(domain) || !domain.includes(".")))
    throw new ConfigError("BERTH_RUNNER_PORT_DOMAIN must be a domain without its wildcard");
  return domain;
}

function sshPorts(read: Reader): { from: number; to: number } {
  const [, from, to] = /^(\d{1,5})-(\d{1,5})$/.exec(read.text("BERTH_RUNNER_SSH_PORTS", "22000-22999")) ?? [];
  const ports = { from: Number(from), to: Number(to) };
  if (!from || !to || ports.from < 1024 || ports.to > 65_535 || ports.from > ports.to)
    throw new ConfigError("BERTH_RUNNER_SSH_PORTS must be a range of ports from 1024 on, such as 22000-22999");
  return ports;
}

function runnerHost(read: Reader, home: string): RunnerHostConfig {
  const host = read.host("BERTH_RUNNER_HOST", "127.0.0.1");
  const port = read.integer("BERTH_RUNNER_PORT", 8081, 0, 65_535);
  return {
    name: hostname().slice(0, 127).padEnd(3, "-"),
    host,
    port,
    publicUrl: read.url("BERTH_RUNNER_PUBLIC_URL", `http://127.0.0.1:${port}`),
    dataDir: resolve(read.text("BERTH_RUNNER_DATA_DIR", join(home, "runner"))),
    hiddenFolders: [home],
    maxEnvironments: read.integer("BERTH_RUNNER_MAX_ENVIRONMENTS", 10, 1, 10_000),
    logDays: read.integer("BERTH_RUNNER_LOG_DAYS", 30, 1, 3650),
    portDomain: portDomain(read),
    sshPorts: sshPorts(read),
    allowUnenforced: read.flag("BERTH_RUNNER_ALLOW_UNENFORCED", false),
    sandbox: read.oneOf("BERTH_RUNNER_SANDBOX", ["auto", "off", "require"], "auto"),
    hostDevcontainer: read.oneOf("BERTH_RUNNER_HOST_DEVCONTAINER", ["run", "skip", "fail"], "run"),
    containerEngine: read.oneOf("BERTH_RUNNER_CONTAINER_ENGINE", ["auto", "docker", "podman", "none"], "auto"),
    dockerHost: read.optional("DOCKER_HOST"),
    scm: scmConfig(read),
    logLevel: logLevel(read),
  };
}

/** Reads the configuration of the control plane; throws ConfigError for anything unknown or malformed. */
export function readServerConfig(env: Environment): ServerConfig {
  const read = new Reader(env);
  const home = dataDir(read);
  const port = read.integer("BERTH_PORT", 8080, 0, 65_535);
  const organizationName = read.text("BERTH_BOOTSTRAP_ORG_NAME", "Default");
  if (organizationName.length < NAME_LENGTH.min || organizationName.length > NAME_LENGTH.max) {
    throw new ConfigError(`BERTH_BOOTSTRAP_ORG_NAME must have ${NAME_LENGTH.min} to ${NAME_LENGTH.max} characters`);
  }
  const adminEmail = read.text("BERTH_BOOTSTRAP_ADMIN_EMAIL", "admin@localhost").toLowerCase();
  if (!/^[^@\s]+@[^@\s]+$/.test(adminEmail))
    throw new ConfigError("BERTH_BOOTSTRAP_ADMIN_EMAIL must be a mail address");
  const databaseUrl = env.DATABASE_URL?.trim() || undefined;
  if (databaseUrl && !/^postgres(ql)?:$/.test(URL.parse(databaseUrl)?.protocol ?? "")) {
    throw new ConfigError("DATABASE_URL must be a postgres:// URL");
  }
  const publicUrl = read.url("BERTH_PUBLIC_URL", `http://127.0.0.1:${port}`);
  return {
    host: read.host("BERTH_HOST", "127.0.0.1"),
    port,
    publicUrl,
    dataDir: home,
    databaseUrl,
    masterKey: masterKey(read),
    bootstrap: {
      enabled: read.flag("BERTH_BOOTSTRAP", true),
      organizationName,
      adminEmail,
      adminName: read.text("BERTH_BOOTSTRAP_ADMIN_NAME", "Administrator"),
      adminToken: read.secret("BERTH_BOOTSTRAP_ADMIN_TOKEN"),
      tokenFile: read.optional("BERTH_BOOTSTRAP_TOKEN_FILE"),
    },
    publicEmailDomains: emailDomains(read),
    gateways: gateways(read, publicUrl),
    login: loginConfig(read),
    metricsToken: read.optional("BERTH_METRICS_TOKEN"),
    docsUrl: read.optional("BERTH_DOCS_URL") && read.url("BERTH_DOCS_URL", ""),
    logLevel: logLevel(read),
    rateLimit: read.integer("BERTH_RATE_LIMIT", 50, 0, 1_000_000),
    trustedProxies: read.list("BERTH_TRUSTED_PROXIES", isNetwork, "IP addresses and networks"),
    scm: scmConfig(read),
    auditRetentionDays: read.integer("BERTH_AUDIT_RETENTION_DAYS", 400, 0, 100_000),
    embeddedRunner: read.flag("BERTH_RUNNER", true),
    runner: runnerHost(read, home),
    runnerExchangeToken: read.secret("BERTH_RUNNER_EXCHANGE_TOKEN"),
  };
}

/** Reads the configuration of a runner that runs alone. */
export function readRunnerConfig(env: Environment): RunnerConfig {
  const read = new Reader(env);
  if (!read.optional("BERTH_RUNNER_API_URL"))
    throw new ConfigError("BERTH_RUNNER_API_URL is not set: the URL of the control plane");
  return {
    ...runnerHost(read, dataDir(read)),
    apiUrl: read.url("BERTH_RUNNER_API_URL", ""),
    exchangeToken: read.secret("BERTH_RUNNER_EXCHANGE_TOKEN"),
  };
}
