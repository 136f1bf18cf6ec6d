import type { JsonValue } from "@bufbuild/protobuf";

// The conversation between a runner and the supervisor of one environment about services and executions: lines of JSON
// in both directions on one connection, which the runner opens. Whoever connects anew hears everything again.

/** What a runner says. */
export type ToSupervisor =
  | { type: "facts"; logBase: string; logDays: number; isReady: boolean }
  | { type: "begin" }
  | { type: "service"; service: JsonValue; startedBy: string }
  | { type: "execution"; execution: JsonValue; firingId: string; startedBy: string }
  /** Everything since `begin` is all that there is. */
  | { type: "end" }
  | { type: "remove"; id: string }
  | { type: "secrets"; ask: number; values?: Record<string, string> }
  /** What an engine says while a container is on its way. */
  | { type: "container-output"; ask: number; text: string }
  /** A container waits for its command; or why there is none. */
  | { type: "container"; ask: number; pid: number; shared: string; problem: string };

/** What a supervisor says. */
export type ToRunner =
  | { type: "service"; id: string; status: JsonValue }
  | { type: "execution"; id: string; status: JsonValue; startedAt?: number; completedAt?: number }
  | { type: "secrets"; ask: number; ids: string[] }
  | { type: "container-start"; ask: number; run: string; image: string }
  | { type: "container-exec"; ask: number; run: string; part: string; mark: string }
  | { type: "container-remove"; run: string }
  /** No other containers than those of these runs are in use. */
  | { type: "containers"; runs: string[] };
