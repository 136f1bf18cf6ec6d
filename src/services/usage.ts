import { timestampMs } from "@bufbuild/protobuf/wkt";
import type { ServiceImpl } from "@connectrpc/connect";
import type { GetTopProjectsRequest, UsageService } from "../../gen/gitpod/v1/usage_pb.js";
import type { App } from "../app.ts";
import { invalid, notFound } from "../domain/errors.ts";
import { closePage, openPage } from "../domain/pages.ts";
import type { Caller } from "../domain/principal.ts";
import { principal } from "../rpc/authenticate.ts";
import { type ProjectRuntime, projectRuntimes } from "../store/project-usage.ts";

const MAX_RANGE_MS = 366 * 24 * 60 * 60_000;

/** The range that a request asks for, in milliseconds. */
function requestedRange({ dateRange }: GetTopProjectsRequest): { start: number; end: number } {
  const start = dateRange?.startTime ? timestampMs(dateRange.startTime) : 0;
  const end = dateRange?.endTime ? timestampMs(dateRange.endTime) : 0;
  if (start >= end) throw invalid({ field: "date_range.end_time", message: "must be after start_time" });
  if (end - start > MAX_RANGE_MS) throw invalid({ field: "date_range", message: "must be at most 366 days" });
  return { start, end };
}

/**
 * Where a page goes on. What runs adds to its total all the time, so all pages look at the moment of the first one, which
 * travels with the position.
 */
function readPosition(after: string): { asOf: number; last: Pick<ProjectRuntime, "id" | "seconds"> } | undefined {
  if (!after) return undefined;
  const [asOf = "", seconds = "", id = ""] = after.split("/");
  return { asOf: Number(asOf), last: { seconds: Number(seconds), id } };
}

async function topProjects(app: App, caller: Caller, request: GetTopProjectsRequest) {
  if (request.teamId) throw notFound("team", request.teamId);
  const { start, end } = requestedRange(request);
  const page = openPage(request.pagination, ["top projects", caller.id, start, end]);
  const position = readPosition(page.after);
  const asOf = position?.asOf ?? app.now().getTime();
  const range = { start: new Date(start), end: new Date(Math.min(end, asOf)) };
  const rows = await projectRuntimes(app.db.list, caller, range, position?.last, page.limit);
  const { items, nextToken } = closePage(page, rows, ({ id, seconds }) => `${asOf}/${seconds}/${id}`);
  const projects = items.map(({ id, name, seconds }) => ({
    ...{ projectId: id, projectName: name, totalRuntimeSeconds: BigInt(seconds) },
  }));
  return { projects, pagination: { nextToken } };
}

/** UsageService. */
export function usageService(app: App): ServiceImpl<typeof UsageService> {
  return { getTopProjects: (request, context) => topProjects(app, principal(context), request) };
}
