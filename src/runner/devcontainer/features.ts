import { copyFile, mkdir, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { CommandTimeout, runCommand } from "../commands.ts";
import { type ContainerEngine, EngineError, type EngineWork } from "../containers/engine.ts";
import { makeFolder, removeTree } from "../files.ts";
import { lineBatches } from "../supervisor/automation/line-log.ts";
import { gate } from "../supervisor/gate.ts";
import type { ContainerPlan } from "./plan.ts";

// Features are installed by the dev container CLI, which gets nothing of a repository but their names and options: it
// works in a folder of the runner's, on an image that is there already. What it builds is run like any other image.

/** What it is built from, and for whom. */
export interface FeatureWork extends EngineWork {
  engine: ContainerEngine;
  labels: Readonly<Record<string, string>>;
  scratch: string;
}

const CLI = join(dirname(createRequire(import.meta.url).resolve("@devcontainers/cli/package.json")), "devcontainer.js");
/** Image in which the CLI puts features for builders without BuildKit. */
const CONTENT_IMAGE = "dev_container_feature_content_temp";
// That image has one name for all of them.
const inTurn = gate(1, 1000);
const MAX_OUTPUT = 64 * 1024;
const MESSAGE_CHARACTERS = 300;

/** Builds an image `tag` of a base with features. Throws with a text for people if they cannot be installed. */
export async function addFeatures(work: FeatureWork, plan: ContainerPlan, base: string, tag: string): Promise<void> {
  await inTurn(async () => {
    work.signal?.throwIfAborted();
    await removeTree(work.scratch);
    makeFolder(work.scratch, 0o700);
    try {
      await install(work, plan, base, tag);
    } finally {
      await removeTree(work.scratch);
      await work.engine.removeImage(CONTENT_IMAGE).catch(() => undefined);
    }
  });
}

async function install(work: FeatureWork, plan: ContainerPlan, base: string, tag: string): Promise<void> {
  const { engine, labels, scratch, timeoutMs, signal, onLines, loginFolder } = work;
  const folders = {
    workspace: join(scratch, "workspace"),
    temporary: join(scratch, "tmp"),
    home: join(scratch, "home"),
  };
  for (const folder of Object.values(folders)) await mkdir(folder);
  if (loginFolder) await copyFile(join(loginFolder, "config.json"), join(folders.home, "config.json"));
  const { features, featureOrder, user } = plan;
  const order = featureOrder.length > 0 && { overrideFeatureInstallOrder: featureOrder };
  const file = { image: base, features, ...order, ...(user && { remoteUser: user }) };
  await writeFile(join(folders.workspace, ".devcontainer.json"), JSON.stringify(file));
  const lines = lineBatches((batch) => {
    if (batch.length > 0) onLines(batch);
  });
  const options = ["--workspace-folder", folders.workspace, "--image-name", tag, "--docker-path", engine.name];
  const args = [
    ...[CLI, "build", ...options, "--no-lockfile", "--oci-auth-hardening"],
    ...Object.entries(labels).flatMap(([name, value]) => ["--label", `${name}=${value}`]),
  ];
  const { home, temporary } = folders;
  const env = { ...engine.environment, HOME: home, TMPDIR: temporary, DOCKER_CONFIG: home };
  const { code, stdout } = await runCommand(process.execPath, args, {
    ...{ env, timeoutMs, onOutput: lines.write, maxOutput: MAX_OUTPUT },
    ...(signal && { signal }),
  }).catch((error: unknown) => {
    if (error instanceof CommandTimeout) throw new EngineError("they were not installed in time");
    throw error;
  });
  lines.end();
  if (code !== 0) throw new Error(`features could not be installed: ${problemOf(stdout)}`);
}

/** What the CLI says at the end: one line of JSON. */
function problemOf(stdout: string): string {
  try {
    const { message, description } = JSON.parse(stdout.trim().split("\n").at(-1) ?? "") as Record<string, string>;
    // The message quotes the whole command line; the log says why.
    return (message?.startsWith("Command failed:") ? "" : message?.slice(0, MESSAGE_CHARACTERS)) || `${description}`;
  } catch {
    return "see the log";
  }
}
