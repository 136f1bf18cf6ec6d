import { create, type DescMethod, type Message } from "@bufbuild/protobuf";
import { type PaginationRequest, PaginationRequestSchema } from "../../gen/gitpod/v1/pagination_pb.js";
import { invalid } from "../domain/errors.ts";

const WHOLE_NUMBER = /^-?\d{1,9}$/;

/**
 * REST-style clients page by the URL of a POST, `?token=&pageSize=`, and leave the body as it was: what is given there
 * replaces what the message says. Throws a Refusal for a page size that is no number.
 */
export function applyPagingQuery(method: DescMethod, message: Message, url: string): void {
  const start = url.indexOf("?");
  if (start < 0 || method.input.field.pagination?.message?.typeName !== PaginationRequestSchema.typeName) return;
  const query = new URLSearchParams(url.slice(start));
  const token = query.get("token");
  const pageSize = query.get("pageSize");
  if (!token && !pageSize) return;
  const target = message as Message & { pagination?: PaginationRequest };
  target.pagination ??= create(PaginationRequestSchema);
  if (token) target.pagination.token = token;
  if (!pageSize) return;
  if (!WHOLE_NUMBER.test(pageSize)) throw invalid({ field: "pagination.page_size", message: "must be a whole number" });
  target.pagination.pageSize = Number(pageSize);
}
