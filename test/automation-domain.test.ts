import { create, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromDate, timestampMs } from "@bufbuild/protobuf/wkt";
import { describe, expect, test } from "vitest";
import {
  type AutomationsFile,
  AutomationsFileSchema,
  CreateServiceRequestSchema,
  CreateTaskRequestSchema,
  ServicePhase,
  ServiceRole,
  ServiceStatusSchema,
  TaskExecutionPhase,
  TaskExecutionSpecSchema,
  type TaskExecutionStatus_Step,
  TaskExecutionStatus_StepSchema,
  TaskExecutionStatusSchema,
  TaskSpecSchema,
  UpdateServiceRequestSchema,
} from "../gen/gitpod/v1/environment_automation_pb.js";
import {
  EnvironmentStatus_ContentPhase as ContentPhase,
  EnvironmentStatus_DevContainer_Phase as DevContainerPhase,
  EnvironmentRole,
  EnvironmentSpecSchema,
  EnvironmentStatusSchema,
  EnvironmentStatus_Machine_Phase as MachinePhase,
} from "../gen/gitpod/v1/environment_pb.js";
import { Principal, SubjectSchema } from "../gen/gitpod/v1/identity_pb.js";
import { isOwnLog, storedTriggers, type TriggerName, triggerNames } from "../src/domain/automation.ts";
import { admitsTrigger, consequences } from "../src/domain/automation-environment.ts";
import {
  acceptExecutionReport,
  type ExecutionState,
  executionPhase,
  failExecution,
  hasEnded,
  newExecution,
  requestExecutionStop,
} from "../src/domain/automation-execution.ts";
import {
  buildPlan,
  type Definitions,
  findCycle,
  MAX_PLAN_BYTES,
  type PlannedTask,
  planRefusal,
  runOf,
  sizeRefusal,
} from "../src/domain/automation-plan.ts";
import {
  acceptServiceStatus,
  isAtRest,
  isStartPending,
  LOST,
  loseService,
  mergedStatus,
  newService,
  replaceService,
  requestServiceDelete,
  requestServiceStart,
  requestServiceStop,
  type ServiceState,
} from "../src/domain/automation-service.ts";
import { newTask, type TaskState } from "../src/domain/automation-task.ts";
import { fileProblems, type StoredItems, upsert } from "../src/domain/automation-upsert.ts";
import { newEnvironment } from "../src/domain/environment.ts";
import { Refusal } from "../src/domain/errors.ts";
import {
  applyReport,
  type EnvironmentState,
  requestDelete,
  requestStart,
  requestStop,
  transition,
} from "../src/domain/lifecycle.ts";

const { STARTING, RUNNING, STOPPING, STOPPED, FAILED, DELETED } = ServicePhase;
const NOW = new Date("2026-03-01T12:00:00Z");
const CREATOR = create(SubjectSchema, { id: "u", principal: Principal.USER });
const ORIGIN = { creator: CREATOR, now: NOW };

const counter = (prefix: string) => {
  let count = 0;
  return () => `${prefix}${++count}`;
};

// Services.

const PHASES = [STARTING, RUNNING, STOPPING, STOPPED, FAILED] as const;
const GOALS = [RUNNING, STOPPED, DELETED] as const;

function service(spec: Partial<ServiceState["spec"]> = {}, status: Partial<ServiceState["status"]> = {}): ServiceState {
  const metadata = { reference: "web", name: "Web" };
  const made = newService(
    create(CreateServiceRequestSchema, { metadata, spec: { commands: { start: "run" } } }),
    ORIGIN,
  );
  return { ...made, spec: { ...made.spec, ...spec }, status: { ...made.status, ...status } };
}

/** Every state in which a service can be: goal, phase, and whether the session wanted is the one in force. */
const STATES: ServiceState[] = GOALS.flatMap((desiredPhase) =>
  PHASES.flatMap((phase) =>
    ["old", "new"].map((session) => service({ desiredPhase, session }, { phase, session: "old", output: { a: "1" } })),
  ),
);

const nextOf = <T>(move: { kind: string; next?: T }): T => {
  if (move.kind !== "changed" || !move.next) throw new Error(`the move is ${move.kind}`);
  return move.next;
};

/** One event further in the table of the specification; a start that is taken over is another session. */
const EVENTS: Record<number, readonly ServicePhase[]> = {
  [STARTING]: [RUNNING, STOPPED, FAILED, STOPPING],
  [RUNNING]: [STOPPED, FAILED, STOPPING],
  [STOPPING]: [STOPPED, FAILED],
  [STOPPED]: [],
  [FAILED]: [],
};

function reachable(from: ServicePhase): Set<ServicePhase> {
  const found = new Set([from]);
  for (const phase of found) for (const next of EVENTS[phase] ?? []) found.add(next);
  return found;
}

describe("wishes for a service", () => {
  test("a start leads to a session that is in force or wanted, from every state, and is idempotent", () => {
    for (const state of STATES) {
      const move = requestServiceStart(state, "fresh");
      if (state.spec.desiredPhase === DELETED) {
        expect(move.kind).toBe("refused");
        continue;
      }
      const next = move.kind === "changed" ? move.next : state;
      expect(next.spec.desiredPhase).toBe(RUNNING);
      expect(isStartPending(next) || !isAtRest(next)).toBe(true);
      // What runs in the session that is wanted is left alone.
      const isUp = state.status.phase === STARTING || state.status.phase === RUNNING;
      const isWanted = state.spec.desiredPhase === RUNNING && (isUp || state.spec.session === "new");
      expect(move.kind).toBe(isWanted ? "noop" : "changed");
      if (move.kind === "changed") {
        expect(next.spec).toMatchObject({ session: "fresh", specVersion: state.spec.specVersion + 1n });
        expect(next.status).toBe(state.status);
      }
      expect(requestServiceStart(next, "another").kind).toBe("noop");
    }
  });

  test("nothing starts without a start command", () => {
    const { spec } = service();
    expect(requestServiceStart(service({ ...spec, commands: undefined }), "fresh").kind).toBe("refused");
  });

  test("a stop withdraws what is wanted and touches nothing else; a deletion is not taken back", () => {
    for (const state of STATES) {
      const stop = requestServiceStop(state);
      expect(stop.kind).toBe(state.spec.desiredPhase === RUNNING ? "changed" : "noop");
      if (stop.kind === "changed") {
        expect(stop.next.spec).toEqual({
          ...state.spec,
          desiredPhase: STOPPED,
          specVersion: state.spec.specVersion + 1n,
        });
        expect(isStartPending(stop.next)).toBe(false);
      }
      const removal = requestServiceDelete(state);
      expect(removal.kind).toBe(state.spec.desiredPhase === DELETED ? "noop" : "changed");
    }
  });

  test("what ended without a word is lost, what had ended stays as it was", () => {
    for (const state of STATES) {
      const move = loseService(state);
      if (isAtRest(state)) expect(move.kind).toBe("noop");
      else expect(nextOf(move).status).toMatchObject({ phase: FAILED, failureMessage: LOST, session: "old" });
    }
  });
});

describe("the status of a service", () => {
  test("every status in every state is judged as the table of the specification says", () => {
    for (const state of STATES) {
      for (const session of ["old", "new", "other", ""]) {
        for (const phase of [...PHASES, DELETED, ServicePhase.UNSPECIFIED, 99 as ServicePhase]) {
          for (const isHalted of [false, true]) {
            const status = create(ServiceStatusSchema, { phase, session });
            const move = acceptServiceStatus(state, status, isHalted);
            const isKnown = session === "old" || session === state.spec.session;
            const isActive = [STARTING, RUNNING, STOPPING].includes(phase);
            const isLateWord = session === "old" && state.status.phase === FAILED && phase === STOPPED;
            const possible = session === "old" ? reachable(state.status.phase) : reachable(STARTING);
            const expected = !isKnown
              ? "refused"
              : phase === DELETED
                ? state.spec.desiredPhase === DELETED
                  ? "removed"
                  : "refused"
                : (isActive && isHalted) || !(possible.has(phase) || isLateWord)
                  ? "refused"
                  : "accepted";
            const found = move.kind === "changed" || move.kind === "noop" ? "accepted" : move.kind;
            expect(
              [found, ServicePhase[phase], session, isHalted, state.spec.session],
              ServicePhase[state.status.phase],
            ).toEqual([...[expected, ServicePhase[phase], session, isHalted, state.spec.session]]);
            if (move.kind === "changed") {
              expect(move.next.status.statusVersion).toBe(state.status.statusVersion + 1n);
              expect([move.next.spec, move.next.metadata]).toEqual([state.spec, state.metadata]);
            }
          }
        }
      }
    }
  });

  test("AUT-3, AUT-10 no sequence of wishes and reports loses a start, and what has exited does not come back by itself", () => {
    // Every path of four moves, with a supervisor that does what the newest spec says.
    const session = counter("s");
    const supervise = (state: ServiceState): ServiceState[] => {
      const report = (phase: ServicePhase, of = state.status.session): ServiceState[] => {
        const move = acceptServiceStatus(
          state,
          create(ServiceStatusSchema, { ...state.status, phase, session: of }),
          false,
        );
        return move.kind === "changed" ? [move.next] : [];
      };
      if (isAtRest(state)) return isStartPending(state) ? report(STARTING, state.spec.session) : [];
      const isUnwanted = state.spec.desiredPhase !== RUNNING || isStartPending(state);
      if (isUnwanted)
        return state.status.phase === STOPPING ? [...report(STOPPED), ...report(FAILED)] : report(STOPPING);
      return [...report(RUNNING), ...report(STOPPED), ...report(FAILED)];
    };
    const wish = (state: ServiceState): ServiceState[] =>
      [requestServiceStart(state, session()), requestServiceStop(state)].flatMap((move) =>
        move.kind === "changed" ? [move.next] : [],
      );
    let states = [service()];
    for (let depth = 0; depth < 7; depth++) {
      states = states.flatMap((state) => [...wish(state), ...supervise(state)]);
      for (const state of states) {
        const settled = isAtRest(state) && !isStartPending(state);
        // It rests only if it was stopped or has exited in the session that was wanted.
        if (settled && state.spec.desiredPhase === RUNNING) expect(state.status.session).toBe(state.spec.session);
        if (settled) expect(supervise(state)).toEqual([]);
        else expect(supervise(state)).not.toEqual([]);
      }
    }
    expect(states.length).toBeGreaterThan(100);
  });

  test("AUT-13 a part of a status completes the one that is stored; another session starts with none of it", () => {
    const part = (more: object) => create(UpdateServiceRequestSchema, { status: more }).status!;
    const state = service(
      { session: "new" },
      { phase: RUNNING, session: "old", output: { a: "1", b: "2" }, logUrl: "u" },
    );
    expect(mergedStatus(state, part({ output: { a: "", c: "3" } }))).toMatchObject({
      ...{ phase: RUNNING, session: "old", logUrl: "u", output: { b: "2", c: "3" } },
    });
    expect(mergedStatus(state, part({ session: "new", phase: STARTING, output: { z: "1" } }))).toMatchObject({
      ...{ phase: STARTING, session: "new", logUrl: "", failureMessage: "", output: { z: "1" } },
    });
  });
});

describe("where a log may lie", () => {
  const logs = "https://runner.example:8443/base/environments/e1/logs";

  test.each([
    ["https://runner.example:8443/base/environments/e1/services/s1/log", true],
    ["https://runner.example:8443/base/environments/e1/x?step=1", true],
    ["https://runner.example:8443/base/environments/e2/services/s1/log", false],
    ["https://runner.example:8443/base/environments/e1/../e2/log", false],
    ["https://runner.example:8443/base/environments/e1/%2e%2e/e2/log", false],
    ["https://runner.example:8443/base/environments/e1/..%2fe2/log", false],
    ["https://runner.example:8443/base/environments/e1/a\\b", false],
    ["https://runner.example/base/environments/e1/log", false],
    ["http://runner.example:8443/base/environments/e1/log", false],
    ["https://x@runner.example:8443/base/environments/e1/log", false],
    ["https://runner.example:8443/base/environments/e1/log#x", false],
    ["/base/environments/e1/log", false],
    [" https://runner.example:8443/base/environments/e1/log", false],
    [`https://runner.example:8443/base/environments/e1/${"x".repeat(2048)}`, false],
  ])("AUT-15 %s: %s", (url, isOwn) => expect(isOwnLog(url, logs)).toBe(isOwn));

  test("nowhere while the environment has no address", () => {
    expect(isOwnLog("https://runner.example/environments/e1/log", "")).toBe(false);
    expect(isOwnLog("x", "not a url")).toBe(false);
  });
});

describe("triggers", () => {
  test("false ones are dropped, repetitions collapse", () => {
    const names: TriggerName[] = ["manual", "prebuild", "manual"];
    const stored = storedTriggers(names);
    stored[1]!.trigger.value = false;
    expect(triggerNames(stored)).toEqual(["manual"]);
  });
});

// Plans.

/** Numbers that look random and are the same in every run. */
function random(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

function task(id: string, dependsOn: string[] = [], name = ""): PlannedTask {
  return {
    id,
    metadata: { reference: `r-${id}`, name },
    spec: create(TaskSpecSchema, { command: `do ${id}` }),
    dependsOn,
  };
}

const definitions = (tasks: PlannedTask[], services: string[] = []): Definitions => ({
  tasks: new Map(tasks.map((each) => [each.id, each])),
  services: new Map(services.map((id) => [id, { id, metadata: { reference: `r-${id}`, name: "" } }])),
});

const subjects = (spec: ReturnType<typeof buildPlan>) =>
  spec.plan.map(({ steps }) => steps.map(({ step }) => (step.case === "task" ? step.value.id : step.value)));

describe("plans", () => {
  test("AUT-16 groups follow the levels of the dependencies, each by reference", () => {
    const all = definitions(
      [task("a"), task("b", ["a", "s"]), task("c", ["a"]), task("d", ["c", "b"])],
      ["s", "unused"],
    );
    const plan = buildPlan(all, "d", { newId: counter("step") });
    expect(subjects(plan)).toEqual([["a", "s"], ["b", "c"], ["d"]]);
    expect(plan.plan.flatMap(({ steps }) => steps).map(({ label }) => label)).toEqual([
      "r-a",
      "r-s",
      "r-b",
      "r-c",
      "r-d",
    ]);
    expect(subjects(buildPlan(all, "a", { newId: counter("step") }))).toEqual([["a"]]);
  });

  test("in any graph each item stands once, after all that it needs, and the task alone in the last group", () => {
    for (let seed = 1; seed <= 200; seed++) {
      const pick = random(seed);
      const size = 1 + pick(12);
      const services = Array.from({ length: pick(4) }, (_, index) => `s${index}`);
      const tasks = Array.from({ length: size }, (_, index) => {
        const earlier = [...Array.from({ length: index }, (_, each) => `t${each}`), ...services];
        return task(
          `t${index}`,
          earlier.filter(() => pick(3) === 0),
        );
      });
      const all = definitions(tasks, services);
      const main = `t${size - 1}`;
      const { plan } = buildPlan(all, main, { newId: counter("step") });
      const groupOf = new Map(plan.flatMap(({ steps }, group) => steps.map((step) => [step.id, group] as const)));
      const steps = plan.flatMap((group) => group.steps);
      expect(groupOf.size).toBe(steps.length);
      for (const step of steps) {
        const level = groupOf.get(step.id)!;
        const before = step.dependsOn.map((id) => groupOf.get(id)!);
        // One above the highest of those that it needs: neither earlier nor later.
        expect(level).toBe(Math.max(-1, ...before) + 1);
      }
      const needed = new Set<string>([main]);
      for (const id of needed) for (const next of all.tasks.get(id)?.dependsOn ?? []) needed.add(next);
      expect(new Set(subjects({ ...create(TaskExecutionSpecSchema), plan }).flat())).toEqual(needed);
      expect(subjects({ ...create(TaskExecutionSpecSchema), plan }).at(-1)).toEqual([main]);
      expect(findCycle(all.tasks, main)).toBeUndefined();
    }
  });

  test("AUT-18 a circle is found exactly when there is one, and its path leads back to where it began", () => {
    const cyclic = definitions([task("a", ["b"]), task("b", ["c", "a"]), task("c")]);
    expect(findCycle(cyclic.tasks, "a")).toBe("r-a -> r-b -> r-a");
    expect(planRefusal(cyclic, "b")).toContain("r-b -> r-a -> r-b");
    expect(findCycle(definitions([task("a", ["a"])]).tasks, "a")).toBe("r-a -> r-a");
    let circles = 0;
    for (let seed = 1; seed <= 300; seed++) {
      const pick = random(seed);
      const ids = Array.from({ length: 7 }, (_, index) => `t${index}`);
      const { tasks } = definitions(
        ids.map((id) =>
          task(
            id,
            ids.filter(() => pick(6) === 0),
          ),
        ),
      );
      // Reachable from itself: by following edges, whatever the search under test does.
      const isCircular = (from: string) => {
        const seen = new Set(tasks.get(from)?.dependsOn);
        for (const id of seen) for (const next of tasks.get(id)?.dependsOn ?? []) seen.add(next);
        return seen.has(from);
      };
      const reach = new Set(["t0"]);
      for (const id of reach) for (const next of tasks.get(id)?.dependsOn ?? []) reach.add(next);
      const cycle = findCycle(tasks, "t0");
      expect(cycle !== undefined).toBe([...reach].some(isCircular));
      if (!cycle) continue;
      circles += 1;
      const path = cycle.split(" -> ").map((reference) => reference.slice(2));
      expect(path[0]).toBe(path.at(-1));
      for (const [index, id] of path.slice(0, -1).entries())
        expect(tasks.get(id)?.dependsOn).toContain(path[index + 1]);
    }
    expect(circles).toBeGreaterThan(50);
  });

  test("AUT-27 executions of one firing share the run of a task; those of manual starts, and services, do not", () => {
    const all = definitions([task("deps"), task("test", ["deps", "db"])], ["db"]);
    const left = buildPlan(all, "deps", { newId: counter("l") }).plan[0]!.steps[0]!;
    const [db, right] = buildPlan(all, "test", { newId: counter("r") }).plan[0]!.steps;
    expect(runOf("f1", left)).toBe(runOf("f1", right!));
    expect(runOf("f1", left)).not.toBe(runOf("f2", right!));
    expect([runOf("", left), runOf("", right!), runOf("f1", db!)]).toEqual([left.id, right!.id, db!.id]);
  });

  test("before the dev container tasks without a target run on the machine; a plan has an end to its size", () => {
    const all = definitions([task("a")]);
    const [step] = buildPlan(all, "a", { newId: counter("s"), onMachine: true }).plan[0]!.steps;
    expect(step?.step).toMatchObject({ value: { spec: { runsOn: { target: { case: "machine" } } } } });
    expect(all.tasks.get("a")?.spec.runsOn).toBeUndefined();
    const plan = buildPlan(all, "a", { newId: counter("s") });
    expect(sizeRefusal(plan)).toBeUndefined();
    const large = task("a");
    large.spec.command = "x".repeat(MAX_PLAN_BYTES);
    expect(sizeRefusal(buildPlan(definitions([large]), "a", { newId: counter("s") }))).toContain(
      String(MAX_PLAN_BYTES),
    );
  });
});

// Executions.

const Phase = TaskExecutionPhase;
const STEP_PHASES = [undefined, Phase.RUNNING, Phase.SUCCEEDED, Phase.FAILED, Phase.STOPPED] as const;

/** a, then b and c at the same time, then d. */
const PLAN = buildPlan(definitions([task("a"), task("b", ["a"]), task("c", ["a"]), task("d", ["b", "c"])]), "d", {
  newId: counter("step"),
});
const STEP_IDS = PLAN.plan.flatMap(({ steps }) => steps).map(({ id }) => id);

function execution(steps: readonly TaskExecutionStatus_Step[] = [], isStopWanted = false): ExecutionState {
  const facts = { taskId: "t", environmentId: "e", creator: CREATOR, startedBy: "manual" as const, now: NOW };
  const fresh = newExecution(PLAN, facts);
  const phase = executionPhase(PLAN.plan, steps, false);
  return {
    ...fresh,
    spec: { ...fresh.spec, desiredPhase: isStopWanted ? Phase.STOPPED : Phase.UNSPECIFIED },
    status: { ...fresh.status, phase, steps: [...steps] },
  };
}

const stepsOf = (phases: readonly (TaskExecutionPhase | undefined)[]) =>
  phases.flatMap((phase, index) =>
    phase === undefined ? [] : [create(TaskExecutionStatus_StepSchema, { id: STEP_IDS[index]!, phase })],
  );

/** All ways in which the four steps can stand, possible or not. */
const CONSTELLATIONS = STEP_PHASES.flatMap((a) =>
  STEP_PHASES.flatMap((b) => STEP_PHASES.flatMap((c) => STEP_PHASES.map((d) => [a, b, c, d] as const))),
);

const isPossible = ([a, b, c, d]: (typeof CONSTELLATIONS)[number]) => {
  const done = (phase: TaskExecutionPhase | undefined) => phase === Phase.SUCCEEDED;
  return ((b === undefined && c === undefined) || done(a)) && (d === undefined || (done(a) && done(b) && done(c)));
};

describe("executions", () => {
  test("every way in which steps can stand is accepted with the phase that it amounts to, and no other end is", () => {
    for (const phases of CONSTELLATIONS) {
      for (const isStopWanted of [false, true]) {
        const state = execution([], isStopWanted);
        const steps = stepsOf(phases);
        const derived = executionPhase(PLAN.plan, steps, isStopWanted);
        const report = (phase: TaskExecutionPhase) =>
          acceptExecutionReport(state, create(TaskExecutionStatusSchema, { phase, steps }), {}, NOW).kind;
        if (!isPossible(phases)) {
          expect(report(derived)).toBe("refused");
          continue;
        }
        expect(["changed", "noop"], `${phases} ${Phase[derived]}`).toContain(report(derived));
        for (const phase of [Phase.SUCCEEDED, Phase.FAILED])
          if (phase !== derived) expect(report(phase)).toBe("refused");
        if (phases.includes(Phase.RUNNING)) expect(derived).toBe(Phase.RUNNING);
        else if (phases.includes(Phase.FAILED)) expect(derived).toBe(Phase.FAILED);
        else if (phases.every((phase) => phase === Phase.SUCCEEDED)) expect(derived).toBe(Phase.SUCCEEDED);
        else if (isStopWanted || phases.includes(Phase.STOPPED)) expect(derived).toBe(Phase.STOPPED);
        else expect(derived).toBe(steps.length > 0 ? Phase.RUNNING : Phase.PENDING);
      }
    }
  });

  test("AUT-17 a failure is told at once and ends the execution when its group is done; later groups stay absent", () => {
    const failed = create(TaskExecutionStatusSchema, {
      ...{ phase: Phase.RUNNING, failureMessage: "c: exit code 1" },
      steps: stepsOf([Phase.SUCCEEDED, Phase.RUNNING, Phase.FAILED, undefined]),
    });
    const early = nextOf(acceptExecutionReport(execution(), failed, {}, NOW));
    expect(early.status).toMatchObject({ phase: Phase.RUNNING, failureMessage: "c: exit code 1" });
    const steps = stepsOf([Phase.SUCCEEDED, Phase.SUCCEEDED, Phase.FAILED, undefined]);
    const end = { ...failed, phase: Phase.FAILED, steps };
    expect(nextOf(acceptExecutionReport(early, end, {}, NOW)).status.steps).toHaveLength(3);
    const beyond = { ...end, steps: stepsOf([Phase.SUCCEEDED, Phase.SUCCEEDED, Phase.FAILED, Phase.RUNNING]) };
    expect(acceptExecutionReport(early, { ...beyond, phase: Phase.RUNNING }, {}, NOW).kind).toBe("refused");
  });

  test("steps only go forward, and an end is final whatever comes after it", () => {
    const possible = CONSTELLATIONS.filter(isPossible);
    for (const before of possible) {
      const state = execution(stepsOf(before));
      for (const after of possible) {
        const steps = stepsOf(after);
        const status = create(TaskExecutionStatusSchema, { phase: executionPhase(PLAN.plan, steps, false), steps });
        const move = acceptExecutionReport(state, status, {}, NOW);
        const isForward = before.every(
          (phase, index) => phase === undefined || phase === Phase.RUNNING || phase === after[index],
        );
        const keeps = before.every((phase, index) => phase === undefined || after[index] !== undefined);
        const isSame = before.every((phase, index) => phase === after[index]);
        const expected = isSame ? "noop" : hasEnded(state) || !isForward || !keeps ? "refused" : "changed";
        expect([move.kind, before, after]).toEqual([expected, before, after]);
      }
      const ended = hasEnded(state);
      expect(requestExecutionStop(state, NOW).kind).toBe(ended ? "noop" : "changed");
      expect(failExecution(state, LOST, NOW).kind).toBe(ended ? "noop" : "changed");
      if (ended) continue;
      const lost = nextOf(failExecution(state, LOST, NOW));
      expect(lost.status).toMatchObject({ phase: Phase.FAILED, failureMessage: LOST });
      expect(lost.status.steps.some(({ phase }) => phase === Phase.RUNNING)).toBe(false);
      expect(lost.metadata.completedAt).toBeDefined();
    }
  });

  test("strange steps are refused: unknown, named twice, in no phase, with too much output", () => {
    const judge = (steps: MessageInitShape<typeof TaskExecutionStatus_StepSchema>[], phase = Phase.RUNNING) =>
      acceptExecutionReport(execution(), create(TaskExecutionStatusSchema, { phase, steps }), {}, NOW).kind;
    const [id] = STEP_IDS;
    const running = { id: id!, phase: Phase.RUNNING };
    expect(judge([running])).toBe("changed");
    expect(judge([{ ...running, id: "another" }])).toBe("refused");
    expect(judge([running, running])).toBe("refused");
    for (const phase of [Phase.UNSPECIFIED, Phase.PENDING, 77 as TaskExecutionPhase])
      expect(judge([{ ...running, phase }])).toBe("refused");
    expect(judge([{ ...running, output: { "": "x" } }])).toBe("refused");
    expect(judge([{ ...running, output: { k: "x".repeat(4097) } }])).toBe("refused");
    expect(judge([running], 42 as TaskExecutionPhase)).toBe("refused");
  });

  test("times are those of the first word, never in the future, and there when they have to be", () => {
    const at = (ms: number) => timestampFromDate(new Date(NOW.getTime() + ms));
    const status = (phases: Parameters<typeof stepsOf>[0]) => {
      const steps = stepsOf(phases);
      return create(TaskExecutionStatusSchema, { phase: executionPhase(PLAN.plan, steps, false), steps });
    };
    const first = nextOf(acceptExecutionReport(execution(), status([Phase.RUNNING]), { startedAt: at(-5000) }, NOW));
    expect(timestampMs(first.metadata.startedAt!)).toBe(NOW.getTime() - 5000);
    const later = new Date(NOW.getTime() + 60_000);
    const second = nextOf(
      acceptExecutionReport(first, status([Phase.FAILED]), { startedAt: at(0), completedAt: at(10_000_000) }, later),
    );
    expect(timestampMs(second.metadata.startedAt!)).toBe(NOW.getTime() - 5000);
    expect(timestampMs(second.metadata.completedAt!)).toBe(later.getTime());
    const whole = nextOf(acceptExecutionReport(execution(), status([Phase.FAILED]), {}, NOW));
    expect([whole.metadata.startedAt, whole.metadata.completedAt].map((time) => timestampMs(time!))).toEqual([
      ...[NOW.getTime(), NOW.getTime()],
    ]);
    const stopped = nextOf(requestExecutionStop(execution(), NOW));
    expect(stopped.metadata.startedAt).toBeUndefined();
    expect(stopped).toMatchObject({ status: { phase: Phase.STOPPED }, spec: { desiredPhase: Phase.STOPPED } });
  });
});

// Automations files.

const parseFile = (init: MessageInitShape<typeof AutomationsFileSchema>): AutomationsFile =>
  create(AutomationsFileSchema, init);

/** What is stored after an upsert. */
function applied(stored: StoredItems, file: AutomationsFile, newId = counter("id")): StoredItems {
  const { services, tasks } = upsert(file, stored, { ...ORIGIN, newId });
  const merge = <T extends { id: string }>(
    items: readonly T[],
    writes: readonly { id: string; next: unknown }[],
  ): T[] => [
    ...new Map(
      [...items, ...writes.map(({ id, next }) => ({ ...(next as T), id }))].map((item) => [item.id, item]),
    ).values(),
  ];
  return { services: merge(stored.services, services), tasks: merge(stored.tasks, tasks) };
}

const NOTHING: StoredItems = { services: [], tasks: [] };
const FILE = parseFile({
  services: {
    db: {
      name: "Database",
      role: "editor",
      triggeredBy: ["manual", "manual"],
      commands: { start: "db" },
      readinessTimeout: durationFromMs(0),
    },
  },
  tasks: {
    test: { name: "Tests", command: "npm test", dependsOn: ["deps", "db"] },
    deps: { name: "Install", command: "npm ci", triggeredBy: ["prebuild"], prebuildRequiresSuccess: true },
  },
});

const refusalOf = (work: () => unknown): Refusal => {
  try {
    work();
  } catch (error) {
    if (error instanceof Refusal) return error;
    throw error;
  }
  throw new Error("nothing was refused");
};

describe("upserting a file", () => {
  test("AUT-30 the same file twice changes nothing the second time and names the same items", () => {
    const newId = counter("id");
    const first = upsert(FILE, NOTHING, { ...ORIGIN, newId });
    const stored = applied(NOTHING, FILE);
    const second = upsert(FILE, stored, { ...ORIGIN, newId: counter("other") });
    expect([second.services, second.tasks]).toEqual([[], []]);
    expect([second.serviceIds, second.taskIds]).toEqual([first.serviceIds, first.taskIds]);
    const [db] = stored.services;
    expect(db).toMatchObject({
      metadata: {
        reference: "db",
        role: ServiceRole.EDITOR,
        creator: CREATOR,
        triggeredBy: [{ trigger: { case: "manual" } }],
      },
      spec: { desiredPhase: STOPPED, specVersion: 1n },
      status: { phase: STOPPED },
    });
    const byReference = new Map(stored.tasks.map((each) => [each.metadata.reference, each]));
    const deps = byReference.get("deps")!;
    expect(byReference.get("test")?.dependsOn).toEqual([deps.id, db!.id]);
    expect(second.taskIds).toEqual([deps.id, byReference.get("test")!.id]);
    expect(deps.spec.prebuildRequiresSuccess).toBe(true);
  });

  test("AUT-31 what the file does not name is kept, what it leaves out of an item takes its default, variables stay", () => {
    const stored = applied(NOTHING, FILE);
    const variables = [
      {
        $typeName: "gitpod.v1.EnvironmentVariableItem" as const,
        name: "A",
        source: { case: "value" as const, value: "1" },
      },
    ];
    stored.services[0]!.spec.env = variables;
    const fragment = parseFile({
      services: { db: { name: "Database", commands: { start: "db2" } } },
      tasks: { lint: { name: "Lint", command: "lint", dependsOn: ["deps"] } },
    });
    const next = applied(stored, fragment, counter("new"));
    expect(next.tasks.map(({ metadata }) => metadata.reference).sort()).toEqual(["deps", "lint", "test"]);
    expect(next.services[0]).toMatchObject({
      metadata: { role: ServiceRole.DEFAULT, triggeredBy: [], description: "" },
      spec: { commands: { start: "db2" }, env: variables, specVersion: 2n },
    });
    const lint = next.tasks.find(({ metadata }) => metadata.reference === "lint");
    expect(lint?.dependsOn).toEqual([stored.tasks.find(({ metadata }) => metadata.reference === "deps")?.id]);
  });

  test("AUT-32 a new spec restarts what runs, waits for what is being stopped, and joins a start that is pending", () => {
    const { metadata } = service();
    const replaced = (state: ServiceState, start: string | undefined) => {
      const spec = { ...state.spec, commands: start === undefined ? undefined : { ...state.spec.commands!, start } };
      return replaceService(state, { metadata, spec }, "fresh");
    };
    for (const state of STATES) {
      expect(replaced(state, "run").kind).toBe("noop");
      const { spec } = nextOf(replaced(state, "another"));
      expect(spec.specVersion).toBe(state.spec.specVersion + 1n);
      const isUp = state.status.phase === STARTING || state.status.phase === RUNNING;
      const restarts = isUp && state.spec.desiredPhase === RUNNING && state.spec.session === "old";
      expect([spec.session, spec.desiredPhase]).toEqual([
        restarts ? "fresh" : state.spec.session,
        state.spec.desiredPhase,
      ]);
      // Without a command there is nothing to restart.
      const bare = nextOf(replaced(state, undefined));
      expect(bare.spec.desiredPhase).toBe(state.spec.desiredPhase === RUNNING ? STOPPED : state.spec.desiredPhase);
      const renamed = replaceService(state, { metadata: { ...metadata, description: "x" }, spec: state.spec }, "fresh");
      expect(nextOf(renamed).spec).toBe(state.spec);
    }
  });

  test("names resolve in the file first, then in the environment; unknown, ambiguous and circular ones are refused", () => {
    const stored = applied(NOTHING, FILE);
    type Items = Exclude<MessageInitShape<typeof AutomationsFileSchema>, AutomationsFile>;
    const file = (dependsOn: string[], more: Items = {}) =>
      parseFile({ ...more, tasks: { ...more.tasks, new: { name: "New", command: "x", dependsOn } } });
    const refused = (dependsOn: string[], more: Items = {}) => {
      const { kind, problems } = refusalOf(() =>
        upsert(file(dependsOn, more), stored, { ...ORIGIN, newId: counter("n") }),
      );
      expect(kind).toBe("invalid_argument");
      return problems.map(({ field, message }) => `${field}: ${message}`);
    };
    const at = 'automations_file.tasks["new"].depends_on';
    expect(refused(["nowhere"])).toEqual([expect.stringMatching(/\[0\]: "nowhere" is not a task/)]);
    expect(refused(["deps", "deps"])).toEqual([`${at}[1]: must be unique`]);
    expect(refused(["new"])).toEqual([`${at}: must not form a cycle: new -> new`]);
    const both = { services: { x: { name: "X" } }, tasks: { x: { name: "X", command: "x" } } };
    expect(refused(["x"], both)).toEqual([expect.stringContaining("ambiguous")]);
    // The same two stored, and not in the file.
    const twice = applied(stored, parseFile(both), counter("both"));
    const outside = refusalOf(() => upsert(file(["x"]), twice, { ...ORIGIN, newId: counter("n") }));
    expect(outside.message).toContain("ambiguous");
    // In the file it means the one of the file.
    const inside = upsert(file(["x"], { services: { x: { name: "X" } } }), twice, { ...ORIGIN, newId: counter("n") });
    expect(inside.tasks[0]?.next.dependsOn).toEqual(inside.serviceIds);
    // A circle through what is stored.
    const circle = parseFile({ tasks: { deps: { name: "Install", command: "npm ci", dependsOn: ["test"] } } });
    expect(refusalOf(() => upsert(circle, stored, { ...ORIGIN, newId: counter("n") })).message).toContain(
      "deps -> test -> deps",
    );
  });

  test("an item that is being deleted makes the file wait; a name of one is free to nobody", () => {
    const stored = applied(NOTHING, FILE);
    stored.services[0]!.spec.desiredPhase = DELETED;
    expect(refusalOf(() => upsert(FILE, stored, { ...ORIGIN, newId: counter("n") })).kind).toBe("failed_precondition");
    const needing = parseFile({ tasks: { a: { name: "A", command: "a", dependsOn: ["db"] } } });
    expect(refusalOf(() => upsert(needing, stored, { ...ORIGIN, newId: counter("n") })).kind).toBe("invalid_argument");
  });

  test("problems of a file are named by kind and reference", () => {
    const command = "x".repeat(64 * 1024 + 1);
    const file = parseFile({
      services: {
        s: {
          name: "S",
          commands: { start: "x", ready: command },
          runsOn: { target: { case: "docker", value: { image: "-x" } } },
        },
      },
      tasks: { t: { name: "T", command } },
    });
    expect(fileProblems(file).map(({ field }) => field)).toEqual([
      ...['automations_file.services["s"].commands.ready', 'automations_file.services["s"].runs_on.docker.image'],
      'automations_file.tasks["t"].command',
    ]);
    expect(fileProblems(undefined)).toEqual([{ field: "automations_file", message: "is required" }]);
    const description = "x".repeat(16 * 1024);
    const tasks = Object.fromEntries(
      Array.from({ length: 70 }, (_, index) => [`t${index}`, { name: "T", command: "x", description }]),
    );
    expect(toBinary(AutomationsFileSchema, parseFile({ tasks })).length).toBeGreaterThan(1024 * 1024);
    expect(fileProblems(parseFile({ tasks })).map(({ field }) => field)).toEqual(["automations_file"]);
  });

  test("a task keeps its variables and its origin", () => {
    const request = create(CreateTaskRequestSchema, {
      metadata: { reference: "deps", name: "Old" },
      spec: { command: "old", env: [{ name: "A", source: { case: "value", value: "1" } }] },
    });
    const own: TaskState & { id: string } = {
      ...newTask(request, { creator: create(SubjectSchema, { id: "someone" }), now: NOW }),
      id: "t",
    };
    const { tasks } = upsert(FILE, { services: [], tasks: [own] }, { ...ORIGIN, newId: counter("n") });
    const written = tasks.find(({ id }) => id === "t");
    expect(written?.next).toMatchObject({
      metadata: { name: "Install", creator: { id: "someone" } },
      spec: { command: "npm ci", env: own.spec.env },
    });
  });
});

// What a change of the environment means.

const fresh = (
  spec: MessageInitShape<typeof EnvironmentSpecSchema> = {},
  role = EnvironmentRole.DEFAULT,
): EnvironmentState => {
  const state = newEnvironment({
    ...{ id: "e", name: "", annotations: {}, nameSuffix: "abc123", repositoryName: "demo", sessionId: "group" },
    spec: create(EnvironmentSpecSchema, spec),
    sessions: { machine: "m1", content: "c1", devcontainer: "d1", automationsFile: "f1" },
    creator: { id: "u", principal: Principal.USER, organizationId: "o", name: "Ada", email: "ada@example.com" },
    environmentClass: { id: "class", runnerId: "r" },
    ...{ projectId: "", secrets: [], now: NOW },
    defaults: { dotfilesRepository: "", devcontainerImage: "", kernelControls: undefined, maximumLifetimeMs: 0 },
  });
  return { ...state, metadata: { ...state.metadata, role } };
};

interface Parts {
  machine?: MachinePhase;
  container?: DevContainerPhase;
  file?: ContentPhase;
}

/** An environment that is moved about, with everything that followed from it. */
class Walk {
  readonly fired: string[] = [];
  readonly told: string[] = [];
  state: EnvironmentState;
  readonly #newest = new Map<TriggerName, string>();
  #clock = NOW.getTime();
  #parts: Required<Parts> = {
    machine: MachinePhase.RUNNING,
    container: DevContainerPhase.RUNNING,
    file: ContentPhase.READY,
  };

  constructor(state: EnvironmentState) {
    this.state = state;
  }

  get now(): Date {
    this.#clock += 1000;
    return new Date(this.#clock);
  }

  #take(next: EnvironmentState): void {
    const found = consequences(this.state, next);
    this.state = next;
    for (const { trigger, occurrence } of found?.fire ?? []) {
      // As the store does, which remembers the newest occurrence of each.
      if (this.#newest.get(trigger) !== occurrence) this.fired.push(`${trigger} ${occurrence}`);
      this.#newest.set(trigger, occurrence);
    }
    for (const what of ["stop", "rebuild", "halt", "end"] as const) if (found?.[what]) this.told.push(what);
  }

  /** A report in which what is not named is as it was, for the sessions of the spec. */
  report(parts: Parts = {}): void {
    this.#parts = { ...this.#parts, ...parts };
    const { spec } = this.state;
    const status = {
      machine: { session: spec.machine?.session ?? "", phase: this.#parts.machine },
      content: { session: spec.content?.session ?? "", phase: ContentPhase.READY },
      devcontainer: { session: spec.devcontainer?.session ?? "", phase: this.#parts.container },
      automationsFile: { session: spec.automationsFile?.session ?? "", phase: this.#parts.file },
    };
    this.#take(applyReport(this.state, create(EnvironmentStatusSchema, status), this.now).next);
  }

  stop(): void {
    this.#take(nextOf(requestStop(this.state, this.now)));
  }

  start(session: string): void {
    this.#take(nextOf(requestStart(this.state, { machineSession: session, secrets: [] }, this.now)));
    this.#parts = {
      machine: MachinePhase.STARTING,
      container: DevContainerPhase.CREATING,
      file: ContentPhase.CREATING,
    };
  }

  /** UpdateEnvironment with another session of one part. */
  change(part: "devcontainer" | "automationsFile", session: string): void {
    const spec = { ...this.state.spec, [part]: { ...this.state.spec[part], session } } as EnvironmentState["spec"];
    this.#take(nextOf(transition(this.state, { spec }, this.now)));
  }

  delete(force: boolean): void {
    this.#take(nextOf(requestDelete(this.state, force, this.now)));
  }

  count(trigger: TriggerName): number {
    return this.fired.filter((each) => each.startsWith(`${trigger} `)).length;
  }
}

describe("what a change of an environment means", () => {
  test("AUT-25 a start fires what belongs to starts, the first one what belongs to the dev container too", () => {
    const walk = new Walk(fresh());
    walk.report({ machine: MachinePhase.STARTING });
    expect(walk.fired).toEqual([]);
    walk.report({ machine: MachinePhase.RUNNING, container: DevContainerPhase.CREATING, file: ContentPhase.CREATING });
    expect([walk.count("postMachineStart"), walk.fired.length]).toEqual([1, 1]);
    walk.report({ container: DevContainerPhase.RUNNING, file: ContentPhase.READY });
    expect([walk.count("postDevcontainerStart"), walk.count("postEnvironmentStart")]).toEqual([1, 1]);
    walk.report();
    expect(walk.fired).toHaveLength(3);
    walk.stop();
    walk.report({ machine: MachinePhase.STOPPED, container: DevContainerPhase.STOPPED });
    expect(walk.told).toEqual(["stop", "halt"]);
    walk.start("m2");
    walk.report({ machine: MachinePhase.RUNNING, container: DevContainerPhase.RUNNING, file: ContentPhase.READY });
    expect([walk.count("postMachineStart"), walk.count("postEnvironmentStart")]).toEqual([2, 2]);
    expect([walk.count("postDevcontainerStart"), walk.fired.length]).toEqual([1, 5]);
  });

  test("AUT-41 the environment runs before its file is applied; what waits for that fires once it is, or cannot be", () => {
    for (const end of [ContentPhase.READY, ContentPhase.FAILED]) {
      const walk = new Walk(fresh());
      walk.report({ file: ContentPhase.CREATING });
      walk.report({ file: ContentPhase.INITIALIZING });
      expect(walk.fired.map((each) => each.split(" ")[0])).toEqual(["postMachineStart"]);
      walk.report({ file: end });
      walk.report({ file: end });
      expect([walk.count("postDevcontainerStart"), walk.count("postEnvironmentStart"), walk.fired.length]).toEqual([
        1, 1, 3,
      ]);
      // Applied once more, it fires nothing.
      walk.change("automationsFile", "f2");
      walk.report({ file: ContentPhase.INITIALIZING });
      walk.report({ file: ContentPhase.READY });
      expect(walk.fired).toHaveLength(3);
      // One that ends before it is ready does not fire any more.
      const short = new Walk(fresh());
      short.report({ file: ContentPhase.CREATING });
      short.stop();
      short.report({ machine: MachinePhase.STOPPED, file: ContentPhase.READY });
      expect(short.count("postEnvironmentStart")).toBe(0);
    }
  });

  test("a rebuild stops what runs in the dev container and fires anew, also back to an earlier session; the start does not", () => {
    const walk = new Walk(fresh());
    walk.report();
    for (const session of ["d2", "d1"]) {
      walk.change("devcontainer", session);
      expect(walk.told.at(-1)).toBe("rebuild");
      walk.report({ container: DevContainerPhase.CREATING });
      walk.report({ container: DevContainerPhase.RUNNING });
      expect(walk.fired.at(-1)).toBe(`postDevcontainerStart ${session}`);
    }
    expect([
      walk.count("postDevcontainerStart"),
      walk.count("postEnvironmentStart"),
      walk.count("postMachineStart"),
    ]).toEqual([...[3, 1, 1]]);
    walk.change("devcontainer", "d3");
    walk.report({ container: DevContainerPhase.FAILED });
    expect(walk.count("postDevcontainerStart")).toBe(3);
  });

  test("a machine that is lost and comes back is another start", () => {
    const walk = new Walk(fresh());
    walk.report();
    walk.report({ machine: MachinePhase.STARTING });
    walk.report({ machine: MachinePhase.RUNNING });
    expect([walk.count("postMachineStart"), walk.count("postEnvironmentStart")]).toEqual([2, 2]);
    expect(walk.told).toEqual([]);
  });

  test("AUT-26 a filter lets only what it lists fire; a prebuild knows its own triggers alone, and only it does", () => {
    const names: TriggerName[] = [
      "manual",
      "postMachineStart",
      "postEnvironmentStart",
      "postDevcontainerStart",
      "prebuild",
      "beforeSnapshot",
    ];
    const admitted = (filter: TriggerName[], role = EnvironmentRole.DEFAULT) => {
      const state = fresh({ automationsFile: { triggerFilter: storedTriggers(filter) } }, role);
      return names.filter((name) => admitsTrigger(state, name));
    };
    expect(admitted([])).toEqual(["postMachineStart", "postEnvironmentStart", "postDevcontainerStart"]);
    expect(admitted(["prebuild"])).toEqual([]);
    expect(admitted(["postEnvironmentStart", "manual"])).toEqual(["postEnvironmentStart"]);
    expect(admitted(["postEnvironmentStart"], EnvironmentRole.PREBUILD)).toEqual(["prebuild", "beforeSnapshot"]);
    const prebuild = new Walk(fresh({}, EnvironmentRole.PREBUILD));
    prebuild.report();
    expect(prebuild.fired).toEqual(["prebuild "]);
    const filtered = new Walk(fresh({ automationsFile: { triggerFilter: storedTriggers(["prebuild"]) } }));
    filtered.report();
    expect(filtered.fired).toEqual([]);
  });

  test("a deletion stops, halts and ends; by force it only ends", () => {
    const walk = new Walk(fresh());
    walk.report();
    walk.delete(false);
    walk.report({ machine: MachinePhase.STOPPED });
    walk.report({ machine: MachinePhase.DELETED });
    expect(walk.told).toEqual(["stop", "halt", "end"]);
    const forced = new Walk(fresh());
    forced.report();
    forced.delete(true);
    expect(forced.told).toContain("end");
    const untouched = new Walk(fresh());
    untouched.stop();
    expect(untouched.told).toEqual(["stop", "halt"]);
  });
});
