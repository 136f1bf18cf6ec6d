import type { Dirent } from "node:fs";
import { stat } from "node:fs/promises";
import { join, relative } from "node:path";
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  FindRequest_FileType as FileType,
  type FindRequest,
  type FindResponseSchema,
} from "../../../gen/supervisor/v1/environmentopts_pb.js";
import { inBatches } from "./batches.ts";
import { errnoOf, invalidArgument } from "./errors.ts";
import { fileInfo, MAX_ENTRIES, sortedEntries } from "./files.ts";
import { fuzzyScorer, globMatcher } from "./patterns.ts";

// A search may start at `/`: it ends, truncated, when it has seen this much.
const MAX_VISITED = 500_000;
const MAX_MS = 20_000;
const MAX_PATTERN = 1024;

interface Match {
  path: string;
  isDirectory: boolean;
  score: number;
}

/** Zero or more; undefined for no match. */
type Score = (name: string, path: string) => number | undefined;

function scorer(pattern: string, fuzzy: boolean, start: string): Score {
  if (pattern === "") return () => 0;
  if (!fuzzy) {
    const matches = globMatcher(pattern);
    return (name) => (matches(name) ? 0 : undefined);
  }
  const score = fuzzyScorer(pattern);
  return (_name, path) => score(relative(start, path));
}

function hasType(entry: Dirent, type: FileType): boolean {
  if (type === FileType.FILE) return entry.isFile();
  if (type === FileType.DIRECTORY) return entry.isDirectory();
  return true;
}

/** Directories that may not be read or vanish while searching are passed over, except the start. */
async function entriesOf(directory: string, isStart: boolean, limit: number) {
  try {
    return await sortedEntries(directory, limit);
  } catch (error) {
    if (isStart || errnoOf(error) === undefined) throw error;
    return { entries: [], more: false };
  }
}

/** Searches below a directory, by path or, for a fuzzy search, by score. Links are reported, not followed. */
export async function find(
  { pattern, type, maxDepth, fuzzy }: FindRequest,
  start: string,
): Promise<MessageInitShape<typeof FindResponseSchema>> {
  if (maxDepth < 0) throw invalidArgument("max_depth is negative");
  if (FileType[type] === undefined) throw invalidArgument(`unknown file type ${type}`);
  if (pattern.length > MAX_PATTERN) throw invalidArgument(`pattern is longer than ${MAX_PATTERN} characters`);
  if (!(await stat(start)).isDirectory()) throw invalidArgument(`${start} is not a directory`);
  const score = scorer(pattern, fuzzy, start);
  const deadline = Date.now() + MAX_MS;
  const matches: Match[] = [];
  const pending = [{ directory: start, depth: 1 }];
  let visited = 0;
  let truncated = false;
  for (let next = pending.pop(); next; next = pending.pop()) {
    const { directory, depth } = next;
    const { entries, more } = await entriesOf(directory, directory === start, MAX_VISITED - visited);
    visited += entries.length;
    truncated ||= more;
    for (const entry of entries) {
      if (entry.name === ".git") continue;
      const path = join(directory, entry.name);
      const points = hasType(entry, type) ? score(entry.name, path) : undefined;
      if (points !== undefined) matches.push({ path, isDirectory: entry.isDirectory(), score: points });
    }
    const below = maxDepth === 0 || depth < maxDepth ? entries.filter(isSearched) : [];
    for (const entry of below.reverse()) pending.push({ directory: join(directory, entry.name), depth: depth + 1 });
    const full = !fuzzy && matches.length > MAX_ENTRIES;
    if (full || ((visited >= MAX_VISITED || Date.now() > deadline) && pending.length > 0)) {
      truncated = true;
      break;
    }
  }
  matches.sort((a, b) => b.score - a.score || (a.path < b.path ? -1 : 1));
  const kept = matches.slice(0, MAX_ENTRIES);
  const files = await inBatches(kept, ({ path, isDirectory }) => fileInfo(path, isDirectory));
  return { files, truncated: truncated || kept.length < matches.length };
}

const isSearched = (entry: Dirent) => entry.isDirectory() && entry.name !== ".git";
