import { ResourceRole } from "../../gen/gitpod/v1/group_pb.js";
import { Principal } from "../../gen/gitpod/v1/identity_pb.js";
import { OrganizationRole } from "../../gen/gitpod/v1/organization_pb.js";
import { UserStatus } from "../../gen/gitpod/v1/user_pb.js";
import type { Caller } from "../domain/principal.ts";
import { TokenKind, tokenHash, tokenKind } from "../domain/tokens.ts";
import { union } from "./conditions.ts";
import type { Fragment, Sql } from "./db.ts";
import { assemble, pieces, run, type Statement } from "./statement.ts";

// Who calls is asked on every call, so each kind of token has a statement that looks only where its owners are.

type Subject = Exclude<Principal, typeof Principal.UNSPECIFIED | typeof Principal.RUNNER_MANAGER>;

/** Kinds that the public API takes as a credential, with those that have them. */
const API_KINDS: Partial<Record<TokenKind, readonly Subject[]>> = {
  [TokenKind.PERSONAL_ACCESS]: [Principal.USER],
  [TokenKind.SERVICE_ACCOUNT]: [Principal.SERVICE_ACCOUNT],
  [TokenKind.SERVICE_ACCOUNT_ACCESS]: [Principal.SERVICE_ACCOUNT],
  [TokenKind.RUNNER_ACCESS]: [Principal.RUNNER],
  [TokenKind.ENVIRONMENT]: [Principal.ENVIRONMENT],
};

/** Kinds that come as the cookie of a browser. */
const COOKIE_KINDS: typeof API_KINDS = { [TokenKind.SESSION]: [Principal.USER, Principal.ACCOUNT] };

interface CallerRow {
  token_id: string;
  kind: TokenKind;
  organization_id: string | null;
  subject_id: string;
  subject_principal: Principal;
  read_only: boolean;
  issuer_id: string | null;
  expired: boolean;
  stale: boolean;
  org_roles: number[];
  alive: boolean;
  org_admin: boolean;
  account_id: string | null;
  runner_id: string | null;
  creator_id: string | null;
  project_id: string | null;
  name: string;
  email: string;
}

/** What a credential turned out to be. */
export type Credential =
  | {
      state: "ok";
      caller: Caller;
      /** `last_used_at` is over a minute old. */
      stale: boolean;
      /** What was read for this caller along with its credential; absent if nothing was. */
      beside?: object;
    }
  | { state: "expired" | "unknown" };

type Value = string | readonly string[] | null;

/**
 * A query for at most one row that a caller wants next, by some values of its request, to be read along with the
 * credential. Its columns must have names that those of credentials have not; all of them are null if there is no row.
 */
export type BesideQuery<Values extends readonly Value[]> = (
  sql: Sql,
  caller: Caller,
  values: Values,
  now: Date,
) => Fragment;

export interface Beside {
  query: BesideQuery<never>;
  values: readonly Value[];
}

/** Where the owners of credentials are, and what is told of them there; with columns in the same order for each kind. */
const OWNERS: Record<Subject, (sql: Sql, now: Date) => { columns: Fragment; from: Fragment }> = {
  [Principal.USER]: (sql) => ({
    columns: sql`u.status = ${UserStatus.ACTIVE} as alive, u.role = ${OrganizationRole.ADMIN} as org_admin,
      a.id as account_id, null::uuid as runner_id, null::uuid as creator_id, null::uuid as project_id,
      coalesce(a.name, '') as name, coalesce(a.email, '') as email`,
    from: sql`users u on u.id = t.subject_id left join accounts a on a.id = u.account_id`,
  }),
  [Principal.ACCOUNT]: (sql) => ({
    columns: sql`true as alive, false as org_admin, a.id as account_id, null::uuid as runner_id, null::uuid as creator_id,
      null::uuid as project_id, a.name, a.email`,
    from: sql`accounts a on a.id = t.subject_id`,
  }),
  [Principal.SERVICE_ACCOUNT]: (sql, now) => ({
    columns: sql`not s.suspended and coalesce(s.valid_until > ${now}, true) as alive, false as org_admin,
      null::uuid as account_id, null::uuid as runner_id, null::uuid as creator_id, null::uuid as project_id, s.name, '' as email`,
    from: sql`service_accounts s on s.id = t.subject_id`,
  }),
  [Principal.RUNNER]: (sql) => ({
    columns: sql`r.deleted_at is null as alive, false as org_admin, null::uuid as account_id, r.id as runner_id,
      null::uuid as creator_id, null::uuid as project_id, r.name, '' as email`,
    from: sql`runners r on r.id = t.subject_id`,
  }),
  [Principal.ENVIRONMENT]: (sql) => ({
    columns: sql`e.deleted_at is null as alive, false as org_admin, null::uuid as account_id, e.runner_id, e.creator_id,
      e.project_id, '' as name, '' as email`,
    from: sql`environments e on e.id = t.subject_id`,
  }),
};
const SUBJECTS = Object.keys(OWNERS).map(Number) as Subject[];

/** Credentials with the state of their owners, and the organization-wide roles that they bring. */
function credentials(sql: Sql, subjects: readonly Subject[], which: Fragment, now: Date): Fragment {
  const [query, ...queries] = subjects.map((subject) => {
    const { columns, from } = OWNERS[subject](sql, now);
    return sql`
      select t.id as token_id, t.kind, t.organization_id, t.subject_id, t.subject_principal, t.read_only, t.issuer_id,
        coalesce(t.expires_at <= ${now}, false)
          or coalesce(coalesce(t.last_used_at, t.created_at) + t.idle_seconds * interval '1 second' <= ${now}, false) as expired,
        coalesce(t.last_used_at < ${now}::timestamptz - interval '1 minute', true) as stale,
        array(select share.resource_role from group_members member
          join role_assignments share on share.group_id = member.group_id
          where member.member_id = t.subject_id and share.resource_id = t.organization_id) as org_roles,
        ${columns}
      from tokens t join ${from} where t.subject_principal = ${subject} and ${which}`;
  });
  return union(sql, [query!, ...queries]);
}

function toCaller(row: CallerRow): Caller {
  return {
    principal: row.subject_principal,
    id: row.subject_id,
    organizationId: row.organization_id ?? "",
    accountId: row.account_id ?? "",
    orgAdmin: row.org_admin || row.org_roles.includes(ResourceRole.ORG_ADMIN),
    runnersAdmin: row.org_roles.includes(ResourceRole.ORG_RUNNERS_ADMIN),
    projectsAdmin: row.org_roles.includes(ResourceRole.ORG_PROJECTS_ADMIN),
    groupsAdmin: row.org_roles.includes(ResourceRole.ORG_GROUPS_ADMIN),
    environmentsReader: row.org_roles.includes(ResourceRole.ORG_ENVIRONMENTS_READER),
    auditReader: row.org_roles.includes(ResourceRole.ORG_AUDIT_LOG_READER),
    tokenKind: row.kind,
    tokenId: row.token_id,
    issuerId: row.issuer_id ?? undefined,
    readOnly: row.read_only,
    runnerId: row.runner_id ?? "",
    creatorId: row.creator_id ?? "",
    projectId: row.project_id ?? "",
    name: row.name,
    email: row.email,
  };
}

function toCredential(row: CallerRow | undefined): Credential {
  if (!row?.alive) return { state: "unknown" };
  if (row.expired) return { state: "expired" };
  return { state: "ok", stale: row.stale, caller: toCaller(row) };
}

/** The query for a token of one of these kinds; undefined if the text is none. */
function queryFor(sql: Sql, kinds: typeof API_KINDS, text: string, hash: Uint8Array, now: Date): Fragment | undefined {
  const kind = tokenKind(text);
  const subjects = kind && kinds[kind];
  return subjects && credentials(sql, subjects, sql`t.hash = ${hash} and t.kind = ${kind}`, now);
}

async function findCredential(sql: Sql, kinds: typeof API_KINDS, text: string, now: Date): Promise<Credential> {
  const query = queryFor(pieces, kinds, text, tokenHash(text), now);
  if (!query) return { state: "unknown" };
  const [row] = await run<CallerRow>(sql, assemble(query));
  return toCredential(row);
}

/**
 * Looks an API credential up, with the state of its owner and the organization-wide roles that it brings, in one
 * round trip. It runs on every call, so a revocation counts from its commit on.
 */
export const findCaller = (sql: Sql, text: string, now: Date): Promise<Credential> =>
  findCredential(sql, API_KINDS, text, now);

/** As `findCaller`, for what a browser brings in its cookie. */
export const findSession = (sql: Sql, text: string, now: Date): Promise<Credential> =>
  findCredential(sql, COOKIE_KINDS, text, now);

const MAX_GUESSES = 1000;

const isSame = (one: Caller, other: Caller) =>
  (Object.keys(one) as (keyof Caller)[]).every((name) => one[name] === other[name]);

// Stand in statements for what differs from call to call.
const NOW = new Date(0);
const PLACES: readonly Value[] = Array.from({ length: 4 }, (_each, index) => new String(index) as string);

function filledIn({ text, parameters }: Statement, now: Date, values: readonly Value[] = []): Statement {
  const filled = parameters.map((each) => {
    if (each === NOW) return now;
    const place = each instanceof String ? PLACES.indexOf(each as string) : -1;
    return place < 0 ? each : values[place];
  });
  return { text, parameters: filled };
}

/** For whom a token stood last, with the statements that look it up again. */
class Guess {
  readonly caller: Caller;
  readonly #lookUp: Fragment;
  readonly #statement: Statement;
  readonly #withBeside = new Map<Beside["query"], Statement>();

  constructor(caller: Caller, lookUp: Fragment) {
    this.caller = caller;
    this.#lookUp = lookUp;
    this.#statement = assemble(lookUp);
  }

  statement(beside: Beside | undefined, now: Date): Statement {
    if (!beside) return filledIn(this.#statement, now);
    const known = this.#withBeside.get(beside.query);
    if (known) return filledIn(known, now, beside.values);
    const places = PLACES.slice(0, beside.values.length);
    const query = beside.query(pieces, this.caller, places as never, NOW);
    const made = assemble(
      // The later of two columns of one name counts.
      pieces`select beside.*, credential.* from (${this.#lookUp}) credential left join lateral (${query}) beside on true`,
    );
    this.#withBeside.set(beside.query, made);
    return filledIn(made, now, beside.values);
  }
}

/**
 * Looks API credentials up together with what their callers want to read. Who may read what depends on the caller, so a
 * credential is taken to stand for whom it stood for last. That is a guess and nothing else: the same statement, and so
 * the same moment, tells who the caller is, and if that is anybody or anything else, what was read is thrown away.
 */
export class CallerGuesses {
  readonly #guesses = new Map<string, Guess>();

  /** As `findCaller`; `wanted` is asked for what to read only where there is a guess to read it for. */
  async find(sql: Sql, text: string, now: Date, wanted: () => Promise<Beside | undefined>): Promise<Credential> {
    const hash = tokenHash(text);
    const key = Buffer.from(hash).toString("latin1");
    const guess = this.#guesses.get(key);
    if (!guess) return this.#findFirst(sql, text, hash, now, key);
    const beside = await wanted();
    const [row] = await run<CallerRow>(sql, guess.statement(beside, now));
    const credential = toCredential(row);
    const isRight = credential.state === "ok" && isSame(guess.caller, credential.caller);
    this.#guesses.delete(key);
    if (isRight) this.#guesses.set(key, guess);
    return isRight && beside ? { ...credential, beside: row } : credential;
  }

  async #findFirst(sql: Sql, text: string, hash: Uint8Array, now: Date, key: string): Promise<Credential> {
    const query = queryFor(pieces, API_KINDS, text, hash, NOW);
    if (!query) return { state: "unknown" };
    const [row] = await run<CallerRow>(sql, filledIn(assemble(query), now));
    const credential = toCredential(row);
    if (credential.state === "ok") this.#guesses.set(key, new Guess(credential.caller, query));
    if (this.#guesses.size > MAX_GUESSES) this.#guesses.delete(this.#guesses.keys().next().value ?? "");
    return credential;
  }
}

/**
 * The callers behind open streams as they are now, with the roles of this moment, by the id of their credential; those
 * whose credential opens nothing any more are missing.
 */
export async function refreshCallers(
  sql: Sql,
  callers: readonly Caller[],
  now: Date,
): Promise<ReadonlyMap<string, Caller>> {
  const ids = [...new Set(callers.map((caller) => caller.tokenId))];
  const rows = await run<CallerRow>(sql, assemble(credentials(pieces, SUBJECTS, pieces`t.id = any(${ids})`, now)));
  return new Map(rows.filter((row) => row.alive && !row.expired).map((row) => [row.token_id, toCaller(row)]));
}

/** As `refreshCallers`, for one. */
export async function refreshCaller(sql: Sql, caller: Caller, now: Date): Promise<Caller | undefined> {
  return (await refreshCallers(sql, [caller], now)).get(caller.tokenId);
}

/** Marks a token as used, at most once a minute, however many calls see at once that it is time. */
export async function touchToken(sql: Sql, tokenId: string, now: Date): Promise<void> {
  await sql`update tokens set last_used_at = ${now} where id = ${tokenId}
    and coalesce(last_used_at < ${now}::timestamptz - interval '1 minute', true)`;
}
