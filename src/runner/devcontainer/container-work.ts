import { rm } from "node:fs/promises";
import { join } from "node:path";
import type { ContainerEngine } from "../containers/engine.ts";
import { redact } from "../redact.ts";
import { type EnvironmentSite, textOf, userOf } from "../site.ts";
import type { SupervisorClient } from "../supervisor/client.ts";
import { ENTRANCE, LOGIN } from "../supervisor/config.ts";
import { type ContainerProgress, labelsOf, removeContainer } from "./belongings.ts";
import { sharedFolder, startContainer } from "./container.ts";
import { type DevContainerImage, makeImage } from "./image.ts";
import type { ContainerPlan } from "./plan.ts";
import { loginFolder } from "./registry-logins.ts";

// Brings up the container that a dev container runs in. What takes long, the image, is made in the background; all else
// is done by the passes over the environment, which alone change what is known of it.

const IMAGE_MS = 30 * 60_000;
/** Services have two minutes to end. */
const LEAVE_MS = 130_000;
/** Passes, a second apart, in which an engine may not answer, or a container not come up. */
const TRIES = { engine: 30, container: 3 };

interface ImageTask {
  controller: AbortController;
  result?: DevContainerImage;
  failure?: string;
  ended: Promise<void>;
}

/** The container of one application of a dev container. */
export class ContainerWork implements ContainerProgress {
  readonly #site: EnvironmentSite;
  readonly #plan: ContainerPlan;
  readonly #session: string;
  readonly #ready = Promise.withResolvers<SupervisorClient>();
  #isWanted = false;
  #image: ImageTask | undefined;
  #missed = { engine: 0, container: 0 };
  #leaveUntil: number | undefined;
  #id = "";
  #failure = "";

  constructor(site: EnvironmentSite, plan: ContainerPlan, session: string) {
    this.#site = site;
    this.#plan = plan;
    this.#session = session;
    // Nobody may be waiting.
    this.#ready.promise.catch(() => undefined);
  }

  /** Why there is no container; empty unless that is certain. */
  get failure(): string {
    return this.#failure;
  }

  /** Id of the container; empty as long as it does not run. */
  get containerId(): string {
    return this.#id;
  }

  /** Lets the next pass begin with it. */
  want(): void {
    if (this.#isWanted) return;
    this.#isWanted = true;
    this.#site.wake();
  }

  /** The supervisor in the container, as soon as it serves; rejects if it never will. */
  client(): Promise<SupervisorClient> {
    this.want();
    return this.#ready.promise;
  }

  /** Does what can be done by now. */
  async advance(signal: AbortSignal): Promise<void> {
    if (!this.#isWanted || this.#id || this.#failure) return;
    const { engines } = this.#site.host;
    const engine = await engines.find();
    if (!engine) return await this.#missing("engine", `no container engine answers: ${engines.problem}`);
    try {
      if (!(await this.#hasImage(engine))) return;
      await this.#bringUp(engine, signal);
    } catch (error) {
      signal.throwIfAborted();
      await this.#missing("container", `the container of the dev container could not be started: ${textOf(error)}`);
    }
  }

  /** Ends what is under way. */
  async cancel(): Promise<void> {
    this.abandon();
    await this.#image?.ended;
  }

  abandon(): void {
    const reason = new Error("the dev container is not needed any more");
    this.#ready.reject(reason);
    this.#image?.controller.abort(reason);
  }

  async #missing(what: keyof typeof TRIES, failure: string): Promise<void> {
    this.#missed[what] += 1;
    if (this.#missed[what] >= TRIES[what]) await this.#fail(failure);
  }

  async #fail(failure: string): Promise<void> {
    this.#failure = failure;
    this.#ready.reject(new Error(failure));
    await discardContainer(this.#site);
  }

  /** The image is there; one that is missing is on its way, or cannot be had. */
  async #hasImage(engine: ContainerEngine): Promise<boolean> {
    const { record } = this.#site;
    const { uid } = userOf(this.#site);
    const { container } = record;
    const isCurrent = container?.session === this.#session && container.uid === uid;
    if (isCurrent && (await engine.imageFacts(container.image))) return true;
    this.#image ??= await this.#begin(engine);
    const { result, failure } = this.#image;
    if (failure) await this.#fail(failure);
    if (!result || !(await this.#isLeft())) return false;
    const { image, userName, variables, warnings } = result;
    await removeContainer(engine, this.#site.id, image);
    this.#site.container.drop();
    await this.#site.edit((each) => {
      each.container = { session: this.#session, image, uid, userName, variables, warnings, restarts: [] };
    });
    return true;
  }

  /** Services and tasks in the container of before have ended; they have been told to, and may take their time. */
  async #isLeft(): Promise<boolean> {
    this.#leaveUntil ??= Date.now() + LEAVE_MS;
    const state = await this.#site.supervision.client?.health().catch(() => undefined);
    return (state !== undefined && !state.inDevContainer) || Date.now() > this.#leaveUntil;
  }

  async #begin(engine: ContainerEngine): Promise<ImageTask> {
    const site = this.#site;
    // Written down first: whatever a crash leaves with the engine is looked for.
    await site.edit((record) => {
      record.usesEngine = true;
    });
    const user = userOf(site);
    const controller = new AbortController();
    const shared = await sharedFolder(site);
    const logins = await loginFolder(site.paths, userOf(site));
    if (!site.sections.isOpen("devcontainer")) site.sections.open("devcontainer");
    site.log.write("Preparing the image of the dev container");
    const work = {
      ...{
        engine,
        labels: labelsOf(site.host.config.dataDir, site.id),
        timeoutMs: IMAGE_MS,
        signal: controller.signal,
      },
      scratch: join(site.paths.root, "features"),
      place: { folder: site.folder, user, shared, home: site.paths.home },
      onLines: (lines: string[]) => site.log.write(lines.join("\n")),
      ...(logins && { loginFolder: logins }),
    };
    const task: ImageTask = { controller, ended: Promise.resolve() };
    task.ended = makeImage(work, this.#plan).then(
      (result) => {
        task.result = result;
        site.wake();
      },
      (error: unknown) => {
        task.failure = site.log.clean(redact(textOf(error)));
        site.wake();
      },
    );
    return task;
  }

  async #bringUp(engine: ContainerEngine, signal: AbortSignal): Promise<void> {
    const site = this.#site;
    const { container } = site.record;
    if (!container) return;
    const { supervisor, id } = await startContainer(site, engine, container, signal);
    site.container.use(supervisor);
    this.#id = id;
    this.#ready.resolve(supervisor.client);
  }
}

/** Takes the container of an environment away, and forgets it: its operations are the host's again. */
export async function discardContainer(site: EnvironmentSite): Promise<void> {
  site.container.drop();
  for (const program of [ENTRANCE, LOGIN]) await rm(join(site.paths.root, program), { force: true });
  if (site.record.container) {
    await site.edit((record) => {
      delete record.container;
    });
  }
  const engine = await site.host.engines.find();
  if (engine && site.record.usesEngine) await removeContainer(engine, site.id);
}
