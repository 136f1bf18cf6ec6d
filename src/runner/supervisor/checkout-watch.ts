import { gitExcludes } from "./git-excludes.ts";
import { GitState } from "./git-state.ts";
import { type TreeChange, WatchTree } from "./watch-tree.ts";

const COLLECT_MS = 100;

/** Whom a watched checkout tells. */
export interface CheckoutListener {
  filesChanged(changes: readonly TreeChange[]): void;
  /** What `git status` says may be different. */
  gitChanged(): void;
  /** Changes were lost, or are not seen everywhere. */
  overflowed(reason: string): void;
  /** The directory has become another one or is gone: nothing more will be told. */
  replaced(): void;
}

/** Watches the files of a directory and, if it is a git checkout, its state. */
export class CheckoutWatch {
  readonly #directory: string;
  readonly #env: Record<string, string>;
  readonly #listener: CheckoutListener;
  #tree: WatchTree | undefined;
  #git: GitState | undefined;
  /** One look for the state of git at a time. */
  #opening: Promise<void> = Promise.resolve();
  #timer: NodeJS.Timeout | undefined;
  #excludesTimer: NodeJS.Timeout | undefined;
  #isClosed = false;

  private constructor(directory: string, env: Record<string, string>, listener: CheckoutListener) {
    this.#directory = directory;
    this.#env = env;
    this.#listener = listener;
  }

  /** Resolves once everything is watched; rejects with a system error if the directory cannot be. `env` is for git. */
  static async open(
    directory: string,
    env: Record<string, string>,
    listener: CheckoutListener,
  ): Promise<CheckoutWatch> {
    const watch = new CheckoutWatch(directory, env, listener);
    watch.#tree = await WatchTree.open(
      directory,
      { isCheckout: true, excludes: await gitExcludes(directory, env) },
      {
        changed: (changes) => {
          listener.filesChanged(changes);
          if (watch.#git) listener.gitChanged();
        },
        overflowed: (reason) => listener.overflowed(reason),
        gitReplaced: () => {
          watch.#excludesChanged();
          void watch.#openGit().then(() => watch.#gitChanged());
        },
        rootReplaced: () => listener.replaced(),
      },
    );
    await watch.#openGit();
    return watch;
  }

  /** Why changes are not seen everywhere; undefined if they are. */
  get incomplete(): string | undefined {
    return this.#tree?.incomplete;
  }

  close(): void {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    clearTimeout(this.#excludesTimer);
    this.#tree?.close();
    this.#git?.close();
  }

  #openGit(): Promise<void> {
    this.#opening = this.#opening.then(async () => {
      this.#git?.close();
      this.#git = await GitState.open(this.#directory, {
        changed: () => this.#gitChanged(),
        excludesChanged: () => this.#excludesChanged(),
      });
      if (this.#isClosed) this.#git?.close();
    });
    return this.#opening;
  }

  #excludesChanged(): void {
    if (this.#isClosed) return;
    this.#excludesTimer ??= setTimeout(() => {
      this.#excludesTimer = undefined;
      void gitExcludes(this.#directory, this.#env).then((rules) => this.#tree?.exclude(rules));
    }, COLLECT_MS).unref();
  }

  /** One operation of git changes many files. */
  #gitChanged(): void {
    if (this.#isClosed) return;
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#listener.gitChanged();
    }, COLLECT_MS).unref();
  }
}
