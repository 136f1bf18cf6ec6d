import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { type UserPreference, UserPreferenceSchema } from "../../gen/gitpod/v1/user_pb.js";
import type { Page } from "../domain/pages.ts";
import type { Sql, Tx } from "./db.ts";

interface PreferenceRow {
  id: string;
  key: string;
  value: string;
  created_at: Date;
  updated_at: Date;
}

const columns = (sql: Sql | Tx) => sql`id, key, value, created_at, updated_at`;

const toPreference = (row: PreferenceRow): UserPreference =>
  create(UserPreferenceSchema, {
    id: row.id,
    key: row.key,
    value: row.value,
    createdAt: timestampFromDate(row.created_at),
    updatedAt: timestampFromDate(row.updated_at),
  });

/** A user's preference by id or by key. */
export async function findPreference(
  sql: Sql | Tx,
  userId: string,
  which: { id: string } | { key: string },
): Promise<UserPreference | undefined> {
  const condition = "id" in which ? sql`id = ${which.id}` : sql`key = ${which.key}`;
  const [row] = await sql<PreferenceRow[]>`
    select ${columns(sql)} from user_preferences where user_id = ${userId} and ${condition}`;
  return row && toPreference(row);
}

/** A user's preferences, newest first, one more than the page holds. */
export async function listPreferences(sql: Sql, userId: string, page: Page): Promise<UserPreference[]> {
  const rows = await sql<PreferenceRow[]>`
    select ${columns(sql)} from user_preferences
    where user_id = ${userId} and ${page.after ? sql`id < ${page.after}` : sql`true`}
    order by id desc limit ${page.limit + 1}`;
  return rows.map(toPreference);
}

export async function countPreferences(tx: Tx, userId: string): Promise<number> {
  const [row] = await tx<{ count: number }[]>`
    select count(*)::int as count from user_preferences where user_id = ${userId}`;
  return row?.count ?? 0;
}

export async function insertPreference(
  tx: Tx,
  preference: { id: string; userId: string; key: string; value: string; at: Date },
): Promise<void> {
  const { id, userId, key, value, at } = preference;
  await tx`insert into user_preferences (id, user_id, key, value, created_at, updated_at)
    values (${id}, ${userId}, ${key}, ${value}, ${at}, ${at})`;
}

export async function changePreference(tx: Tx, id: string, value: string, at: Date): Promise<void> {
  await tx`update user_preferences set value = ${value}, updated_at = ${at} where id = ${id}`;
}

/** False if the user has no such preference. */
export async function deletePreference(tx: Tx, userId: string, id: string): Promise<boolean> {
  const { count } = await tx`delete from user_preferences where id = ${id} and user_id = ${userId}`;
  return count > 0;
}
