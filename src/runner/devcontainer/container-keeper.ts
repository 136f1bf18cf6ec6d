import { EnvironmentStatus_DevContainer_Phase as DevContainerPhase } from "../../../gen/gitpod/v1/environment_pb.js";
import { type EnvironmentSite, textOf } from "../site.ts";
import { isWornOut, LOST_TOO_OFTEN, recentRestarts } from "../supervision.ts";
import type { SupervisorState } from "../supervisor/private-http.ts";
import { findContainer, startContainer } from "./container.ts";
import { discardContainer } from "./container-work.ts";

// Keeps the container of a dev container that has been applied.

const isApplied = ({ record, status }: EnvironmentSite) =>
  record.container !== undefined && status.devcontainer?.phase === DevContainerPhase.RUNNING;

/** Takes over the container that an earlier runner process left. */
export async function adoptContainer(site: EnvironmentSite): Promise<boolean> {
  const { container } = site.record;
  const engine = container && (await site.host.engines.find());
  const found = engine && (await findContainer(site, engine, container));
  if (found) site.container.use(found);
  return found !== undefined;
}

/**
 * Looks after the container of an environment, and brings back one that is gone. One that goes again and again has
 * failed, and so has its dev container.
 */
export async function keepContainer(
  site: EnvironmentSite,
  onState: (state: SupervisorState) => void,
  signal: AbortSignal,
): Promise<void> {
  if (!isApplied(site) || (await site.container.isPresent(onState)) || (await adoptContainer(site))) return;
  const { container } = site.record;
  if (!container) return;
  const { isNews, isLost } = site.container.missed();
  const now = Date.now();
  if (isNews) {
    site.host.log.warn({ environmentId: site.id }, "the container of an environment is gone");
    if (isWornOut(container.restarts, now)) return await failed(site, LOST_TOO_OFTEN.replace("machine", "container"));
    const restarts = [...recentRestarts(container.restarts, now), now];
    await site.edit((record) => {
      record.container = { ...container, restarts };
    });
  }
  try {
    const engine = await site.host.engines.find();
    if (!engine) throw new Error(`no container engine answers: ${site.host.engines.problem}`);
    const { supervisor, id } = await startContainer(site, engine, container, signal);
    site.container.use(supervisor);
    await site.edit(({ status }) => {
      if (status.devcontainer) status.devcontainer.containerId = id;
    });
    site.log.write("The container was gone and has been started again");
  } catch (error) {
    signal.throwIfAborted();
    site.host.log.warn({ environmentId: site.id, error: textOf(error) }, "a container could not be started again");
    if (isLost) await failed(site, `the container is gone and could not be started again: ${textOf(error)}`);
  }
}

async function failed(site: EnvironmentSite, failureMessage: string): Promise<void> {
  site.log.write(failureMessage);
  await discardContainer(site);
  await site.edit(({ status }) => {
    if (!status.devcontainer) return;
    Object.assign(status.devcontainer, { phase: DevContainerPhase.FAILED, failureMessage: onHost(failureMessage) });
    Object.assign(status.devcontainer, { containerId: "", containerName: "" });
  });
}

/** A failure of the container with what follows from it. */
export const onHost = (failure: string) => `${failure}; commands run on the host until the dev container is rebuilt`;
