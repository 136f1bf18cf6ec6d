import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { hostname, tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { ConfigError, readRunnerConfig, readServerConfig, type ServerConfig } from "../src/config.ts";

const home = mkdtempSync(join(tmpdir(), "berth-config-"));
afterAll(() => rmSync(home, { recursive: true, force: true }));

function file(name: string, content: string): string {
  const path = join(home, name);
  writeFileSync(path, content);
  return path;
}

const key = Buffer.alloc(32, 7);
const keyText = key.toString("base64");
const asRoot = process.getuid?.() === 0;

/** A variable: what its setting is without it, what it becomes, and texts that it does not take. */
interface Variable {
  read: (config: ServerConfig) => unknown;
  unset: unknown;
  good: [text: string, value: unknown][];
  bad: string[];
}

const flag = (read: Variable["read"], unset: boolean): Variable => ({
  read,
  unset,
  good: [
    ["on", true],
    [" off ", false],
  ],
  bad: ["true", "ON", "1", "no"],
});
const integer = (read: Variable["read"], unset: number, [min, max]: [number, number]): Variable => ({
  read,
  unset,
  good: [
    [String(min), min],
    [String(max), max],
  ],
  bad: [String(min - 1), String(max + 1), "1.5", "0x10", "1e3", "ten", "-0"],
});
const duration = (read: Variable["read"], unset: number): Variable => ({
  read,
  unset,
  good: [
    ["90s", 90_000],
    ["15m", 900_000],
    ["2h", 7_200_000],
    ["365d", 365 * 86_400_000],
  ],
  bad: ["59s", "366d", "24", "h", "1.5h", "-1h", "24 h", "1w", "1e3s"],
});
const url = (read: Variable["read"], unset: string | undefined): Variable => ({
  read,
  unset,
  good: [
    ["https://berth.example.org/", "https://berth.example.org"],
    ["http://10.0.0.1:8080/base//", "http://10.0.0.1:8080/base"],
  ],
  bad: [
    "berth.example.org",
    "ftp://x",
    "http://",
    "https://x?a=b",
    "https://x#y",
    "https://u@x",
    "https://:p@x",
    "https://a b",
  ],
});
const host = (read: Variable["read"]): Variable => ({
  read,
  unset: "127.0.0.1",
  good: [
    ["0.0.0.0", "0.0.0.0"],
    ["::1", "::1"],
    ["berth.example.org", "berth.example.org"],
  ],
  bad: ["http://x", "x:80", "[::1]", "a b", "-x"],
});

const VARIABLES: Record<string, Variable> = {
  BERTH_HOST: host((config) => config.host),
  BERTH_PORT: integer((config) => config.port, 8080, [0, 65_535]),
  BERTH_PUBLIC_URL: url((config) => config.publicUrl, "http://127.0.0.1:8080"),
  BERTH_DATA_DIR: {
    read: (config) => config.dataDir,
    unset: asRoot ? "/var/lib/berth" : "/home/somebody/state/berth",
    good: [
      ["/srv/berth", "/srv/berth"],
      ["relative", join(process.cwd(), "relative")],
    ],
    bad: [],
  },
  DATABASE_URL: {
    read: (config) => config.databaseUrl,
    unset: undefined,
    good: [
      ["postgres://u@db/berth", "postgres://u@db/berth"],
      ["postgresql:///berth?host=/run/postgres", "postgresql:///berth?host=/run/postgres"],
    ],
    bad: ["mysql://db/berth", "db.example.org", "/run/postgres"],
  },
  BERTH_MASTER_KEY: {
    read: (config) => config.masterKey && Buffer.from(config.masterKey).toString("base64"),
    unset: undefined,
    good: [[keyText, keyText]],
    bad: [
      Buffer.alloc(31).toString("base64"),
      Buffer.alloc(33).toString("base64"),
      key.toString("hex"),
      `${keyText.slice(0, 20)} ${keyText.slice(20)}`,
      `${keyText.slice(0, 20)}!${keyText.slice(20)}`,
    ],
  },
  BERTH_MASTER_KEY_FILE: {
    read: (config) => config.masterKey && Buffer.from(config.masterKey).toString("base64"),
    unset: undefined,
    good: [[file("key", `${keyText}\n`), keyText]],
    bad: [join(home, "absent"), home, file("empty-key", "\n"), file("short-key", "c2hvcnQ=")],
  },
  BERTH_BOOTSTRAP: flag((config) => config.bootstrap.enabled, true),
  BERTH_BOOTSTRAP_ORG_NAME: {
    read: (config) => config.bootstrap.organizationName,
    unset: "Default",
    good: [
      ["Dev", "Dev"],
      ["x".repeat(255), "x".repeat(255)],
    ],
    bad: ["ab", " ab ", "x".repeat(256)],
  },
  BERTH_BOOTSTRAP_ADMIN_EMAIL: {
    read: (config) => config.bootstrap.adminEmail,
    unset: "admin@localhost",
    good: [["Jo@Example.org", "jo@example.org"]],
    bad: ["jo", "jo@", "@example.org", "jo@exa mple.org", "jo@a@b"],
  },
  BERTH_BOOTSTRAP_ADMIN_NAME: {
    read: (config) => config.bootstrap.adminName,
    unset: "Administrator",
    good: [["Jo", "Jo"]],
    bad: [],
  },
  BERTH_BOOTSTRAP_ADMIN_TOKEN: {
    read: (config) => config.bootstrap.adminToken,
    unset: undefined,
    good: [["berth_pat_x", "berth_pat_x"]],
    // Its form is checked at the start, which knows tokens.
    bad: [],
  },
  BERTH_BOOTSTRAP_ADMIN_TOKEN_FILE: {
    read: (config) => config.bootstrap.adminToken,
    unset: undefined,
    good: [[file("token", "berth_pat_x\n"), "berth_pat_x"]],
    bad: [join(home, "absent"), file("empty-token", ""), file("huge-token", "x".repeat(1024 * 1024))],
  },
  BERTH_BOOTSTRAP_TOKEN_FILE: {
    read: (config) => config.bootstrap.tokenFile,
    unset: undefined,
    good: [["/run/token", "/run/token"]],
    bad: [],
  },
  BERTH_GATEWAYS: {
    read: (config) => config.gateways,
    unset: [{ name: "default", url: "http://127.0.0.1:8080", region: "local" }],
    good: [
      [
        '[{"name":"west","url":"https://w.example.org/","region":"us"},{"name":" east ","url":"https://e.example.org"}]',
        [
          { name: "east", url: "https://e.example.org", region: "" },
          { name: "west", url: "https://w.example.org", region: "us" },
        ],
      ],
    ],
    bad: [
      "default",
      "{}",
      "[]",
      "[null]",
      '["x"]',
      '[{"name":"a"}]',
      '[{"url":"https://a"}]',
      '[{"name":" ","url":"https://a"}]',
      '[{"name":"a","url":"ftp://a"}]',
      '[{"name":"a","url":"https://a","region":1}]',
      '[{"name":"a","url":"https://a","extra":"x"}]',
      '[{"name":"a","url":"https://a"},{"name":"a","url":"https://b"}]',
    ],
  },
  BERTH_OIDC_PROVIDERS: {
    read: (config) => config.login.providers,
    unset: [],
    good: [
      ["[]", []],
      [
        `[{"id":"corp","issuer":"https://login.example.org/","client_id":"b","client_secret":" s "},
          {"id":"g-1","name":"Google","issuer":"https://g.example.org/t","client_id":"c","client_secret_file":"${file("client", "t\n")}"}]`,
        [
          { id: "corp", name: "corp", issuer: "https://login.example.org/", clientId: "b", clientSecret: "s" },
          { id: "g-1", name: "Google", issuer: "https://g.example.org/t", clientId: "c", clientSecret: "t" },
        ],
      ],
    ],
    bad: [
      '{"id":"a","issuer":"https://i","client_id":"c","client_secret":"SeCrEt"}',
      ...[
        { id: "" },
        { id: "A" },
        { id: "custom" },
        { id: "local" },
        { issuer: "http://login.example.org" },
        { issuer: "http://127.0.0.1:9" },
        { issuer: "https://login.example.org?x" },
        { issuer: "https://u@login.example.org" },
        { issuer: "login.example.org" },
        { client_id: "" },
        { client_secret: "" },
        { client_secret_file: file("secret-of-client", "SeCrEt") },
        { client_secret: "", client_secret_file: join(home, "absent") },
        { scopes: "x" },
      ].map((change) =>
        JSON.stringify([
          { id: "a", issuer: "https://i.example.org", client_id: "c", client_secret: "SeCrEt", ...change },
        ]),
      ),
      JSON.stringify(
        [1, 2].map(() => ({ id: "a", issuer: "https://i.example.org", client_id: "c", client_secret: "SeCrEt" })),
      ),
    ],
  },
  BERTH_SESSION_IDLE: duration((config) => config.login.sessionIdleMs, 24 * 3_600_000),
  BERTH_SESSION_MAX: duration((config) => config.login.sessionMaxMs, 7 * 24 * 3_600_000),
  BERTH_RETURN_TO_ORIGINS: {
    read: (config) => config.login.returnToOrigins,
    unset: [],
    good: [["https://a.example.org, http://localhost:3000", ["https://a.example.org", "http://localhost:3000"]]],
    bad: [
      "a.example.org",
      "https://a.example.org/",
      "https://a.example.org/x",
      "*",
      "https://*.example.org/",
      "file://x",
    ],
  },
  BERTH_LOOPBACK_ISSUERS: flag((config) => config.login.loopbackIssuers, false),
  BERTH_AUDIT_RETENTION_DAYS: integer((config) => config.auditRetentionDays, 400, [0, 100_000]),
  BERTH_RATE_LIMIT: integer((config) => config.rateLimit, 50, [0, 1_000_000]),
  BERTH_TRUSTED_PROXIES: {
    read: (config) => config.trustedProxies,
    unset: [],
    good: [["10.0.0.1, 10.1.0.0/16,,fd00::/8", ["10.0.0.1", "10.1.0.0/16", "fd00::/8"]]],
    bad: ["proxy.example.org", "10.0.0.0/33", "10.0.0.1,x", "10.0.0.0/8/8", "fd00::/129", "10.0.0.0/"],
  },
  BERTH_PUBLIC_EMAIL_DOMAINS: {
    read: (config) => config.publicEmailDomains,
    unset: [],
    good: [["Mail.Example.org, example.net", ["mail.example.org", "example.net"]]],
    bad: ["example", "a@example.org", "*.example.org"],
  },
  BERTH_METRICS_TOKEN: {
    read: (config) => config.metricsToken,
    unset: undefined,
    good: [["s3cret", "s3cret"]],
    bad: [],
  },
  BERTH_DOCS_URL: url((config) => config.docsUrl, undefined),
  BERTH_LOG_LEVEL: {
    read: (config) => config.logLevel,
    unset: "info",
    good: ["debug", "info", "warn", "error"].map((level) => [level, level]),
    bad: ["trace", "INFO", "0"],
  },
  BERTH_SCM_FALLBACK: flag((config) => config.scm.fallback, true),
  BERTH_SCM_ALLOW_HOSTS: {
    read: (config) => config.scm.allowHosts,
    unset: [],
    good: [["git.example.org, 10.0.0.7:3000,::1", ["git.example.org", "10.0.0.7:3000", "::1"]]],
    bad: [
      "https://git.example.org",
      "git.example.org/team",
      "u@git",
      "git.example.org:99999",
      "git.example.org:",
      "a b",
    ],
  },
  BERTH_GIT_SCHEMES: {
    read: (config) => config.scm.schemes,
    unset: [],
    good: [["file, http,git", ["file", "http", "git"]]],
    bad: ["ext", "https", "FILE", "file;http"],
  },
  BERTH_RUNNER: flag((config) => config.embeddedRunner, true),
  BERTH_RUNNER_HOST: host((config) => config.runner.host),
  BERTH_RUNNER_PORT: integer((config) => config.runner.port, 8081, [0, 65_535]),
  BERTH_RUNNER_PUBLIC_URL: url((config) => config.runner.publicUrl, "http://127.0.0.1:8081"),
  BERTH_RUNNER_PORT_DOMAIN: {
    read: (config) => config.runner.portDomain,
    unset: undefined,
    good: [["Ports.example.org", "ports.example.org"]],
    bad: ["*.example.org", "ports", "https://ports.example.org"],
  },
  BERTH_RUNNER_SSH_PORTS: {
    read: (config) => config.runner.sshPorts,
    unset: { from: 22_000, to: 22_999 },
    good: [["2200-2200", { from: 2200, to: 2200 }]],
    bad: ["22", "2300-2200", "1000-2000", "60000-70000", "a-b"],
  },
  BERTH_RUNNER_DATA_DIR: {
    read: (config) => config.runner.dataDir,
    unset: join(asRoot ? "/var/lib/berth" : "/home/somebody/state/berth", "runner"),
    good: [["/srv/environments", "/srv/environments"]],
    bad: [],
  },
  BERTH_RUNNER_MAX_ENVIRONMENTS: integer((config) => config.runner.maxEnvironments, 10, [1, 10_000]),
  BERTH_RUNNER_ALLOW_UNENFORCED: flag((config) => config.runner.allowUnenforced, false),
  BERTH_RUNNER_HOST_DEVCONTAINER: {
    read: (config) => config.runner.hostDevcontainer,
    unset: "run",
    good: ["run", "skip", "fail"].map((mode) => [mode, mode]),
    bad: ["on", "Run"],
  },
  BERTH_RUNNER_CONTAINER_ENGINE: {
    read: (config) => config.runner.containerEngine,
    unset: "auto",
    good: ["auto", "docker", "podman", "none"].map((engine) => [engine, engine]),
    bad: ["on", "Docker", "containerd"],
  },
  BERTH_RUNNER_SANDBOX: {
    read: (config) => config.runner.sandbox,
    unset: "auto",
    good: ["auto", "off", "require"].map((mode) => [mode, mode]),
    bad: ["on", "Auto"],
  },
};

/** Variables of a runner that runs alone; all others it shares with the embedded one. */
const RUNNER_ONLY = ["BERTH_RUNNER_API_URL", "BERTH_RUNNER_EXCHANGE_TOKEN", "BERTH_RUNNER_EXCHANGE_TOKEN_FILE"];

const base = { XDG_STATE_HOME: "/home/somebody/state" };
const refusal = (read: () => unknown): string => {
  try {
    return `accepted: ${JSON.stringify(read())}`;
  } catch (error) {
    if (error instanceof ConfigError) return error.message;
    throw error;
  }
};

describe.each(Object.entries(VARIABLES))("%s", (name, { read, unset, good, bad }) => {
  test("has its default when it is absent, empty or blank", () => {
    expect(read(readServerConfig(base))).toEqual(unset);
    expect(read(readServerConfig({ ...base, [name]: "" }))).toEqual(unset);
    expect(read(readServerConfig({ ...base, [name]: "  " }))).toEqual(unset);
  });

  test.each(good)("takes %j", (text, value) => {
    expect(read(readServerConfig({ ...base, [name]: text }))).toEqual(value);
  });

  if (bad.length > 0) {
    test.each(bad)("refuses %j by name, without showing it", (text) => {
      const message = refusal(() => readServerConfig({ ...base, [name]: text }));
      expect(message).toMatch(new RegExp(`^${name} `));
      if (name.includes("KEY") || name.includes("TOKEN") || text.includes("SeCrEt"))
        expect(message).not.toContain(text);
    });
  }
});

test.each([...Object.keys(VARIABLES).filter((name) => name.startsWith("BERTH_")), ...RUNNER_ONLY])(
  "a misspelt %s is refused by name",
  (name) => {
    expect(refusal(() => readServerConfig({ [`${name}S`]: "on" }))).toContain(`${name}S `);
    expect(refusal(() => readRunnerConfig({ [`${name}S`]: "on" }))).toContain(`${name}S `);
  },
);

test.each(["BERTH_RUNNER_SSH_PORTS"])("%s, which has no effect yet, is refused rather than ignored", (name) => {
  expect(refusal(() => readServerConfig({ [name]: "x" }))).toContain(name);
});

test("variables of clients and of other programs are none of its business", () => {
  const others = { BERTH_TOKEN: "x", BERTH_ENVIRONMENT_ID: "x", PATH: "/bin", berth_port: "x", XBERTH_PORT: "x" };
  expect(readServerConfig({ ...base, ...others })).toEqual(readServerConfig(base));
});

test.each(["BERTH_MASTER_KEY", "BERTH_BOOTSTRAP_ADMIN_TOKEN"])("%s and its file exclude each other", (name) => {
  const both = { ...base, [name]: keyText, [`${name}_FILE`]: file("both", keyText) };
  expect(refusal(() => readServerConfig(both))).toBe(`${name} and ${name}_FILE are both set`);
});

test("defaults follow what they are derived from", () => {
  const config = readServerConfig({ BERTH_DATA_DIR: "/srv/berth", BERTH_PORT: "9000", BERTH_RUNNER_PORT: "9001" });
  expect(config).toMatchObject({
    publicUrl: "http://127.0.0.1:9000",
    runner: { dataDir: "/srv/berth/runner", publicUrl: "http://127.0.0.1:9001" },
  });
  expect(config.runner.name).toContain(hostname().slice(0, 127));
  expect(config.runner.scm).toEqual(config.scm);
});

describe("a runner alone", () => {
  const runner = { ...base, BERTH_RUNNER_API_URL: "https://berth.example.org/" };

  test("needs to know its control plane", () => {
    expect(refusal(() => readRunnerConfig(base))).toMatch(/^BERTH_RUNNER_API_URL is not set/);
    expect(refusal(() => readRunnerConfig({ ...base, BERTH_RUNNER_API_URL: "berth" }))).toMatch(
      /^BERTH_RUNNER_API_URL /,
    );
    expect(readRunnerConfig(runner).apiUrl).toBe("https://berth.example.org");
  });

  test("takes its first credential from a variable or a file", () => {
    const path = file("exchange", " berth_rxt_x \n");
    expect(readRunnerConfig(runner).exchangeToken).toBeUndefined();
    expect(readRunnerConfig({ ...runner, BERTH_RUNNER_EXCHANGE_TOKEN: "berth_rxt_x" }).exchangeToken).toBe(
      "berth_rxt_x",
    );
    expect(readRunnerConfig({ ...runner, BERTH_RUNNER_EXCHANGE_TOKEN_FILE: path }).exchangeToken).toBe("berth_rxt_x");
    const both = { ...runner, BERTH_RUNNER_EXCHANGE_TOKEN: "x", BERTH_RUNNER_EXCHANGE_TOKEN_FILE: path };
    expect(refusal(() => readRunnerConfig(both))).toContain("are both set");
    const absent = { ...runner, BERTH_RUNNER_EXCHANGE_TOKEN_FILE: join(home, "absent") };
    expect(refusal(() => readRunnerConfig(absent))).toMatch(/^BERTH_RUNNER_EXCHANGE_TOKEN_FILE /);
  });

  test("reads the same settings as the embedded one", () => {
    const { apiUrl: _, exchangeToken: __, ...shared } = readRunnerConfig(runner);
    expect(shared).toEqual(readServerConfig(base).runner);
  });
});
