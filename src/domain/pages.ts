import { createHash } from "node:crypto";
import { create } from "@bufbuild/protobuf";
import { type CountResponse, CountResponseRelation, CountResponseSchema } from "../../gen/gitpod/v1/count_pb.js";
import type { PaginationRequest } from "../../gen/gitpod/v1/pagination_pb.js";
import { invalid } from "./errors.ts";

const DEFAULT_PAGE_SIZE = 25;
const MAX_PAGE_SIZE = 100;
const DIGEST_BYTES = 12;

/** A page to read: `limit` rows after `after`, the sort key of the last row of the page before. */
export interface Page {
  limit: number;
  /** Keyset position, empty on the first page. */
  after: string;
  /** Binds tokens to caller, filter and sort. */
  binding: string;
}

function digest(binding: string, after: string): string {
  return createHash("sha256")
    .update(binding)
    .update("\0")
    .update(after)
    .digest()
    .subarray(0, DIGEST_BYTES)
    .toString("base64url");
}

/**
 * Reads a page request. `binding` is anything that must not change between pages, usually caller, filter and sort.
 * INVALID_ARGUMENT for a token that is malformed or was issued for something else.
 */
export function openPage(request: PaginationRequest | undefined, binding: unknown): Page {
  const bound = JSON.stringify(binding, (_key, value) => (typeof value === "bigint" ? `${value}n` : value));
  const size = request?.pageSize ?? 0;
  if (size < 0 || size > MAX_PAGE_SIZE)
    throw invalid({ field: "pagination.page_size", message: `must be between 0 and ${MAX_PAGE_SIZE}` });
  const page = { limit: size || DEFAULT_PAGE_SIZE, after: "", binding: bound };
  if (!request?.token) return page;
  const [mark = "", position = "", extra] = request.token.split(".");
  const after = Buffer.from(position, "base64url").toString();
  const isCanonical = Buffer.from(after).toString("base64url") === position;
  if (extra !== undefined || !after || !isCanonical || mark !== digest(bound, after)) {
    throw invalid({ field: "pagination.token", message: "is malformed or belongs to another request" });
  }
  return { ...page, after };
}

/**
 * Cuts the extra row that was fetched and says where the next page starts; a token exists only if that row did, or if
 * more rows follow for another reason.
 */
export function closePage<T>(
  page: Page,
  rows: readonly T[],
  key: (row: T) => string,
  isCut = false,
): { items: T[]; nextToken: string } {
  const items = rows.slice(0, page.limit);
  const last = items.at(-1);
  if ((rows.length <= page.limit && !isCut) || last === undefined) return { items, nextToken: "" };
  const after = key(last);
  return { items, nextToken: `${digest(page.binding, after)}.${Buffer.from(after).toString("base64url")}` };
}

/** Most that a list counts to. */
export const COUNT_CAP = 1000;

/** A count of at most `COUNT_CAP + 1` matches as an answer: exact up to the cap, above it "at least". */
export const countAnswer = (total: number): CountResponse =>
  create(CountResponseSchema, {
    value: Math.min(total, COUNT_CAP),
    relation: total > COUNT_CAP ? CountResponseRelation.GTE : CountResponseRelation.EQ,
  });
