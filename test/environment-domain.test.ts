import { create, equals, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampDate, timestampFromDate } from "@bufbuild/protobuf/wkt";
import { describe, expect, test } from "vitest";
import {
  KernelControlsAction as Action,
  AdmissionLevel,
  EnvironmentInitializerSchema,
  EnvironmentPhase,
  EnvironmentRole,
  EnvironmentSpecSchema,
  EnvironmentStatusSchema,
  KernelControlsConfigSchema,
  EnvironmentSpec_DevContainer_LifecycleStage as LifecycleStage,
  EnvironmentStatus_Machine_Phase as Machine,
  VetoFileSurface as Surface,
  type UpdateEnvironmentRequest_Spec,
  UpdateEnvironmentRequestSchema,
} from "../gen/gitpod/v1/environment_pb.js";
import { Principal } from "../gen/gitpod/v1/identity_pb.js";
import { OrganizationPoliciesSchema } from "../gen/gitpod/v1/organization_pb.js";
import {
  DEFAULT_DEVCONTAINER_IMAGE,
  environmentMessage,
  generatedName,
  goalProblems,
  type NewEnvironment,
  newEnvironment,
  normalizedContextUrl,
  originalContextUrl,
  requestUpdate,
  requiredKernelControls,
  specProblems,
  sshKeyProblem,
  strengthened,
  updateProblems,
  visibleEnvironment,
  weakenedPolicies,
} from "../src/domain/environment.ts";
import {
  applyReport,
  type EnvironmentState,
  requestArchive,
  requestDelete,
  requestStop,
  settle,
} from "../src/domain/lifecycle.ts";

type SpecParts = MessageInitShape<typeof EnvironmentSpecSchema>;

const NOW = new Date("2026-03-01T12:00:00Z");
const CLASS = "0190f5a0-0000-7000-8000-000000000001";
const RUNNER = "0190f5a0-0000-7000-8000-000000000002";
const CREATOR = { id: "u", principal: Principal.USER, organizationId: "o", name: "Ada", email: "ada@example.com" };

/** A public key in authorized_keys form whose parts are filled with as many zero bytes as given. */
function publicKey(type: string, ...lengths: number[]): string {
  const parts = [Buffer.from(type), ...lengths.map((length) => Buffer.alloc(length))];
  const blob = parts.flatMap((part) => {
    const size = Buffer.alloc(4);
    size.writeUInt32BE(part.length);
    return [size, part];
  });
  return `${type} ${Buffer.concat(blob).toString("base64")}`;
}
const ED25519 = publicKey("ssh-ed25519", 32);

function input(spec: SpecParts = {}, more: Partial<NewEnvironment> = {}): NewEnvironment {
  return {
    id: "e",
    spec: create(EnvironmentSpecSchema, spec),
    name: "",
    annotations: {},
    nameSuffix: "abc123",
    repositoryName: "demo",
    sessionId: "group",
    sessions: { machine: "m", content: "c", devcontainer: "d", automationsFile: "a" },
    creator: CREATOR,
    environmentClass: { id: CLASS, runnerId: RUNNER },
    projectId: "",
    secrets: [],
    defaults: { dotfilesRepository: "", devcontainerImage: "", kernelControls: undefined, maximumLifetimeMs: 0 },
    now: NOW,
    ...more,
  };
}

const make = (spec: SpecParts = {}, more: Partial<NewEnvironment> = {}) => newEnvironment(input(spec, more));
const fields = (problems: { field: string }[]) => problems.map(({ field }) => field);

function initializer(...sources: ({ url: string } | { git: string })[]) {
  const specs = sources.map((source) =>
    "url" in source
      ? { spec: { case: "contextUrl" as const, value: { url: source.url } } }
      : { spec: { case: "git" as const, value: { remoteUri: source.git } } },
  );
  return create(EnvironmentInitializerSchema, { specs });
}

describe("a new environment", () => {
  test("ENV-2 starts in CREATING with versions 1 and every default filled in", () => {
    const { metadata, spec, status, facts, id } = make();
    expect(id).toBe("e");
    expect(status).toMatchObject({ statusVersion: 1n, phase: EnvironmentPhase.CREATING });
    expect(spec).toMatchObject({
      specVersion: 1n,
      desiredPhase: EnvironmentPhase.RUNNING,
      machine: { session: "m", class: CLASS },
      content: { session: "c", gitUsername: "Ada", gitEmail: "ada@example.com" },
      devcontainer: {
        session: "d",
        defaultDevcontainerImage: DEFAULT_DEVCONTAINER_IMAGE,
        lifecycleStage: LifecycleStage.FULL,
      },
      automationsFile: { session: "a" },
      timeout: { disconnected: { seconds: 1800n } },
      admission: AdmissionLevel.CREATOR_ONLY,
    });
    expect(spec.devcontainer?.dotfiles).toBeUndefined();
    expect(spec.kernelControlsConfig).toBeUndefined();
    expect(metadata).toMatchObject({
      name: "demo-abc123",
      organizationId: "o",
      creator: { id: "u", principal: Principal.USER },
      runnerId: RUNNER,
      role: EnvironmentRole.DEFAULT,
      sessionId: "group",
      createdAt: timestampFromDate(NOW),
      lastStartedAt: timestampFromDate(NOW),
    });
    expect([metadata.lockdownAt, facts.lockdownSource]).toEqual([undefined, null]);
  });

  test("is a fixed point of settle", () => {
    const { id: _, ...state } = make(
      { ports: [{ port: 3000 }] },
      { defaults: { ...input().defaults, maximumLifetimeMs: 1 } },
    );
    expect(Object.values(settle(state, state, NOW).changed)).toEqual([false, false, false, false, false]);
  });

  test("keeps what the request says, except what only the server may set", () => {
    const { spec, metadata } = make(
      {
        specVersion: 9n,
        machine: { session: "forged", class: CLASS, preferDualDisk: true },
        content: {
          session: "given",
          gitUsername: "Bob",
          gitEmail: "bob@example.com",
          initializer: initializer({ git: "https://h/r" }),
        },
        secrets: [{ name: "forged" }],
        ports: [
          { port: 3000, authNonce: 77n, admission: AdmissionLevel.EVERYONE },
          { port: 3001, admission: AdmissionLevel.OWNER_ONLY },
        ],
        timeout: { disconnected: durationFromMs(0) },
        admission: AdmissionLevel.OWNER_ONLY,
        devcontainer: {
          session: "given",
          defaultDevcontainerImage: "debian:13",
          lifecycleStage: LifecycleStage.PREBUILD,
          dotfiles: { repository: "https://h/dots" },
        },
        automationsFile: { session: "given", automationsFilePath: "a.yaml" },
        sshPublicKeys: [{ id: "k", value: `${ED25519} ada@laptop\n` }],
        kernelControlsConfig: { bpfDebugLevel: 1 },
      },
      {
        name: "  mine ",
        annotations: { a: "b" },
        secrets: [{ ...create(EnvironmentSpecSchema, { secrets: [{ name: "TOKEN" }] }).secrets[0]! }],
        projectId: "p",
        defaults: {
          dotfilesRepository: "https://h/other",
          devcontainerImage: "policy:1",
          kernelControls: create(KernelControlsConfigSchema),
          maximumLifetimeMs: 86_400_000,
        },
      },
    );
    expect(spec).toMatchObject({
      specVersion: 1n,
      machine: { session: "m", preferDualDisk: true },
      content: { session: "given", gitUsername: "Bob", gitEmail: "bob@example.com" },
      secrets: [{ name: "TOKEN" }],
      ports: [
        { port: 3000, authNonce: 1n, admission: AdmissionLevel.EVERYONE },
        { port: 3001, authNonce: 1n, admission: AdmissionLevel.CREATOR_ONLY },
      ],
      timeout: { disconnected: { seconds: 0n, nanos: 0 } },
      admission: AdmissionLevel.CREATOR_ONLY,
      devcontainer: {
        session: "given",
        defaultDevcontainerImage: "debian:13",
        lifecycleStage: LifecycleStage.PREBUILD,
        dotfiles: { repository: "https://h/dots" },
      },
      automationsFile: { session: "given", automationsFilePath: "a.yaml" },
      sshPublicKeys: [{ id: "k", value: `${ED25519} ada@laptop` }],
      kernelControlsConfig: { bpfDebugLevel: 1 },
    });
    expect(metadata).toMatchObject({
      name: "mine",
      annotations: { a: "b" },
      projectId: "p",
      originalContextUrl: "https://h/r",
    });
    expect(timestampDate(metadata.lockdownAt!)).toEqual(new Date(NOW.getTime() + 86_400_000));
  });

  test("takes image, dotfiles and kernel controls from the defaults; dotfiles are for users only", () => {
    const kernelControls = create(KernelControlsConfigSchema, { veto: { exec: { enabled: true } } });
    const defaults = {
      dotfilesRepository: "https://h/d",
      devcontainerImage: "policy:1",
      kernelControls,
      maximumLifetimeMs: 0,
    };
    const { spec } = make({}, { defaults });
    expect(spec.devcontainer).toMatchObject({
      defaultDevcontainerImage: "policy:1",
      dotfiles: { repository: "https://h/d" },
    });
    expect(spec.kernelControlsConfig).toBe(kernelControls);
    const robot = { ...CREATOR, principal: Principal.SERVICE_ACCOUNT, email: "" };
    const { spec: other } = make({}, { defaults, creator: robot });
    expect(other.devcontainer?.dotfiles).toBeUndefined();
    expect(other.content).toMatchObject({ gitUsername: "Ada", gitEmail: "" });
  });

  test("names are generated within the limit of the wire", () => {
    expect(generatedName("", "abc123")).toBe("environment-abc123");
    expect(generatedName("re\npo", "abc123")).toBe("repo-abc123");
    const long = generatedName("🚢".repeat(200), "abc123");
    expect([[...long].length, long.endsWith("-abc123")]).toEqual([80, true]);
  });

  test("the original context URL is normalised, or the first git remote", () => {
    expect(normalizedContextUrl("https://user:pw@GitHub.COM/Acme/Repo/tree/main/?a=1#readme")).toBe(
      "https://github.com/Acme/Repo/tree/main?a=1",
    );
    expect(normalizedContextUrl("ssh://git@Example.com:22/r.git")).toBe("ssh://example.com:22/r.git");
    expect(normalizedContextUrl("not a url")).toBe("not a url");
    expect(originalContextUrl(undefined)).toBe("");
    expect(originalContextUrl(initializer())).toBe("");
    expect(originalContextUrl(initializer({ git: "git@h:a/b" }, { git: "https://h/c" }))).toBe("git@h:a/b");
    expect(originalContextUrl(initializer({ git: "git@h:a/b" }, { url: "https://H/c/" }))).toBe("https://h/c");
  });
});

describe("checks of a create request", () => {
  test("ENV-2 ENV-3 only UNSPECIFIED and RUNNING can be wished for, and a class must be named", () => {
    const goal = (desiredPhase: EnvironmentPhase, machineClass = CLASS) =>
      fields(goalProblems(create(EnvironmentSpecSchema, { desiredPhase, machine: { class: machineClass } })));
    expect(goal(EnvironmentPhase.UNSPECIFIED)).toEqual([]);
    expect(goal(EnvironmentPhase.RUNNING)).toEqual([]);
    expect(goal(EnvironmentPhase.STOPPED)).toEqual(["spec.desired_phase"]);
    expect(goal(EnvironmentPhase.RUNNING, "")).toEqual(["spec.machine.class"]);
    expect(goal(EnvironmentPhase.RUNNING, "large")).toEqual(["spec.machine.class"]);
    expect(fields(goalProblems(undefined))).toEqual(["spec.machine.class"]);
  });

  const problems = (spec: SpecParts, annotations = {}) =>
    fields(specProblems(create(EnvironmentSpecSchema, spec), annotations));

  test("ports, keys, annotations and texts are bounded and unique", () => {
    expect(
      problems({ ports: [{ port: 1 }, { port: 2 }], sshPublicKeys: [{ id: "k", value: ED25519 }] }, { a: "b" }),
    ).toEqual([]);
    expect(problems({ ports: [{ port: 3000 }, { port: 3001 }, { port: 3000 }] })).toEqual(["spec.ports[2].port"]);
    expect(problems({ ports: [{ port: 3000, admission: 99 as AdmissionLevel }] })).toEqual(["spec.ports[0].admission"]);
    expect(problems({ admission: 99 as AdmissionLevel })).toEqual(["spec.admission"]);
    expect(problems({ ports: Array.from({ length: 129 }, (_, port) => ({ port })) })).toEqual(["spec.ports"]);
    const key = (id: string, value = ED25519) => ({ id, value });
    expect(problems({ sshPublicKeys: [key("a"), key("a")] })).toEqual(["spec.ssh_public_keys[1].id"]);
    expect(problems({ sshPublicKeys: [key(""), key("b", "no key"), key("c", "")] })).toEqual([
      "spec.ssh_public_keys[0].id",
      "spec.ssh_public_keys[1].value",
      "spec.ssh_public_keys[2].value",
    ]);
    const entries = (count: number, value = "v") =>
      Object.fromEntries(Array.from({ length: count }, (_, index) => [`k${index}`, value]));
    expect(problems({}, entries(32, "v".repeat(1024)))).toEqual([]);
    for (const bad of [entries(33), entries(1, "v".repeat(1025)), { ["k".repeat(129)]: "" }, { "": "" }]) {
      expect(problems({}, bad)).toEqual(["annotations"]);
    }
  });

  test("what is reserved for the server is refused", () => {
    expect(problems({ workflowActionId: CLASS, securityPolicyId: CLASS })).toEqual([
      "spec.workflow_action_id",
      "spec.security_policy_id",
    ]);
  });

  test("hostile paths, names, sessions and images are refused", () => {
    expect(problems({ devcontainer: { devcontainerFilePath: "a/../../b" } })).toEqual([
      "spec.devcontainer.devcontainer_file_path",
    ]);
    expect(problems({ automationsFile: { automationsFilePath: "../b" } })).toEqual([
      "spec.automations_file.automations_file_path",
    ]);
    expect(problems({ devcontainer: { devcontainerFilePath: "a..b/..c" } })).toEqual([]);
    expect(problems({ content: { gitUsername: "a\nb", gitEmail: "c\u0000", session: "../x" } })).toEqual([
      "spec.content.git_username",
      "spec.content.git_email",
      "spec.content.session",
    ]);
    for (const defaultDevcontainerImage of ["--privileged", "a b", "a\tb"]) {
      expect(problems({ devcontainer: { defaultDevcontainerImage } })).toEqual([
        "spec.devcontainer.default_devcontainer_image",
      ]);
    }
  });

  test("SSH keys: known types whose content fits, one line, no options", () => {
    const good = [
      ED25519,
      `${ED25519}  ada lovelace `,
      publicKey("ssh-rsa", 3, 256),
      publicKey("ecdsa-sha2-nistp256", 8, 65),
      publicKey("sk-ssh-ed25519@openssh.com", 32, 4),
      publicKey("sk-ecdsa-sha2-nistp256@openssh.com", 8, 65, 4),
    ];
    for (const key of good) expect(sshKeyProblem(key)).toBeUndefined();
    const encoded = ED25519.split(" ")[1]!;
    const bad = [
      "",
      "ssh-ed25519",
      "ssh-ed25519 AAAA",
      `command="sh" ${ED25519}`,
      `no-pty ${ED25519}`,
      `${ED25519}\nssh-rsa AAAA`,
      `ssh-rsa ${encoded}`,
      `ssh-dss ${encoded}`,
      `ssh-ed25519 ${encoded.slice(0, -4)}`,
      `ssh-ed25519 ${encoded}AAAA`,
      `ssh-ed25519 ${encoded.slice(0, 8)}!${encoded.slice(8)}`,
      publicKey("ssh-ed25519", 32, 1),
      publicKey("ssh-ed25519", 20_000),
    ];
    for (const key of bad)
      expect([key.slice(0, 60), sshKeyProblem(key)]).toEqual([key.slice(0, 60), expect.any(String)]);
  });
});

describe("an update", () => {
  type Request = MessageInitShape<typeof UpdateEnvironmentRequestSchema>;
  const request = (parts: Request) => create(UpdateEnvironmentRequestSchema, parts);
  const base = (): EnvironmentState =>
    make({ ports: [{ port: 3000, name: "web" }], sshPublicKeys: [{ id: "k1", value: ED25519 }] });
  const update = (state: EnvironmentState, parts: Request) => requestUpdate(state, request(parts), NOW);
  function updated(state: EnvironmentState, parts: Request) {
    const outcome = update(state, parts);
    if (outcome.kind !== "changed") throw new Error(`expected a change, got ${JSON.stringify(outcome)}`);
    return outcome.next;
  }

  test("problems: nothing given, a blank name, a lockdown in the past", () => {
    const problems = (parts: Request) => fields(updateProblems(request(parts), NOW));
    expect(problems({})).toEqual(["spec"]);
    expect(problems({ spec: {} })).toEqual([]);
    expect(problems({ metadata: { name: " " } })).toEqual(["metadata.name"]);
    expect(problems({ metadata: { name: "🚢".repeat(128) } })).toEqual([]);
    expect(problems({ metadata: { name: "n".repeat(129) } })).toEqual(["metadata.name"]);
    const lockdown = (ms: number) => problems({ metadata: { lockdownAt: timestampFromDate(new Date(ms)) } });
    expect([lockdown(NOW.getTime() - 1), lockdown(NOW.getTime() + 1), lockdown(0)]).toEqual([
      ["metadata.lockdown_at"],
      [],
      [],
    ]);
    expect(
      problems({
        spec: {
          ports: [{ port: 1 }, { port: 1 }],
          sshPublicKeys: [{ id: "a", value: "x" }, { id: "b" }],
          devcontainer: { devcontainerFilePath: "../x" },
        },
      }),
    ).toEqual(["spec.ssh_public_keys[0].value", "spec.ports[1].port", "spec.devcontainer.devcontainer_file_path"]);
  });

  test("one that changes nothing is a no-op", () => {
    const state = base();
    const same: Request[] = [
      { spec: {} },
      { metadata: { name: "demo-abc123" } },
      { spec: { sshPublicKeys: [{ id: "k1", value: ED25519 }, { id: "unknown" }] } },
      { spec: { ports: [{ port: 3000, name: "web", admission: AdmissionLevel.OWNER_ONLY }] } },
      { spec: { timeout: { disconnected: durationFromMs(1_800_000) }, content: { session: "" } } },
    ];
    for (const parts of same) expect(update(state, parts)).toEqual({ kind: "noop" });
  });

  test("fields are replaced one by one, and the spec version rises by one", () => {
    const state = base();
    const kernelControls = create(KernelControlsConfigSchema, { bpfDebugLevel: 1 });
    const next = updated(state, {
      metadata: { name: " new " },
      spec: {
        content: { session: "c2", gitUsername: "Bob", initializer: initializer({ git: "https://h/r" }) },
        devcontainer: { session: "d2", devcontainerFilePath: "x.json" },
        automationsFile: { session: "a2", automationsFilePath: "" },
        timeout: { disconnected: durationFromMs(3_600_000) },
        kernelControlsConfig: kernelControls,
      },
    });
    expect(next.metadata.name).toBe("new");
    expect(next.changed).toMatchObject({ metadata: true, spec: true, phase: false });
    expect(next.spec).toMatchObject({
      specVersion: 2n,
      machine: state.spec.machine,
      content: { session: "c2", gitUsername: "Bob", gitEmail: "ada@example.com" },
      devcontainer: {
        session: "d2",
        devcontainerFilePath: "x.json",
        defaultDevcontainerImage: DEFAULT_DEVCONTAINER_IMAGE,
      },
      automationsFile: { session: "a2", automationsFilePath: "" },
      timeout: { disconnected: { seconds: 3600n } },
      kernelControlsConfig: kernelControls,
    });
    expect(next.spec.content?.initializer?.specs).toHaveLength(1);
  });

  test("ENV-30 SSH keys are added and removed by id", () => {
    const added = updated(base(), { spec: { sshPublicKeys: [{ id: "k2", value: `${ED25519}\n` }] } });
    expect(added.spec.sshPublicKeys.map(({ id, value }) => [id, value])).toEqual([
      ["k1", ED25519],
      ["k2", ED25519],
    ]);
    const removed = updated(added, { spec: { sshPublicKeys: [{ id: "k1" }] } });
    expect(removed.spec.sshPublicKeys.map(({ id }) => id)).toEqual(["k2"]);
  });

  test("ENV-31 a changed admission raises the nonce, UNSPECIFIED closes, and opening again never repeats a nonce", () => {
    const port = (admission: AdmissionLevel, number = 3000) => ({
      spec: { ports: [{ port: number, name: "web", admission }] },
    });
    let state: EnvironmentState = base();
    const seen: bigint[] = [state.spec.ports[0]!.authNonce];
    for (const admission of [AdmissionLevel.EVERYONE, AdmissionLevel.CREATOR_ONLY]) {
      state = updated(state, port(admission));
      expect(state.spec.ports).toMatchObject([{ admission, authNonce: seen.at(-1)! + 1n }]);
      seen.push(state.spec.ports[0]!.authNonce);
    }
    state = updated(state, port(AdmissionLevel.UNSPECIFIED));
    expect(state.spec.ports).toEqual([]);
    expect(update(state, port(AdmissionLevel.UNSPECIFIED))).toEqual({ kind: "noop" });
    state = updated(state, port(AdmissionLevel.CREATOR_ONLY));
    expect(state.spec.ports[0]!.authNonce > seen.at(-1)!).toBe(true);
    state = updated(state, port(AdmissionLevel.ORGANIZATION, 4000));
    expect(state.spec.ports.map(({ port: number }) => number)).toEqual([3000, 4000]);
  });

  test("the number of ports and keys is bounded over all updates", () => {
    const ports = (from: number) =>
      Array.from({ length: 127 }, (_, index) => ({ port: from + index, admission: AdmissionLevel.EVERYONE }));
    const full = updated(base(), { spec: { ports: ports(5000) } });
    expect(update(full, { spec: { ports: ports(6000) } }).kind).toBe("refused");
  });

  test("ENV-21 an admin sets and clears the lockdown", () => {
    const later = timestampFromDate(new Date(NOW.getTime() + 60_000));
    const set = updated(base(), { metadata: { lockdownAt: later } });
    expect([set.metadata.lockdownAt, set.facts.lockdownSource, set.changed.spec]).toEqual([later, "admin", false]);
    const cleared = updated(set, { metadata: { lockdownAt: timestampFromDate(new Date(0)) } });
    expect([cleared.metadata.lockdownAt, cleared.facts.lockdownSource]).toEqual([undefined, null]);
    expect(cleared.metadata.name).toBe("demo-abc123");
  });

  test("archived: only metadata; deleted or on the way: nothing", () => {
    function next(outcome: ReturnType<typeof requestStop>): EnvironmentState {
      if (outcome.kind !== "changed") throw new Error(outcome.kind);
      return outcome.next;
    }
    const archived = next(requestArchive(next(requestStop(base(), NOW)), NOW));
    expect(archived.metadata.archivedAt).toBeDefined();
    expect(update(archived, { spec: { content: { session: "c2" } } }).kind).toBe("refused");
    expect(updated(archived, { metadata: { name: "n" } }).metadata.name).toBe("n");
    const machine = { session: "m", phase: Machine.RUNNING };
    const { next: active } = applyReport(base(), create(EnvironmentStatusSchema, { machine }), NOW);
    for (const force of [true, false]) {
      const gone = next(requestDelete(active, force, NOW));
      expect(update(gone, { metadata: { name: "n" } }).kind).toBe("refused");
    }
  });

  test("accepts every combination of present and absent parts", () => {
    const parts: UpdateEnvironmentRequest_Spec = request({
      spec: {
        content: { session: "c2" },
        devcontainer: { session: "d2" },
        automationsFile: { session: "a2" },
        timeout: { disconnected: durationFromMs(0) },
      },
    }).spec!;
    const names = ["content", "devcontainer", "automationsFile", "timeout"] as const;
    for (let mask = 1; mask < 2 ** names.length; mask++) {
      const chosen = names.filter((_, bit) => mask & (1 << bit));
      const before = base();
      const next = updated(before, { spec: Object.fromEntries(chosen.map((name) => [name, parts[name]])) });
      for (const name of names) {
        const kept = JSON.stringify(next.spec[name], (_key, value) => (typeof value === "bigint" ? `${value}` : value));
        const was = JSON.stringify(before.spec[name], (_key, value) =>
          typeof value === "bigint" ? `${value}` : value,
        );
        expect([name, kept === was]).toEqual([name, !chosen.includes(name)]);
      }
    }
  });
});

describe("what others see", () => {
  test("secrets are shown to owner, self and runner only, and the stored message is not touched", () => {
    const { id, ...state } = make(
      {},
      { secrets: [...create(EnvironmentSpecSchema, { secrets: [{ name: "TOKEN" }] }).secrets] },
    );
    const environment = environmentMessage(id, state);
    const shown = (["owner", "self", "runner", "user", "viewer", "org_admin"] as const).filter(
      (viewer) => visibleEnvironment(environment, viewer).spec?.secrets.length,
    );
    expect(shown).toEqual(["owner", "self", "runner"]);
    expect(environment).toMatchObject({
      id: "e",
      metadata: { name: "demo-abc123" },
      spec: { secrets: [{ name: "TOKEN" }] },
    });
  });
});

describe("ENV-43 kernel controls", () => {
  const policies = (parts: MessageInitShape<typeof OrganizationPoliciesSchema>) =>
    create(OrganizationPoliciesSchema, parts);
  const controls = (parts: MessageInitShape<typeof KernelControlsConfigSchema>) =>
    create(KernelControlsConfigSchema, parts);
  const required = requiredKernelControls(
    policies({
      vetoExecPolicy: { enabled: true, executables: ["nc", "nmap"] },
      vetoFilePolicy: {
        enabled: true,
        paths: {
          defaultSurface: Surface.ACCESS,
          defaultEffect: Action.BLOCK,
          entries: [{ path: "/etc" }, { path: "/var/log", effect: Action.AUDIT, trackChanges: true }],
        },
        blockDevices: { enabled: true, action: Action.BLOCK },
      },
    }),
  );

  test("only enabled policies ask for anything", () => {
    expect(requiredKernelControls(policies({}))).toBeUndefined();
    expect(
      requiredKernelControls(policies({ vetoExecPolicy: { enabled: false, executables: ["nc"] } })),
    ).toBeUndefined();
    expect(required?.veto?.exec).toMatchObject({ enabled: true, denylist: ["nc", "nmap"], action: Action.BLOCK });
    expect(weakenedPolicies(undefined, undefined)).toEqual([]);
    expect(weakenedPolicies(controls({}), undefined)).toEqual([]);
  });

  const exec = { enabled: true, denylist: ["nmap", "nc", "dd"], action: Action.BLOCK };
  const entries = [
    { path: "/etc", surface: Surface.ACCESS, effect: Action.BLOCK },
    { path: "/var/log", surface: Surface.ACCESS, effect: Action.BLOCK, trackChanges: true },
    { path: "/etcetera", surface: Surface.ACCESS, effect: Action.AUDIT },
    { path: "/etc", surface: Surface.CONTENT_READ, effect: Action.AUDIT },
  ];
  const file = { enabled: true, paths: { entries }, blockDevices: { enabled: true, action: Action.BLOCK } };

  test("weaker is whatever drops, disables or softens a rule", () => {
    const weakened = (parts: { exec?: object | undefined; file?: object | undefined }) =>
      weakenedPolicies(controls({ veto: { exec, file, ...parts } }), required);
    expect(weakened({})).toEqual([]);
    expect(weakenedPolicies(required, required)).toEqual([]);
    expect(weakenedPolicies(undefined, required)).toEqual(["veto_exec_policy", "veto_file_policy"]);
    const weakerExec = [
      undefined,
      { ...exec, enabled: false },
      { ...exec, denylist: ["nc"] },
      { ...exec, action: Action.AUDIT },
    ];
    for (const parts of weakerExec) expect(weakened({ exec: parts })).toEqual(["veto_exec_policy"]);
    const weakerFile = [
      undefined,
      { ...file, enabled: false },
      { ...file, paths: { entries: entries.slice(1) } },
      { ...file, paths: { entries: [{ ...entries[0], effect: Action.AUDIT }, ...entries.slice(1)] } },
      { ...file, paths: { entries: [entries[0], { ...entries[1], trackChanges: false }] } },
      {
        ...file,
        paths: { entries: [...entries, { path: "/etc/ssh", surface: Surface.ACCESS, effect: Action.AUDIT }] },
      },
      { ...file, blockDevices: { enabled: false } },
      { ...file, blockDevices: { enabled: true, action: Action.AUDIT } },
    ];
    for (const parts of weakerFile) expect(weakened({ file: parts })).toEqual(["veto_file_policy"]);
  });

  test("strengthening adds what is missing, keeps what is stronger, and is enough", () => {
    const strong = controls({ veto: { exec, file } });
    expect(strengthened(strong, required)).toBe(strong);
    expect(strengthened(undefined, undefined)).toBeUndefined();
    const weak = [
      undefined,
      controls({}),
      controls({
        bpfDebugLevel: 1,
        veto: { exec: { enabled: true, denylist: ["dd"], action: Action.AUDIT, watch: true } },
      }),
      controls({
        veto: { file: { enabled: true, paths: { entries: [{ ...entries[0], effect: Action.AUDIT }, entries[2]!] } } },
      }),
      controls({ veto: { file: { ...file, blockDevices: { enabled: true, action: Action.AUDIT } } } }),
    ];
    for (const config of weak) {
      const result = strengthened(config, required)!;
      expect(weakenedPolicies(result, required)).toEqual([]);
      expect(equals(KernelControlsConfigSchema, strengthened(result, required)!, result)).toBe(true);
    }
    expect(strengthened(weak[2], required)).toMatchObject({
      bpfDebugLevel: 1,
      veto: { exec: { denylist: ["dd", "nc", "nmap"], action: Action.BLOCK, watch: true } },
    });
    expect(
      strengthened(weak[3], required)?.veto?.file?.paths?.entries.map(({ path, effect }) => [path, effect]),
    ).toEqual([
      ["/etcetera", Action.AUDIT],
      ["/etc", Action.BLOCK],
      ["/var/log", Action.AUDIT],
    ]);
  });
});
