import { create, equals, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampDate, timestampFromDate } from "@bufbuild/protobuf/wkt";
import { beforeAll, describe, expect, test } from "vitest";
import {
  EnvironmentStatus_RunnerACK_StatusCode as Ack,
  EnvironmentStatus_DevContainer_Phase as DevContainer,
  EnvironmentActivitySignalSchema,
  EnvironmentMetadataSchema,
  EnvironmentRole,
  EnvironmentSpecSchema,
  type EnvironmentStatus,
  EnvironmentStatusSchema,
  KernelControlsConfigSchema,
  EnvironmentStatus_Machine_Phase as Machine,
  EnvironmentStatus_ContentPhase as Part,
  EnvironmentPhase as Phase,
} from "../gen/gitpod/v1/environment_pb.js";
import {
  ACTIVITY_SIGNAL_INTERVAL_MS,
  applyReport,
  archiveDeadline,
  DEFAULT_ARCHIVE_AFTER_MS,
  DELETE_OVERDUE_MS,
  deleteDeadline,
  derivePhase,
  type EnvironmentFacts,
  type EnvironmentState,
  expireStartDeadline,
  idleDeadline,
  idleStop,
  isLockedDown,
  markActive,
  newFacts,
  nextDeadline,
  requestArchive,
  requestDelete,
  requestStart,
  requestStop,
  requestUnarchive,
  runnerReturned,
  runnerUnreachable,
  runTimers,
  START_DEADLINE_MS,
  STOP_OVERDUE_MS,
  settle,
  startDeadline,
  TOMBSTONE_MS,
  type Transition,
  tombstoneEnd,
} from "../src/domain/lifecycle.ts";

type StatusParts = Exclude<MessageInitShape<typeof EnvironmentStatusSchema>, EnvironmentStatus>;

const MINUTE = 60_000;
const DAY = 24 * 60 * MINUTE;
const T0 = new Date("2026-03-01T12:00:00Z");
const plus = (ms: number, from = T0) => new Date(from.getTime() + ms);

/** A new environment with one secret, one SSH key and one port, as creation leaves it. */
function fresh(): EnvironmentState {
  return {
    metadata: create(EnvironmentMetadataSchema, {
      name: "demo",
      annotations: { team: "a" },
      createdAt: timestampFromDate(T0),
      lastStartedAt: timestampFromDate(T0),
      role: EnvironmentRole.DEFAULT,
    }),
    spec: create(EnvironmentSpecSchema, {
      specVersion: 1n,
      desiredPhase: Phase.RUNNING,
      machine: { session: "m1", class: "c" },
      content: { session: "content1" },
      devcontainer: { session: "dev1" },
      automationsFile: { session: "auto1" },
      secrets: [{ id: "s1", name: "TOKEN", session: "x1" }],
      sshPublicKeys: [{ id: "k1", value: "ssh-ed25519 AAAA" }],
      ports: [{ port: 3000, name: "web" }],
      timeout: { disconnected: durationFromMs(30 * MINUTE) },
    }),
    status: create(EnvironmentStatusSchema, { statusVersion: 1n, phase: Phase.CREATING }),
    facts: newFacts(T0),
  };
}

const URLS = {
  logs: "http://r/logs",
  ops: "http://r/ops",
  ssh: { url: "ssh://u@r:22000" },
  ports: [
    { port: 3000, url: "http://r/3000" },
    { port: 4000, url: "http://r/4000" },
  ],
};

/** A complete report of a machine that works for the newest spec; `more` replaces parts. */
function report(state: EnvironmentState, more: StatusParts = {}) {
  const parts: StatusParts = {
    runnerAck: { specVersion: state.spec.specVersion, statusCode: Ack.OK },
    machine: { session: state.spec.machine?.session ?? "", phase: Machine.RUNNING },
    content: { session: state.spec.content?.session ?? "", phase: Part.READY, git: { branch: "main" } },
    devcontainer: { session: state.spec.devcontainer?.session ?? "", phase: DevContainer.RUNNING },
    secrets: state.spec.secrets.map(({ id, session, name }) => ({ id, session, secretName: name, phase: Part.READY })),
    sshPublicKeys: state.spec.sshPublicKeys.map(({ id }) => ({ id, phase: Part.READY })),
    automationsFile: { session: "auto1", phase: Part.READY },
    environmentUrls: URLS,
    ...more,
  };
  return create(EnvironmentStatusSchema, parts);
}

function changed(outcome: Transition): EnvironmentState {
  if (outcome.kind !== "changed") throw new Error(`expected a change, got ${JSON.stringify(outcome)}`);
  return outcome.next;
}

function reported(state: EnvironmentState, more: StatusParts = {}, now = T0): EnvironmentState {
  const { result, next } = applyReport(state, report(state, more), now);
  expect(result).toBe("ok");
  return next;
}

const machineAt = (state: EnvironmentState, phase: Machine, more = {}) => ({
  machine: { session: state.spec.machine?.session ?? "", phase, ...more },
});
const running = (now = T0) => reported(fresh(), {}, now);
function stopped(now = T0) {
  const stopping = changed(requestStop(running(now), now));
  return reported(stopping, machineAt(stopping, Machine.STOPPED), now);
}
const phase = (state: EnvironmentState) => Phase[state.status.phase];
const start = (machineSession = "m2", state = fresh()) => ({ machineSession, secrets: state.spec.secrets });

function* product<const T extends Record<string, readonly unknown[]>>(
  axes: T,
): Generator<{ [K in keyof T]: T[K][number] }> {
  const names = Object.keys(axes);
  const sizes = names.map((name) => axes[name]!.length);
  const total = sizes.reduce((all, size) => all * size, 1);
  for (let index = 0; index < total; index++) {
    let rest = index;
    const row: Record<string, unknown> = {};
    for (const [position, name] of names.entries()) {
      row[name] = axes[name]![rest % sizes[position]!];
      rest = Math.floor(rest / sizes[position]!);
    }
    yield row as { [K in keyof T]: T[K][number] };
  }
}

const MACHINES = [
  "ABSENT",
  "UNSPECIFIED",
  "CREATING",
  "STARTING",
  "RUNNING",
  "STOPPING",
  "STOPPED",
  "DELETING",
  "DELETED",
] as const;
const BOTH = [true, false] as const;

/** What the parts report, and whether the rules call that a pending update. */
const PARTS: Record<string, { parts: StatusParts; pending: boolean }> = {
  settled: { parts: {}, pending: false },
  "content of another session": { parts: { content: { session: "old", phase: Part.READY } }, pending: true },
  "content initializing": { parts: { content: { session: "content1", phase: Part.INITIALIZING } }, pending: true },
  "content updating": { parts: { content: { session: "content1", phase: Part.UPDATING } }, pending: true },
  "content failed": { parts: { content: { session: "content1", phase: Part.FAILED } }, pending: false },
  "content absent": { parts: { content: undefined }, pending: true },
  "dev container of another session": {
    parts: { devcontainer: { session: "old", phase: DevContainer.RUNNING } },
    pending: true,
  },
  "dev container creating": {
    parts: { devcontainer: { session: "dev1", phase: DevContainer.CREATING } },
    pending: true,
  },
  "dev container failed": { parts: { devcontainer: { session: "dev1", phase: DevContainer.FAILED } }, pending: false },
  "secret with its old value": { parts: { secrets: [{ id: "s1", session: "old", phase: Part.READY }] }, pending: true },
  "secret updating": { parts: { secrets: [{ id: "s1", session: "x1", phase: Part.UPDATING }] }, pending: true },
  "secret unavailable": { parts: { secrets: [{ id: "s1", session: "x1", phase: Part.UNAVAILABLE }] }, pending: false },
  "secret not reported": { parts: { secrets: [] }, pending: true },
  "secret left over": {
    parts: {
      secrets: [
        { id: "s1", session: "x1", phase: Part.READY },
        { id: "s0", session: "x0", phase: Part.READY },
      ],
    },
    pending: true,
  },
  "SSH key not reported": { parts: { sshPublicKeys: [] }, pending: true },
  "SSH key left over": { parts: { sshPublicKeys: [{ id: "k1", phase: Part.READY }, { id: "k0" }] }, pending: true },
  "SSH key creating": { parts: { sshPublicKeys: [{ id: "k1", phase: Part.CREATING }] }, pending: true },
  "SSH key unavailable": { parts: { sshPublicKeys: [{ id: "k1", phase: Part.UNAVAILABLE }] }, pending: false },
  "automations file failed": { parts: { automationsFile: { session: "old", phase: Part.FAILED } }, pending: false },
};

describe("phase derivation", () => {
  interface Scene {
    desired: "RUNNING" | "STOPPED" | "DELETED";
    m: string;
    current: boolean;
    forced: boolean;
    acknowledged: boolean;
    ranBefore: boolean;
    gatesPassed: boolean;
    pending: boolean;
  }
  const among = (m: string, ...phases: string[]) => phases.includes(m);
  // Table 4.1, line by line.
  const TABLE: [Scene["desired"], (scene: Scene) => boolean, keyof typeof Phase][] = [
    ["DELETED", ({ forced, m, acknowledged }) => forced || m === "DELETED" || !acknowledged, "DELETED"],
    ["DELETED", ({ m }) => among(m, "UNSPECIFIED", "STOPPED", "DELETING"), "DELETING"],
    ["DELETED", () => true, "STOPPING"],
    ["STOPPED", ({ m }) => among(m, "UNSPECIFIED", "STOPPED"), "STOPPED"],
    ["STOPPED", () => true, "STOPPING"],
    [
      "RUNNING",
      ({ current, m, ranBefore }) => (!current || m !== "RUNNING") && !ranBefore && among(m, "UNSPECIFIED", "CREATING"),
      "CREATING",
    ],
    ["RUNNING", ({ current, m }) => !current || m !== "RUNNING", "STARTING"],
    ["RUNNING", ({ gatesPassed }) => !gatesPassed, "STARTING"],
    ["RUNNING", ({ pending }) => pending, "UPDATING"],
    ["RUNNING", () => true, "RUNNING"],
  ];

  test("table 4.1 holds for every combination, first match", () => {
    let count = 0;
    const used = new Set<unknown>();
    for (const row of product({
      desired: ["RUNNING", "STOPPED", "DELETED"],
      machine: MACHINES,
      current: BOTH,
      forced: BOTH,
      acknowledged: BOTH,
      ranBefore: BOTH,
      gatesPassed: BOTH,
      parts: Object.keys(PARTS),
    })) {
      const { parts, pending } = PARTS[row.parts]!;
      const base = fresh();
      const machine =
        row.machine === "ABSENT" ? undefined : { session: row.current ? "m1" : "m0", phase: Machine[row.machine] };
      // A machine that was never reported has no session either.
      const current = row.current && row.machine !== "ABSENT";
      const status = report(base, { ...parts, machine });
      const facts: EnvironmentFacts = {
        ...base.facts,
        forced: row.forced,
        acknowledged: row.acknowledged,
        firstRunningAt: row.ranBefore ? T0 : null,
        gatesPassedSession: row.gatesPassed ? "m1" : "m0",
      };
      const scene = { ...row, current, pending, m: row.machine === "ABSENT" ? "UNSPECIFIED" : row.machine };
      const line = TABLE.find(([desired, condition]) => desired === row.desired && condition(scene))!;
      used.add(line);
      const found = derivePhase({ ...base.spec, desiredPhase: Phase[row.desired] }, status, facts);
      if (Phase[found] !== line[2]) expect({ ...scene, found: Phase[found] }).toEqual({ ...scene, found: line[2] });
      count++;
    }
    expect(count).toBe(3 * 9 * 2 ** 5 * Object.keys(PARTS).length);
    expect(used.size).toBe(TABLE.length);
  });

  test("an unknown goal keeps the last phase and warns; the phase is never UNSPECIFIED", () => {
    const state = running();
    const doubtful = settle(state, { ...state, spec: { ...state.spec, desiredPhase: Phase.UNSPECIFIED } }, T0);
    expect(phase(doubtful)).toBe("RUNNING");
    expect(doubtful.status.warningMessage).toEqual(["unknown desired phase 0; the last phase is kept"]);
    expect(phase(changed(requestStop(doubtful, T0)))).toBe("STOPPING");
    expect(derivePhase(doubtful.spec, create(EnvironmentStatusSchema), doubtful.facts)).toBe(Phase.CREATING);
  });

  test("gates: content and dev container with the session of the spec, every secret settled; nothing else", () => {
    const contents = { READY: true, FAILED: false, CREATING: false, INITIALIZING: false, UPDATING: false } as const;
    const containers = { RUNNING: true, FAILED: true, CREATING: false, STOPPED: false, UNSPECIFIED: false } as const;
    const secrets = { READY: true, FAILED: true, UNAVAILABLE: true, CREATING: false, UPDATING: false } as const;
    for (const row of product({
      content: Object.keys(contents) as (keyof typeof contents)[],
      contentCurrent: BOTH,
      container: Object.keys(containers) as (keyof typeof containers)[],
      containerCurrent: BOTH,
      secret: Object.keys(secrets) as (keyof typeof secrets)[],
      secretCurrent: BOTH,
      others: BOTH,
    })) {
      const next = applyReport(
        fresh(),
        report(fresh(), {
          content: { session: row.contentCurrent ? "content1" : "old", phase: Part[row.content] },
          devcontainer: { session: row.containerCurrent ? "dev1" : "old", phase: DevContainer[row.container] },
          secrets: [{ id: "s1", session: row.secretCurrent ? "x1" : "old", phase: Part[row.secret] }],
          sshPublicKeys: row.others ? [{ id: "k1", phase: Part.READY }] : [],
          automationsFile: { session: "auto1", phase: row.others ? Part.READY : Part.FAILED },
        }),
        T0,
      ).next;
      const open =
        contents[row.content] &&
        row.contentCurrent &&
        containers[row.container] &&
        row.containerCurrent &&
        secrets[row.secret] &&
        row.secretCurrent;
      const failed = row.content === "FAILED" && row.contentCurrent;
      const expected = open ? (row.others ? "RUNNING" : "UPDATING") : failed ? "STOPPING" : "STARTING";
      if (phase(next) !== expected) expect({ ...row, found: phase(next) }).toEqual({ ...row, found: expected });
    }
  });

  test("gates stay open for the rest of a machine session, and close with the next one", () => {
    const lost = reported(running(), { ...machineAt(fresh(), Machine.STOPPED), content: undefined });
    expect(phase(lost)).toBe("STARTING");
    const back = reported(lost, { content: { session: "content1", phase: Part.UPDATING } });
    expect(phase(back)).toBe("UPDATING");
    const restarted = changed(requestStart(stopped(), start(), T0));
    expect(phase(reported(restarted, { content: { session: "content1", phase: Part.INITIALIZING } }))).toBe("STARTING");
  });
});

/** The invariants that must hold for whatever `settle` returns. */
function checkSettled(before: EnvironmentState, next: EnvironmentState, now: Date) {
  const faults: string[] = [];
  const want = (fact: boolean, text: string) => fact || faults.push(text);
  const { spec, status, metadata, facts } = next;
  const open = status.phase === Phase.RUNNING || status.phase === Phase.UPDATING;
  const sameSpec = equals(EnvironmentSpecSchema, { ...spec, specVersion: 0n }, { ...before.spec, specVersion: 0n });
  const sameStatus = equals(
    EnvironmentStatusSchema,
    { ...status, statusVersion: 0n },
    { ...before.status, statusVersion: 0n },
  );
  want(spec.specVersion === before.spec.specVersion + (sameSpec ? 0n : 1n), "spec version follows spec");
  want(status.statusVersion === before.status.statusVersion + (sameStatus ? 0n : 1n), "status version follows status");
  want(status.phase !== Phase.UNSPECIFIED, "phase is known");
  want(status.failureMessage.length === 0 || spec.desiredPhase !== Phase.RUNNING, "failure ends the wish to run");
  want(open === (facts.runningSince !== null), "running_since exists while running");
  want(!open || facts.firstRunningAt !== null, "first_running_at is set");
  want((status.phase === Phase.STOPPED) === (facts.stoppedAt !== null), "stopped_at exists while stopped");
  want(
    status.phase === before.status.phase ? facts.phaseSince === before.facts.phaseSince : facts.phaseSince === now,
    "phase_since moves with the phase",
  );
  want(!open || (status.environmentUrls?.ops ?? "") === (facts.reportedUrls?.ops ?? ""), "ops is shown while running");
  want(open || !status.environmentUrls?.ops, "ops is hidden otherwise");
  want(
    status.phase === Phase.DELETED || (status.environmentUrls?.logs ?? "") === (facts.reportedUrls?.logs ?? ""),
    "logs stay until DELETED",
  );
  want(
    metadata.archivedAt === undefined || before.metadata.archivedAt !== undefined || status.phase === Phase.STOPPED,
    "archived only when stopped",
  );
  want(status.phase !== Phase.STOPPED || !facts.archiveRequested, "archive request is served when stopped");
  if (status.phase === Phase.DELETED) {
    const left = [
      spec.secrets,
      spec.sshPublicKeys,
      status.secrets,
      status.sshPublicKeys,
      Object.keys(metadata.annotations),
    ];
    want(left.every((list) => list.length === 0) && !status.content?.git && !status.environmentUrls, "stripped");
  }
  const again = settle(next, next, now);
  want(!Object.values(again.changed).some(Boolean), `idempotent, not ${JSON.stringify(again.changed)}`);
  return faults;
}

describe("settle", () => {
  const ACKS = {
    none: undefined,
    ok: { specVersion: 5n, statusCode: Ack.OK },
    refused: { specVersion: 5n, statusCode: Ack.INVALID_RESOURCE, message: "bad spec" },
    "refused before": { specVersion: 4n, statusCode: Ack.FAILED_PRECONDITION },
  };
  const SOME_PARTS = [
    "settled",
    "content of another session",
    "content failed",
    "dev container failed",
    "secret updating",
    "SSH key left over",
  ];

  test("invariants hold for every combination of goal, observation and facts", () => {
    let count = 0;
    const phases = new Set<Phase>();
    for (const row of product({
      desired: ["RUNNING", "STOPPED", "DELETED", "UNSPECIFIED"],
      machine: MACHINES,
      current: BOTH,
      machineFails: BOTH,
      ack: Object.keys(ACKS) as (keyof typeof ACKS)[],
      parts: SOME_PARTS,
      forced: BOTH,
      started: BOTH,
      archiveRequested: BOTH,
    })) {
      const base = fresh();
      const machine =
        row.machine === "ABSENT"
          ? undefined
          : {
              session: row.current ? "m1" : "m0",
              phase: Machine[row.machine],
              failureMessage: row.machineFails ? "broken" : "",
            };
      const before: EnvironmentState = {
        ...base,
        spec: { ...base.spec, specVersion: 5n, desiredPhase: Phase[row.desired] },
        status: {
          ...report(base, { ...PARTS[row.parts]!.parts, runnerAck: ACKS[row.ack], machine }),
          statusVersion: 7n,
          phase: Phase.STARTING,
        },
        facts: {
          ...base.facts,
          forced: row.forced,
          acknowledged: row.ack !== "none",
          archiveRequested: row.archiveRequested,
          firstRunningAt: row.started ? T0 : null,
          gatesPassedSession: row.started ? "m1" : "",
          reportedUrls: report(base).environmentUrls!,
        },
      };
      const now = plus(MINUTE);
      const next = settle(before, before, now);
      const faults = checkSettled(before, next, now);
      const current = row.current && row.machine !== "ABSENT";
      const fatal =
        (row.machineFails && current) ||
        (!row.started && row.ack === "refused") ||
        (!row.started && current && row.parts === "content failed");
      if (row.desired === "RUNNING" && fatal !== next.status.failureMessage.length > 0) faults.push("failure as ruled");
      if (row.desired !== "RUNNING" && next.status.failureMessage.length > 0)
        faults.push("no failure without a wish to run");
      if (faults.length > 0) expect({ ...row, faults }).toEqual({ ...row, faults: [] });
      phases.add(next.status.phase);
      count++;
    }
    expect(count).toBe(4 * 9 * 2 * 2 * 4 * 6 * 8);
    expect(phases.size).toBe(8);
  });

  test("versions ignore what the draft says and rise once per change", () => {
    const state = running();
    const spec = { ...state.spec, ports: [], specVersion: 900n };
    const next = settle(state, { ...state, spec, status: { ...state.status, statusVersion: 900n } }, T0);
    expect(next.spec.specVersion).toBe(state.spec.specVersion + 1n);
    expect(next.changed).toEqual({ metadata: false, spec: true, status: true, facts: false, phase: false });
    expect(next.status.environmentUrls?.ports).toEqual([]);
    expect(settle(state, state, plus(MINUTE)).changed.status).toBe(false);
  });

  test("inputs are not modified", () => {
    const freeze = (value: unknown): void => {
      if (typeof value !== "object" || value === null || Object.isFrozen(value) || value instanceof Date) return;
      Object.freeze(value);
      for (const inner of Object.values(value)) freeze(inner);
    };
    for (const state of [fresh(), running(), stopped()]) {
      freeze(state);
      const later = plus(2 * DAY);
      reported(state, { ...machineAt(state, Machine.RUNNING, { warningMessage: "w" }) }, later);
      for (const force of BOTH) requestDelete(state, force, later);
      requestArchive(state, later);
      requestStop(state, later);
      requestStart(state, start(), later);
      runTimers(state, later);
      markActive(state, undefined, later);
    }
  });
});

// A model of the outside world: everything that can happen to an environment, applied to every state that this can
// lead to. Times and absolute versions are left out of a state's identity.
interface Node {
  state: EnvironmentState;
  now: Date;
  edges: Map<string, string>;
}

const MACHINE_PHASES = ["CREATING", "STARTING", "RUNNING", "STOPPING", "STOPPED", "DELETING", "DELETED"] as const;
const TURNING_POINTS = ["STARTING", "RUNNING", "STOPPED"] as const;
const REPORTS: [string, (state: EnvironmentState) => StatusParts][] = [
  ["no machine", () => ({ machine: undefined, content: undefined, devcontainer: undefined })],
  ["old machine RUNNING", () => ({ machine: { session: "m0", phase: Machine.RUNNING } })],
  ["old machine STOPPED", () => ({ machine: { session: "m0", phase: Machine.STOPPED } })],
  [
    "machine RUNNING, content initializing",
    (state) => ({ ...machineAt(state, Machine.RUNNING), content: { session: "content1", phase: Part.INITIALIZING } }),
  ],
];
for (const name of MACHINE_PHASES) REPORTS.push([`machine ${name}`, (state) => machineAt(state, Machine[name])]);
for (const name of TURNING_POINTS) {
  const content = { session: "content1", phase: Part.FAILED, failureMessage: "repository not found" };
  const refusal = { statusCode: Ack.FAILED_PRECONDITION, message: "rule veto.exec" };
  REPORTS.push(
    [`machine ${name}, content failed`, (state) => ({ ...machineAt(state, Machine[name]), content })],
    [`machine ${name}, fails`, (state) => machineAt(state, Machine[name], { failureMessage: "no space left" })],
    [
      `machine ${name}, spec refused`,
      (state) => ({
        ...machineAt(state, Machine[name]),
        runnerAck: { specVersion: state.spec.specVersion, ...refusal },
      }),
    ],
  );
}

const REQUESTS: Record<string, (state: EnvironmentState, now: Date) => Transition> = {
  start: (state, now) => requestStart(state, start(`m${state.spec.specVersion + 1n}`), now),
  stop: requestStop,
  delete: (state, now) => requestDelete(state, false, now),
  "delete by force": (state, now) => requestDelete(state, true, now),
  archive: requestArchive,
  unarchive: requestUnarchive,
  signal: (state, now) => markActive(state, undefined, now),
  "runner lost": (state, now) => runnerUnreachable(state, now, now),
  "runner back": runnerReturned,
  timers: runTimers,
};

function identity({ metadata, spec, status, facts }: EnvironmentState): string {
  return [
    Phase[status.phase],
    `wants ${Phase[spec.desiredPhase]}`,
    `machine ${status.machine?.session === spec.machine?.session ? "" : "old "}${Machine[status.machine?.phase ?? 0]}`,
    status.machine?.failureMessage && "machine failed",
    `content ${Part[status.content?.phase ?? 0]}`,
    status.runnerAck?.statusCode === Ack.FAILED_PRECONDITION && "spec refused",
    facts.gatesPassedSession === spec.machine?.session && "gates passed",
    facts.firstRunningAt && "ran before",
    facts.archiveRequested && "archive requested",
    metadata.archivedAt && "archived",
    facts.forced && "forced",
    facts.acknowledged && "acknowledged",
    facts.runnerUnreachableSince && "runner unreachable",
    status.failureMessage.length > 0 && "failed",
  ]
    .filter(Boolean)
    .join(", ");
}

describe("the whole state space", () => {
  const nodes = new Map<string, Node>();
  const faults: string[] = [];

  function visit(from: Node, event: string, next: EnvironmentState, now: Date, queue: Node[]) {
    const found = checkSettled(from.state, next, now);
    const goals = [from.state.spec.desiredPhase, next.spec.desiredPhase];
    if (goals[1] === Phase.RUNNING && goals[0] !== Phase.RUNNING && event !== "start")
      found.push("only a start runs again");
    if (goals[0] === Phase.DELETED && goals[1] !== Phase.DELETED) found.push("a delete is final");
    if (from.state.status.phase === Phase.DELETED && next !== from.state) found.push("DELETED is absorbing");
    faults.push(...found.map((fault) => `${event} in ${identity(from.state)}: ${fault}`));
    const key = identity(next);
    from.edges.set(event, key);
    if (nodes.has(key)) return;
    const node = { state: next, now, edges: new Map() };
    nodes.set(key, node);
    queue.push(node);
  }

  function explore() {
    const first: Node = { state: fresh(), now: T0, edges: new Map() };
    nodes.set(identity(first.state), first);
    const queue = [first];
    for (const node of queue) {
      const { state, now } = node;
      for (const [event, request] of Object.entries(REQUESTS)) {
        const at = event === "timers" ? plus(2 * 60 * MINUTE, now) : plus(1000, now);
        const outcome = request(state, at);
        if (outcome.kind === "changed") visit(node, event, outcome.next, at, queue);
        if (event === "timers" && outcome.kind === "changed") {
          const deadline = nextDeadline(outcome.next);
          if (deadline && deadline <= at) faults.push(`timers leave work behind in ${identity(state)}`);
        }
      }
      for (const [event, parts] of REPORTS) {
        const at = plus(1000, now);
        const { result, next } = applyReport(state, report(state, parts(state)), at);
        const gone = state.status.phase === Phase.DELETED;
        const impossible = event.includes("DELETED") && state.spec.desiredPhase !== Phase.DELETED;
        const expected = gone ? "not_assigned" : impossible ? "rejected" : "ok";
        if (result !== expected) faults.push(`${event} is ${result} instead of ${expected} in ${identity(state)}`);
        if (result !== "ok" && Object.values(next.changed).some(Boolean))
          faults.push(`${event} is ${result} but counts`);
        if (result === "ok" && Object.values(next.changed).some(Boolean)) visit(node, event, next, at, queue);
      }
    }
  }

  beforeAll(explore);

  /** States from which the allowed events, in some order, lead to the goal. */
  function reaching(goal: (state: EnvironmentState) => boolean, allowed: (event: string) => boolean): Set<string> {
    const sources = new Map<string, string[]>();
    for (const [key, { edges }] of nodes) {
      for (const [event, target] of edges) {
        if (allowed(event)) sources.set(target, [...(sources.get(target) ?? []), key]);
      }
    }
    const found = new Set([...nodes].filter(([, { state }]) => goal(state)).map(([key]) => key));
    const queue = [...found];
    for (const key of queue) {
      for (const source of sources.get(key) ?? []) {
        if (found.has(source)) continue;
        found.add(source);
        queue.push(source);
      }
    }
    return found;
  }

  const stuck = (where: (state: EnvironmentState) => boolean, exits: Set<string>) =>
    [...nodes].filter(([key, { state }]) => where(state) && !exits.has(key)).map(([key]) => key);
  const honest = (event: string) => event.startsWith("machine ") && !event.includes(",");

  test("every reachable state keeps the invariants, stop and delete are never lost, DELETED is absorbing", () => {
    expect(faults.slice(0, 5)).toEqual([]);

    expect(nodes.size).toBeGreaterThan(500);
    expect(new Set([...nodes.values()].map(({ state }) => state.status.phase)).size).toBe(8);
  });

  test("no state is without an exit", () => {
    const inPhase =
      (...phases: Phase[]) =>
      (state: EnvironmentState) =>
        phases.includes(state.status.phase);
    const starting = inPhase(Phase.CREATING, Phase.STARTING);
    const alive = (state: EnvironmentState) => state.status.phase !== Phase.DELETED;
    const online = (event: string) => event === "runner back";
    // With an honest runner alone, each intent is reached.
    const settled = (phase: Phase) => reaching(inPhase(phase), (event) => honest(event) || online(event));
    const goal = (phase: Phase) => (state: EnvironmentState) => alive(state) && state.spec.desiredPhase === phase;
    expect(stuck(goal(Phase.RUNNING), settled(Phase.RUNNING))).toEqual([]);
    expect(stuck(goal(Phase.STOPPED), settled(Phase.STOPPED))).toEqual([]);
    expect(stuck(goal(Phase.DELETED), settled(Phase.DELETED))).toEqual([]);
    // Without a word from the runner's environments, a start ends by time once the runner is reachable.
    const byTime = reaching(
      (state) => state.status.failureMessage.length > 0,
      (event) => event === "timers" || online(event),
    );
    expect(stuck(starting, byTime)).toEqual([]);
    // One forced delete ends everything.
    for (const [key, { state, edges }] of nodes) {
      const end = edges.get("delete by force");
      if (alive(state)) expect(nodes.get(end ?? key)?.state.status.phase).toBe(Phase.DELETED);
    }
  });

  test("what waits too long says so and how to leave", () => {
    for (const { state, now } of nodes.values()) {
      const waits = state.status.phase === Phase.STOPPING || state.status.phase === Phase.DELETING;
      if (!waits) continue;
      const text = settle(state, state, plus(60 * MINUTE, now)).status.warningMessage.join();
      expect(text).toMatch(
        state.facts.runnerUnreachableSince ? /runner unreachable since/ : /deleting by force ends it/,
      );
    }
  });
});

describe("requests", () => {
  test("ENV-10 Stop leads over STOPPING to STOPPED, and a second Stop changes nothing", () => {
    const stopping = changed(requestStop(running(), T0));
    expect([phase(stopping), stopping.spec.desiredPhase]).toEqual(["STOPPING", Phase.STOPPED]);
    expect(requestStop(stopping, T0)).toEqual({ kind: "noop" });
    const done = reported(stopping, machineAt(stopping, Machine.STOPPED), plus(MINUTE));
    expect([phase(done), done.facts.stoppedAt]).toEqual(["STOPPED", plus(MINUTE)]);
    expect(requestStop(done, T0)).toEqual({ kind: "noop" });
  });

  test("Stop before the runner has taken the environment is STOPPED at once", () => {
    expect(phase(changed(requestStop(fresh(), T0)))).toBe("STOPPED");
  });

  test("ENV-11 Start shows STARTING at once, with a new machine session and the same content session", () => {
    const before = stopped();
    const now = plus(DAY);
    const next = changed(requestStart(before, start("m2"), now));
    expect(phase(next)).toBe("STARTING");
    expect(next.spec.machine).toMatchObject({ session: "m2", class: "c" });
    expect(next.spec.content).toEqual(before.spec.content);
    expect(timestampDate(next.metadata.lastStartedAt!)).toEqual(now);
    expect(next.spec.specVersion).toBe(before.spec.specVersion + 1n);
    const late = reported(next, { machine: { session: "m1", phase: Machine.STOPPED } });
    expect(phase(late)).toBe("STARTING");
    expect(phase(reported(late))).toBe("RUNNING");
  });

  test("Start takes the secrets and kernel controls it is given, and is CREATING if the machine never came up", () => {
    const kernelControls = create(KernelControlsConfigSchema, { veto: { exec: { enabled: true } } });
    const idle = changed(requestStop(fresh(), T0));
    const next = changed(requestStart(idle, { machineSession: "m2", secrets: [], kernelControls }, T0));
    expect([phase(next), next.spec.secrets, next.spec.kernelControlsConfig]).toEqual(["CREATING", [], kernelControls]);
  });

  test("ENV-12 Start is refused while STOPPING and a no-op while RUNNING", () => {
    const active = running();
    expect(requestStart(active, start(), plus(DAY))).toEqual({ kind: "noop" });
    expect(requestStart(fresh(), start(), plus(DAY))).toEqual({ kind: "noop" });
    const stopping = changed(requestStop(active, T0));
    expect(requestStart(stopping, start(), T0)).toEqual({
      kind: "refused",
      reason: "the environment is still stopping",
    });
    for (const force of BOTH) {
      expect(requestStart(changed(requestDelete(active, force, T0)), start(), T0).kind).toBe("refused");
    }
  });

  test("ENV-13 failed content stops the environment with one failure message, which Start clears", () => {
    const failed = { content: { session: "content1", phase: Part.FAILED, failureMessage: "repository not found" } };
    const state = reported(fresh(), { ...machineAt(fresh(), Machine.STARTING), ...failed });
    expect(state.status.failureMessage).toEqual(["repository not found"]);
    expect([state.spec.desiredPhase, phase(state)]).toEqual([Phase.STOPPED, "STOPPING"]);
    const again = reported(state, { ...machineAt(state, Machine.STOPPED, { failureMessage: "killed" }), ...failed });
    expect(again.status.failureMessage).toEqual(["repository not found"]);
    expect([again.spec.desiredPhase, phase(again)]).toEqual([Phase.STOPPED, "STOPPED"]);
    expect(again.status.warningMessage).toEqual(["killed"]);
    const next = changed(requestStart(again, start(), T0));
    expect([next.status.failureMessage, next.status.warningMessage, phase(next)]).toEqual([[], [], "STARTING"]);
    // The attempt that failed is not held against the new one.
    const late = reported(next, { machine: { session: "m1", phase: Machine.STOPPED }, ...failed });
    expect([late.status.failureMessage, phase(late)]).toEqual([[], "STARTING"]);
    expect(phase(reported(late))).toBe("RUNNING");
  });

  test("ENV-18 Archive stops first; archived, it does not start; Unarchive brings it back", () => {
    const archiving = changed(requestArchive(running(), T0));
    expect([phase(archiving), archiving.metadata.archivedAt]).toEqual(["STOPPING", undefined]);
    expect(requestArchive(archiving, T0)).toEqual({ kind: "noop" });
    expect(requestStart(archiving, start(), T0).kind).toBe("refused");
    const archived = reported(archiving, machineAt(archiving, Machine.STOPPED), plus(MINUTE));
    expect(timestampDate(archived.metadata.archivedAt!)).toEqual(plus(MINUTE));
    expect(requestArchive(archived, T0)).toEqual({ kind: "noop" });
    expect(requestStart(archived, start(), T0)).toMatchObject({
      kind: "refused",
      reason: expect.stringContaining("unarchive"),
    });
    const back = changed(requestUnarchive(archived, plus(5 * DAY)));
    expect([phase(back), back.metadata.archivedAt]).toEqual(["STOPPED", undefined]);
    expect(archiveDeadline(back, DEFAULT_ARCHIVE_AFTER_MS)).toEqual(plus(8 * DAY));
    expect(requestUnarchive(back, T0)).toEqual({ kind: "noop" });
    expect(phase(changed(requestStart(back, start(), T0)))).toBe("STARTING");
  });

  test("Archive at rest is immediate; Unarchive withdraws a pending request; neither touches a deleted environment", () => {
    expect(changed(requestArchive(stopped(), plus(MINUTE))).metadata.archivedAt).toEqual(
      timestampFromDate(plus(MINUTE)),
    );
    const pending = changed(requestUnarchive(changed(requestArchive(running(), T0)), T0));
    expect(phase(pending)).toBe("STOPPING");
    const done = reported(pending, machineAt(pending, Machine.STOPPED));
    expect([phase(done), done.metadata.archivedAt]).toEqual(["STOPPED", undefined]);
    for (const force of BOTH) {
      const gone = changed(requestDelete(running(), force, T0));
      expect(requestArchive(gone, T0).kind).toBe("refused");
      expect(requestUnarchive(gone, T0).kind).toBe("refused");
    }
  });

  test("ENV-22 Delete passes STOPPING, DELETING, DELETED in order and strips what is private", () => {
    let state = changed(requestDelete(running(), false, T0));
    const seen = [phase(state)];
    expect(requestDelete(state, false, T0)).toEqual({ kind: "noop" });
    for (const machine of [Machine.STOPPING, Machine.STOPPED, Machine.DELETING, Machine.DELETED]) {
      state = reported(state, machineAt(state, machine), plus(MINUTE));
      if (seen.at(-1) !== phase(state)) seen.push(phase(state));
    }
    expect(seen).toEqual(["STOPPING", "DELETING", "DELETED"]);
    expect(state.spec).toMatchObject({ secrets: [], sshPublicKeys: [] });
    expect(state.metadata).toMatchObject({ annotations: {}, name: "demo" });
    expect(state.status).toMatchObject({
      secrets: [],
      sshPublicKeys: [],
      warningMessage: [],
      environmentUrls: undefined,
    });
    expect(state.status.content?.git).toBeUndefined();
    expect(tombstoneEnd(state)).toEqual(plus(MINUTE + TOMBSTONE_MS));
    expect(tombstoneEnd(running())).toBeNull();
    expect(requestDelete(state, true, T0)).toEqual({ kind: "noop" });
    expect(applyReport(state, report(state), T0).result).toBe("not_assigned");
  });

  test("ENV-23 Delete waits for an unreachable runner, by force it does not", () => {
    const offline = changed(runnerUnreachable(running(), T0, T0));
    const waiting = changed(requestDelete(offline, false, T0));
    expect(phase(waiting)).toBe("STOPPING");
    expect(waiting.status.warningMessage).toEqual(["runner unreachable since 2026-03-01T12:00:00.000Z"]);
    expect(phase(changed(requestDelete(waiting, true, T0)))).toBe("DELETED");
    expect(phase(changed(requestDelete(fresh(), false, T0)))).toBe("DELETED");
  });

  test("ENV-24 an unreachable runner adds one warning and nothing else; its return removes it", () => {
    const before = running();
    const offline = changed(runnerUnreachable(before, plus(-MINUTE), T0));
    expect(phase(offline)).toBe("RUNNING");
    expect(offline.status.warningMessage).toEqual(["runner unreachable since 2026-03-01T11:59:00.000Z"]);
    expect(offline.status.environmentUrls).toEqual(before.status.environmentUrls);
    expect(runnerUnreachable(offline, T0, T0)).toEqual({ kind: "noop" });
    const back = changed(runnerReturned(offline, plus(MINUTE)));
    expect(back.status.warningMessage).toEqual([]);
    expect(runnerReturned(back, T0)).toEqual({ kind: "noop" });
    const resting = changed(runnerUnreachable(stopped(), T0, T0));
    expect([resting.status.warningMessage, phase(resting)]).toEqual([[], "STOPPED"]);
  });

  test("ENV-43 a refused spec stops a start with the reason, and only warns once the gates have passed", () => {
    const refusal = (state: EnvironmentState) => ({
      runnerAck: {
        specVersion: state.spec.specVersion,
        statusCode: Ack.FAILED_PRECONDITION,
        message: "rule veto.exec",
      },
    });
    const failed = reported(fresh(), { ...refusal(fresh()), machine: undefined });
    expect([failed.status.failureMessage, phase(failed)]).toEqual([["rule veto.exec"], "STOPPED"]);
    const again = changed(requestStart(failed, start(), T0));
    const stale = reported(again, { ...refusal(fresh()), machine: undefined });
    expect([stale.status.failureMessage, phase(stale)]).toEqual([[], "CREATING"]);
    const live = reported(running(), refusal(running()));
    expect([live.status.failureMessage, live.status.warningMessage]).toEqual([[], ["rule veto.exec"]]);
    expect(phase(live)).toBe("RUNNING");
  });
});

describe("reports", () => {
  test("RUN-16 identical content changes nothing; an impossible acknowledgement is rejected", () => {
    const state = running();
    expect(applyReport(state, report(state), plus(MINUTE))).toMatchObject({
      result: "ok",
      next: { changed: { metadata: false, spec: false, status: false, facts: false, phase: false } },
    });
    const ack = (specVersion: bigint) => ({ runnerAck: { specVersion, statusCode: Ack.OK } });
    for (const specVersion of [2n, 0n]) {
      expect(applyReport(state, report(state, ack(specVersion)), T0)).toMatchObject({
        result: "rejected",
        next: { status: state.status, changed: { status: false, facts: false } },
      });
    }
    expect(reported(state, { runnerAck: undefined }).status.runnerAck).toEqual(state.status.runnerAck);
    expect(applyReport(state, report(state, machineAt(state, Machine.DELETED)), T0).result).toBe("rejected");
  });

  test("once known to the runner, an environment is deleted only with its word", () => {
    const silent = reported(running(), { runnerAck: undefined, machine: undefined });
    expect(phase(changed(requestDelete(silent, false, T0)))).toBe("DELETING");
    const unknown = reported(fresh(), { runnerAck: undefined, machine: undefined });
    expect(phase(changed(requestDelete(unknown, false, T0)))).toBe("DELETED");
  });

  test("only the parts of the runner are taken over", () => {
    const state = running();
    const next = reported(state, {
      ...machineAt(state, Machine.RUNNING, { timeout: "forged", versions: { supervisorVersion: "1.2" } }),
      phase: Phase.DELETED,
      statusVersion: 99n,
      failureMessage: ["forged"],
      warningMessage: ["forged"],
      activitySignal: { source: "forged" },
    });
    expect(next.status).toMatchObject({
      phase: Phase.RUNNING,
      statusVersion: state.status.statusVersion + 1n,
      failureMessage: [],
      warningMessage: [],
      machine: { timeout: "", versions: { supervisorVersion: "1.2" } },
    });
    expect(next.status.activitySignal).toBeUndefined();
  });

  test("ENV-1 URLs: ops comes with RUNNING, even when the control plane passes the last gate; only logs outlive it", () => {
    const waiting = reported(fresh(), { secrets: [] });
    expect([phase(waiting), waiting.status.environmentUrls?.ops, waiting.status.environmentUrls?.logs]).toEqual([
      "STARTING",
      "",
      "http://r/logs",
    ]);
    const opened = settle(waiting, { ...waiting, spec: { ...waiting.spec, secrets: [] } }, T0);
    expect([phase(opened), opened.status.environmentUrls?.ops]).toEqual(["RUNNING", "http://r/ops"]);
    expect(opened.status.environmentUrls?.ports.map(({ port }) => port)).toEqual([3000]);
    const stopping = changed(requestStop(opened, T0));
    expect(stopping.status.environmentUrls).toMatchObject({
      logs: "http://r/logs",
      ops: "",
      ports: [],
    });
    expect(stopping.status.environmentUrls?.ssh).toBeUndefined();
    const silent = reported(stopping, { ...machineAt(stopping, Machine.STOPPED), environmentUrls: undefined });
    expect(silent.status.environmentUrls?.logs).toBe("http://r/logs");
  });

  test("an unexpected loss of the machine goes back to STARTING and is fatal only when the runner gives up", () => {
    const state = running();
    const lost = reported(state, machineAt(state, Machine.STOPPED), plus(DAY));
    expect([phase(lost), lost.spec.desiredPhase, lost.facts.runningSince]).toEqual(["STARTING", Phase.RUNNING, null]);
    expect(startDeadline(lost)).toEqual(plus(DAY + START_DEADLINE_MS));
    const back = reported(lost, {}, plus(DAY + MINUTE));
    expect([phase(back), back.facts.runningSince, back.facts.firstRunningAt]).toEqual([
      "RUNNING",
      plus(DAY + MINUTE),
      T0,
    ]);
    const given = reported(lost, machineAt(lost, Machine.STOPPED, { failureMessage: "lost 3 times" }));
    expect([given.status.failureMessage, phase(given)]).toEqual([["lost 3 times"], "STOPPED"]);
  });

  test("failures of parts that do not end a start are copied up as warnings, in bounds", () => {
    const state = reported(fresh(), {
      ...machineAt(fresh(), Machine.RUNNING, { warningMessage: "no isolation between environments" }),
      devcontainer: { session: "dev1", phase: DevContainer.FAILED, failureMessage: "postCreate failed" },
      secrets: [
        { id: "s1", session: "x1", secretName: "TOKEN", phase: Part.FAILED, failureMessage: "bad name" },
        { id: "s2", session: "x2", phase: Part.UNAVAILABLE },
      ],
      automationsFile: { phase: Part.FAILED, failureMessage: "unknown key", warningMessage: "no trigger" },
    });
    expect(state.status.failureMessage).toEqual([]);
    expect(state.status.warningMessage).toEqual([
      "no isolation between environments",
      "postCreate failed",
      "secret TOKEN: bad name",
      "secret s2: unavailable",
      "unknown key",
      "no trigger",
    ]);
    const secrets = Array.from({ length: 200 }, (_, index) => ({
      id: `s${index}`,
      phase: Part.FAILED,
      failureMessage: "x".repeat(5000),
    }));
    const many = reported(fresh(), { secrets }).status.warningMessage;
    expect([many.length, many.at(-1), Math.max(...many.map((text) => text.length))]).toEqual([
      50,
      "and 151 more",
      2000,
    ]);
  });

  test("a failed re-initialisation keeps the environment running, with a warning", () => {
    const state = running();
    const spec = { ...state.spec, content: { ...state.spec.content!, session: "content2" } };
    const updating = settle(state, { ...state, spec }, T0);
    expect(phase(updating)).toBe("UPDATING");
    const failed = reported(updating, {
      content: { session: "content2", phase: Part.FAILED, failureMessage: "ref not found" },
    });
    expect([phase(failed), failed.status.failureMessage, failed.status.warningMessage]).toEqual([
      "RUNNING",
      [],
      ["ref not found"],
    ]);
  });
});

describe("timers", () => {
  test("a start that takes an hour fails, but not while the runner is unreachable", () => {
    const state = reported(fresh(), machineAt(fresh(), Machine.STARTING));
    expect(startDeadline(state)).toEqual(plus(START_DEADLINE_MS));
    expect(expireStartDeadline(state, plus(START_DEADLINE_MS - 1))).toEqual({ kind: "noop" });
    const failed = changed(expireStartDeadline(state, plus(START_DEADLINE_MS)));
    expect(failed.status.failureMessage).toEqual(["the environment did not start within 60 minutes"]);
    expect([failed.spec.desiredPhase, phase(failed)]).toEqual([Phase.STOPPED, "STOPPING"]);
    expect(expireStartDeadline(failed, plus(DAY))).toEqual({ kind: "noop" });
    const offline = changed(runnerUnreachable(state, T0, T0));
    expect(expireStartDeadline(offline, plus(DAY))).toEqual({ kind: "noop" });
    expect(startDeadline(changed(runnerReturned(offline, plus(DAY))))).toEqual(plus(DAY + START_DEADLINE_MS));
  });

  test("ENV-15 the idle stop comes after the timeout without activity and says why", () => {
    const state = running(plus(MINUTE));
    expect(idleDeadline(state)).toEqual(plus(31 * MINUTE));
    expect(idleStop(state, plus(30 * MINUTE))).toEqual({ kind: "noop" });
    const used = changed(markActive(state, undefined, plus(20 * MINUTE)));
    expect(idleDeadline(used)).toEqual(plus(50 * MINUTE));
    expect(idleStop(used, plus(31 * MINUTE))).toEqual({ kind: "noop" });
    const idle = changed(idleStop(used, plus(50 * MINUTE)));
    expect([phase(idle), idle.status.machine?.timeout]).toEqual([
      "STOPPING",
      "stopped after 30 minutes without activity",
    ]);
    expect(idleStop(idle, plus(DAY))).toEqual({ kind: "noop" });
    const done = reported(idle, machineAt(idle, Machine.STOPPED));
    expect(done.status.machine?.timeout).toBe("stopped after 30 minutes without activity");
    expect(reported(done, { machine: undefined }).status.machine?.timeout).toBe(done.status.machine?.timeout);
    expect(changed(requestStart(done, start(), T0)).status.machine?.timeout).toBe("");
  });

  test("the idle clock rests while the runner is unreachable, and never runs for 0s or a prebuild", () => {
    const state = running();
    const offline = changed(runnerUnreachable(state, plus(MINUTE), plus(MINUTE)));
    expect(idleStop(offline, plus(DAY))).toEqual({ kind: "noop" });
    expect(idleDeadline(changed(runnerReturned(offline, plus(DAY))))).toEqual(plus(DAY + 30 * MINUTE));
    const never = { ...state.spec, timeout: { ...state.spec.timeout!, disconnected: durationFromMs(0) } };
    expect(idleDeadline({ ...state, spec: never })).toBeNull();
    expect(idleDeadline({ ...state, metadata: { ...state.metadata, role: EnvironmentRole.PREBUILD } })).toBeNull();
    expect(idleDeadline(fresh())).toBeNull();
  });

  test("ENV-17 activity: one stored signal per source and five minutes, zero does not extend, old ones are ignored", () => {
    let state = running();
    let written = 0;
    for (let index = 0; index < 100; index++) {
      const next = changed(markActive(state, undefined, plus(index * 600)));
      written += next.status.statusVersion > state.status.statusVersion ? 1 : 0;
      state = next;
    }
    expect([written, state.facts.lastActivityAt]).toEqual([1, plus(59_400)]);
    const signal = (source: string, at: Date) =>
      create(EnvironmentActivitySignalSchema, { source, timestamp: timestampFromDate(at) });
    expect(markActive(state, signal("API", plus(1000)), plus(MINUTE))).toEqual({ kind: "noop" });
    const zero = changed(markActive(state, signal("SSH", new Date(0)), plus(2 * MINUTE)));
    expect(zero.facts.lastActivityAt).toEqual(plus(59_400));
    expect(zero.status.activitySignal).toMatchObject({ source: "SSH", timestamp: { seconds: 0n } });
    const future = changed(markActive(zero, signal("SSH", plus(DAY)), plus(3 * MINUTE)));
    expect(future.facts.lastActivityAt).toEqual(plus(3 * MINUTE));
    expect(future.status).toBe(zero.status);
    const later = changed(markActive(future, signal("SSH", plus(DAY)), plus(2 * MINUTE + ACTIVITY_SIGNAL_INTERVAL_MS)));
    expect(later.status.statusVersion).toBe(future.status.statusVersion + 1n);
    expect(markActive(stopped(), undefined, T0).kind).toBe("refused");
    expect(markActive(changed(requestDelete(running(), false, T0)), undefined, T0).kind).toBe("refused");
  });

  test("ENV-19 archive and delete delays", () => {
    const state = stopped();
    expect(archiveDeadline(state, DEFAULT_ARCHIVE_AFTER_MS)).toEqual(plus(3 * DAY));
    expect(archiveDeadline(running(), DAY)).toBeNull();
    const workflow = { ...state, metadata: { ...state.metadata, role: EnvironmentRole.WORKFLOW } };
    expect(archiveDeadline(workflow, DAY)).toBeNull();
    const archived = changed(requestArchive(state, plus(3 * DAY)));
    expect(archiveDeadline(archived, DAY)).toBeNull();
    expect(deleteDeadline(archived, 7 * DAY)).toEqual(plus(10 * DAY));
    expect(deleteDeadline(archived, 0)).toBeNull();
    expect(deleteDeadline(state, DAY)).toBeNull();
    expect(deleteDeadline(changed(requestDelete(archived, false, T0)), DAY)).toBeNull();
  });

  test("ENV-20 lockdown warns at its time, stops nothing, and refuses a start only if strict or set by an admin", () => {
    const base = running();
    const lockdownAt = timestampFromDate(plus(10 * MINUTE));
    const state = settle(base, { ...base, metadata: { ...base.metadata, lockdownAt } }, T0);
    expect([state.status.warningMessage, nextDeadline(state)]).toEqual([[], plus(10 * MINUTE)]);
    const warned = changed(runTimers(state, plus(10 * MINUTE)));
    expect(phase(warned)).toBe("RUNNING");
    expect(warned.status.warningMessage).toEqual([
      "the lifetime of this environment ended at 2026-03-01T12:10:00.000Z",
    ]);
    expect(nextDeadline(warned)).toEqual(plus(30 * MINUTE));
    expect(isLockedDown(warned, false, plus(DAY))).toBe(false);
    expect(isLockedDown(warned, true, plus(DAY))).toBe(true);
    expect(isLockedDown(warned, true, plus(9 * MINUTE))).toBe(false);
    expect(isLockedDown({ ...warned, facts: { ...warned.facts, lockdownSource: "admin" } }, false, plus(DAY))).toBe(
      true,
    );
  });

  test("a stop or deletion that takes too long is reported once, in time, and only while the runner is reachable", () => {
    const stopping = changed(requestStop(running(), T0));
    expect(nextDeadline(stopping)).toEqual(plus(STOP_OVERDUE_MS));
    expect(runTimers(stopping, plus(STOP_OVERDUE_MS - 1))).toEqual({ kind: "noop" });
    const overdue = changed(runTimers(stopping, plus(STOP_OVERDUE_MS)));
    expect(overdue.status.warningMessage).toEqual([
      "stopping since 2026-03-01T12:00:00.000Z, longer than expected; deleting by force ends it",
    ]);
    expect([nextDeadline(overdue), runTimers(overdue, plus(DAY))]).toEqual([null, { kind: "noop" }]);
    const done = reported(overdue, machineAt(overdue, Machine.STOPPED));
    expect([phase(done), done.status.warningMessage]).toEqual(["STOPPED", []]);
    const deleting = changed(requestDelete(done, false, plus(DAY)));
    expect([phase(deleting), nextDeadline(deleting)]).toEqual(["DELETING", plus(DAY + DELETE_OVERDUE_MS)]);
    expect(nextDeadline(changed(runnerUnreachable(deleting, T0, T0)))).toBeNull();
  });

  test("runTimers serves start deadline and idle stop", () => {
    const late = changed(runTimers(fresh(), plus(START_DEADLINE_MS)));
    expect([late.status.failureMessage.length, phase(late)]).toEqual([1, "STOPPED"]);
    expect(phase(changed(runTimers(running(), plus(30 * MINUTE))))).toBe("STOPPING");
    expect(runTimers(running(), plus(MINUTE))).toEqual({ kind: "noop" });
  });
});
