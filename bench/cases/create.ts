import { EnvironmentService } from "../../gen/gitpod/v1/environment_pb.js";
import { AuditLogEntryKind, ResourceOperation, ResourceType } from "../../gen/gitpod/v1/event_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import type { Bench } from "../bench.ts";
import { callOf } from "../calls.ts";
import { interleavedWarm, medianOf, ratioOf } from "../measure.ts";
import type { Goal, Row } from "../report.ts";
import { sqlGenerator } from "../sql-load.ts";
import { environmentRequest, type Person, type Place, type Stage } from "../stage.ts";

const CLIENTS = 16;
const PLACES = 8;
const FLOOR_TRANSACTIONS = 60;

/** Row, audit entry and outbox in one statement, without anything to decide before. */
function floorStatement({ environment }: Stage, { id }: Person, { runnerId }: Place): string {
  const template = `from environments where id = '${environment.id}'`;
  return `
    with made as (
      insert into environments (id, organization_id, creator_id, creator_principal, runner_id, class_id, session_id, role, phase,
        desired_phase, admission, created_at, search, metadata, spec, status, facts)
      select uuidv7(), organization_id, '${id}', creator_principal, '${runnerId}', class_id, session_id, role, phase,
        desired_phase, admission, now(), search, metadata, spec, status, facts ${template}
      returning id, organization_id, creator_id, runner_id
    ), event as (
      insert into events (organization_id, environment_id, runner_id, resource_type, resource_id, operation, creator_id, created_at)
      select organization_id, id, runner_id, ${ResourceType.ENVIRONMENT}, id, ${ResourceOperation.CREATE}, creator_id, now() from made
    )
    insert into audit_log (id, organization_id, actor_id, actor_principal, subject_id, subject_type, kind, action, created_at)
    select uuidv7(), organization_id, creator_id, ${Principal.USER}, id, ${ResourceType.ENVIRONMENT},
      ${AuditLogEntryKind.RESOURCE_CHANGE}, 'Environment created', now() from made`.replaceAll(/\s+/g, " ");
}

/** Environments created, a second: by the RPC, by the store alone, and by a statement that writes the least. */
export async function create(bench: Bench): Promise<Row[]> {
  const stage = await bench.stage();
  const people = await stage.people(PLACES);
  const places = await stage.places(PLACES);
  const [somebody, somewhere] = [people[0]!, places[0]!];
  const statement = floorStatement(stage, somebody, somewhere);
  const sql = await sqlGenerator(stage.databaseUrl);
  bench.after(() => sql.stop());
  const creatorIds = people.map((each) => each.id);
  const classIds = places.map((each) => each.classId);
  // People have few environments; without this every creation would count more of them than the one before.
  const cleared = async (rate: Promise<number>) => {
    const perSecond = await rate;
    await stage.db.write`delete from environments where creator_id = any(${creatorIds})`;
    await stage.db.write`vacuum environments`;
    return perSecond;
  };
  const calls = async (spread: number) => {
    const clients = CLIENTS / spread;
    const rates = people.slice(0, spread).map(({ token }, index) => {
      const message = environmentRequest(places[index]?.classId ?? "");
      const options = { format: "connect", token, clients, ms: bench.ms } as const;
      return bench.generator.run(callOf(stage.url, EnvironmentService.method.createEnvironment, message, options));
    });
    return (await Promise.all(rates)).reduce((sum, { perSecond }) => sum + perSecond, 0);
  };
  const insertion = { templateId: stage.environment.id, clients: CLIENTS, ms: bench.ms };
  const rounds = await interleavedWarm<"floor" | "insert" | "spread" | "same", number>(bench.rounds, {
    floor: () => cleared(sql.run({ statement, clients: CLIENTS, transactions: FLOOR_TRANSACTIONS })),
    insert: () => cleared(stage.plane.call("insert", { ...insertion, creatorIds, classIds })),
    spread: () => cleared(calls(PLACES)),
    same: () => cleared(calls(1)),
  });
  await stage.checkCalls();
  const row = (operation: string, rates: number[], note: string, goal?: Goal): Row => ({
    ...{ operation, unit: "/s", goal, note },
    floor: medianOf(rounds.floor, Number),
    figure: medianOf(rates, Number),
    ratio: ratioOf(rates, rounds.floor, Number),
  });
  return [
    row(
      `insert of the store, 16 at once, ${PLACES} runners`,
      rounds.insert,
      `floor: ${sql.name}, row + audit + event`,
      {
        bound: ">=",
        value: 0.5,
      },
    ),
    row(`CreateEnvironment, 16 at once, ${PLACES} people and runners`, rounds.spread, "the same floor", {
      bound: ">=",
      value: 0.3,
    }),
    row(
      "CreateEnvironment, 16 at once, one person, one runner",
      rounds.same,
      "quota and capacity are exact: one by one",
    ),
  ];
}
