import { type ChildProcess, type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, mkdtemp, realpath, rm } from "node:fs/promises";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { buffer, text } from "node:stream/consumers";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import { gunzipSync } from "node:zlib";

const HELD_MS = 10_000;
const MAX_LOGGED = 10_000;
const MAX_CGI_HEADER = 64 * 1024;
const AUTHOR = "Test <test@example.com>";

/** Path to content; null removes the file. */
export type Files = Record<string, string | { content: string; executable: boolean } | null>;

export interface RepositoryOptions {
  /** Of the first commit, on the default branch; a README.md unless told. */
  files?: Files;
  defaultBranch?: string;
  /** Further branches, each one commit on top of the first. */
  branches?: Record<string, Files>;
  /** Other refs such as `refs/pull/1/head`, made like branches. */
  refs?: Record<string, Files>;
  /** Annotated tags: name to branch. */
  tags?: Record<string, string>;
  /** No commit at all. */
  empty?: boolean;
  /** Only readable with this basic authentication. */
  private?: { user: string; password: string };
  /** Path to the name of a repository made before. */
  submodules?: Record<string, string>;
  /** False: the server cannot leave out files, as older ones. */
  filter?: boolean;
}

export interface Repository {
  name: string;
  url: string;
  /** Of the bare repository. */
  directory: string;
  /** Commit of the default branch; empty in an empty repository. */
  head: string;
  /** Full ref name to commit. */
  refs: Record<string, string>;
}

export interface LoggedRequest {
  method: string;
  path: string;
  query: string;
  authorization: string | undefined;
  /** Whether objects were asked for, as by a clone, and not only refs. */
  isFetch: boolean;
}

export interface Answer {
  status: number;
  headers?: Record<string, string>;
  body?: string;
}

export interface GitServer {
  /** `127.0.0.1:<port>`, for allow-lists and integrations. */
  host: string;
  /** Wait before every answer, in milliseconds. */
  delayMs: number;
  /** Every request so far, oldest first. */
  requests: readonly LoggedRequest[];
  /** Clone address, ending in `.git`. */
  url(name: string): string;
  /** Address of the repository's page. */
  webUrl(name: string): string;
  createRepository(name: string, options?: RepositoryOptions): Promise<Repository>;
  /** Adds a commit to a branch, which is made if it does not exist; returns its id. */
  commit(name: string, change: { branch?: string; files: Files; message?: string }): Promise<string>;
  /** Number of requests for objects of a repository, that is clones and fetches. */
  fetches(name: string): number;
  /** From now on requests for objects wait, until `release`. */
  holdRequests(): void;
  /** The next request that is held, or one that is already; rejects after 10 s. */
  held(): Promise<LoggedRequest>;
  release(): void;
  /** Answers every path with this prefix so, instead of git; `body` is what came with the request. */
  answer(prefix: string, answer: Answer | ((request: LoggedRequest, body: string) => Answer)): void;
  close(): Promise<void>;
}

const cleanEnvironment = (more: NodeJS.ProcessEnv = {}): NodeJS.ProcessEnv => ({
  PATH: process.env.PATH,
  HOME: "/nonexistent",
  LC_ALL: "C",
  GIT_CONFIG_NOSYSTEM: "1",
  GIT_CONFIG_GLOBAL: "/dev/null",
  // Tests run as root or in containers whose directories belong to somebody else.
  GIT_CONFIG_COUNT: "1",
  GIT_CONFIG_KEY_0: "safe.directory",
  GIT_CONFIG_VALUE_0: "*",
  ...more,
});

async function git(args: readonly string[], input = ""): Promise<string> {
  const child = spawn("git", args, { env: cleanEnvironment(), stdio: ["pipe", "pipe", "pipe"] });
  child.stdin.on("error", () => {});
  child.stdin.end(input);
  const [stdout, stderr, [code]] = await Promise.all([text(child.stdout), text(child.stderr), once(child, "close")]);
  if (code !== 0) throw new Error(`git ${args.join(" ")} ended with ${code}: ${stderr}`);
  return stdout.trim();
}

const data = (content: string) => `data ${Buffer.byteLength(content)}\n${content}\n`;

function fileChanges(files: Files): string {
  return Object.entries(files)
    .map(([path, file]) => {
      if (file === null) return `D ${path}\n`;
      const { content, executable } = typeof file === "string" ? { content: file, executable: false } : file;
      return `M ${executable ? "100755" : "100644"} inline ${path}\n${data(content)}`;
    })
    .join("");
}

/** One commit in the language of `git fast-import`. */
function commitStream(
  ref: string,
  options: { mark?: number; from?: string; message: string; changes: string },
): string {
  const { mark, from, message, changes } = options;
  const when = `${Math.floor(Date.now() / 1000)} +0000`;
  const markLine = mark === undefined ? "" : `mark :${mark}\n`;
  const fromLine = from === undefined ? "" : `from ${from}\n`;
  return `commit ${ref}\n${markLine}author ${AUTHOR} ${when}\ncommitter ${AUTHOR} ${when}\n${data(message)}${fromLine}${changes}\n`;
}

const importCommits = (directory: string, stream: string) =>
  git(["-C", directory, "fast-import", "--quiet", "--done"], `${stream}done\n`);

async function readRefs(directory: string): Promise<Record<string, string>> {
  const format = "--format=%(refname) %(if)%(*objectname)%(then)%(*objectname)%(else)%(objectname)%(end)";
  const lines = (await git(["-C", directory, "for-each-ref", format])).split("\n").filter(Boolean);
  return Object.fromEntries(lines.map((line) => line.split(" ") as [string, string]));
}

function sendCgi(child: ChildProcessWithoutNullStreams, response: ServerResponse): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let head = Buffer.alloc(0);
  child.stdout.on("data", function onData(chunk: Buffer) {
    head = Buffer.concat([head, chunk]);
    const end = head.indexOf("\r\n\r\n");
    if (end < 0 && head.length < MAX_CGI_HEADER) return;
    child.stdout.off("data", onData);
    child.stdout.pause();
    const lines = head.subarray(0, end).toString().split("\r\n");
    const headers = lines.map(
      (line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()] as const,
    );
    response.statusCode = Number(headers.find(([name]) => name === "Status")?.[1]?.slice(0, 3) ?? 200);
    for (const [name, value] of headers) if (name !== "Status") response.setHeader(name, value);
    response.write(head.subarray(end + 4));
    pipeline(child.stdout, response).then(resolve, reject);
  });
  child.on("error", reject);
  child.on("close", () => {
    if (!response.headersSent) response.writeHead(500).end();
    resolve();
  });
  return promise;
}

/** A git server on 127.0.0.1 with real repositories in a temporary directory, over TLS with a key; pushes are accepted. */
export async function startGitServer(tls?: { key: string; cert: string }): Promise<GitServer> {
  const root = await mkdtemp(join(await realpath(tmpdir()), "git-server-"));
  const repositories = new Map<string, RepositoryOptions>();
  const answers = new Map<string, Parameters<GitServer["answer"]>[1]>();
  const requests: LoggedRequest[] = [];
  const children = new Set<ChildProcess>();
  let gate: PromiseWithResolvers<void> | undefined;
  const waiting = new Set<LoggedRequest>();
  const watchers = new Set<(request: LoggedRequest) => void>();

  const directoryOf = (name: string) => join(root, `${name}.git`);
  const repositoryOf = (path: string) =>
    [...repositories.keys()].find((name) => path.startsWith(`/${name}.git/`) || path.startsWith(`/${name}/`));

  function mayRead(request: LoggedRequest): boolean {
    const guarded = repositories.get(repositoryOf(request.path) ?? "")?.private;
    const expected = guarded && `Basic ${Buffer.from(`${guarded.user}:${guarded.password}`).toString("base64")}`;
    return expected === undefined || request.authorization === expected;
  }

  async function hold(request: LoggedRequest, response: ServerResponse): Promise<void> {
    if (!gate) return;
    waiting.add(request);
    for (const watcher of watchers) watcher(request);
    await Promise.race([gate.promise, once(response, "close")]);
    waiting.delete(request);
  }

  function runBackend(incoming: IncomingMessage, request: LoggedRequest): ChildProcessWithoutNullStreams {
    const child = spawn("git", ["http-backend"], {
      env: cleanEnvironment({
        GIT_PROJECT_ROOT: root,
        GIT_HTTP_EXPORT_ALL: "1",
        PATH_INFO: request.path,
        QUERY_STRING: request.query,
        REQUEST_METHOD: request.method,
        CONTENT_TYPE: incoming.headers["content-type"],
        CONTENT_LENGTH: incoming.headers["content-length"],
        HTTP_CONTENT_ENCODING: incoming.headers["content-encoding"],
        GIT_PROTOCOL: incoming.headers["git-protocol"]?.toString(),
        REMOTE_ADDR: "127.0.0.1",
      }),
      stdio: ["pipe", "pipe", "pipe"],
    });
    children.add(child);
    child.on("close", () => children.delete(child));
    child.stdin.on("error", () => {});
    child.stderr.resume();
    return child;
  }

  async function serve(incoming: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(incoming.url ?? "/", "http://localhost");
    const request: LoggedRequest = {
      method: incoming.method ?? "GET",
      path: decodeURIComponent(url.pathname),
      query: url.search.slice(1),
      authorization: incoming.headers.authorization,
      isFetch: false,
    };
    if (requests.push(request) > MAX_LOGGED) requests.shift();
    if (server.delayMs > 0) await delay(server.delayMs);
    const scripted = [...answers].find(([prefix]) => request.path.startsWith(prefix))?.[1];
    if (scripted) {
      const sent = await text(incoming);
      const { status, headers = {}, body = "" } = typeof scripted === "function" ? scripted(request, sent) : scripted;
      return void response.writeHead(status, headers).end(body);
    }
    if (!mayRead(request)) {
      incoming.resume();
      return void response.writeHead(401, { "www-authenticate": 'Basic realm="git"' }).end();
    }
    let body: Buffer | undefined;
    if (request.method === "POST" && request.path.endsWith("/git-upload-pack")) {
      body = await buffer(incoming);
      const plain = incoming.headers["content-encoding"] === "gzip" ? gunzipSync(body) : body;
      request.isFetch = plain.includes("command=fetch") || plain.includes("want ");
      if (request.isFetch) await hold(request, response);
    }
    if (response.destroyed) return;
    const child = runBackend(incoming, request);
    response.on("close", () => child.kill("SIGKILL"));
    if (body) child.stdin.end(body);
    else incoming.pipe(child.stdin);
    await sendCgi(child, response);
  }

  const listener = (incoming: IncomingMessage, response: ServerResponse) => {
    serve(incoming, response).catch(() => response.destroy());
  };
  const http = tls ? createTlsServer(tls, listener) : createServer(listener);
  http.listen(0, "127.0.0.1");
  await once(http, "listening");
  const host = `127.0.0.1:${(http.address() as AddressInfo).port}`;
  const origin = `${tls ? "https" : "http"}://${host}`;

  const server: GitServer = {
    host,
    delayMs: 0,
    requests,
    url: (name) => `${origin}/${name}.git`,
    webUrl: (name) => `${origin}/${name}`,

    async createRepository(name, options = {}) {
      const { defaultBranch = "main", branches = {}, refs = {}, tags = {}, submodules = {}, filter = true } = options;
      const directory = directoryOf(name);
      const main = `refs/heads/${defaultBranch}`;
      await mkdir(directory, { recursive: true });
      await git(["init", "--quiet", "--bare", `--initial-branch=${defaultBranch}`, "--template=", directory]);
      const settings = {
        "http.receivepack": true,
        "uploadpack.allowFilter": filter,
        "gc.auto": 0,
        "receive.autogc": false,
      };
      for (const [key, value] of Object.entries(settings)) await git(["-C", directory, "config", key, String(value)]);
      if (!options.empty) {
        const links = await Promise.all(
          Object.entries(submodules).map(async ([path, other]) => ({
            section: `[submodule "${path}"]\n\tpath = ${path}\n\turl = ${server.url(other)}\n`,
            link: `M 160000 ${await git(["-C", directoryOf(other), "rev-parse", "HEAD"])} ${path}\n`,
          })),
        );
        const modules: Files = links.length > 0 ? { ".gitmodules": links.map(({ section }) => section).join("") } : {};
        const files = { ...(options.files ?? { "README.md": `# ${name}\n` }), ...modules };
        const changes = fileChanges(files) + links.map(({ link }) => link).join("");
        const branchRefs = Object.entries(branches).map(
          ([branch, overlay]) => [`refs/heads/${branch}`, overlay] as const,
        );
        const stream = [
          commitStream(main, { mark: 1, message: "First commit", changes }),
          ...[...branchRefs, ...Object.entries(refs)].map(([ref, overlay]) =>
            commitStream(ref, { from: ":1", message: `Commit of ${ref}`, changes: fileChanges(overlay) }),
          ),
          ...Object.entries(tags).map(
            ([tag, branch]) =>
              `tag ${tag}\nfrom refs/heads/${branch}\ntagger ${AUTHOR} 1700000000 +0000\n${data(`Tag ${tag}`)}`,
          ),
        ];
        await importCommits(directory, stream.join(""));
      }
      repositories.set(name, options);
      const made = await readRefs(directory);
      return { name, url: server.url(name), directory, head: made[main] ?? "", refs: made };
    },

    async commit(name, { branch = repositories.get(name)?.defaultBranch ?? "main", files, message = "Change" }) {
      const directory = directoryOf(name);
      const ref = `refs/heads/${branch}`;
      const before = await readRefs(directory);
      const base = before[ref] ?? before[`refs/heads/${repositories.get(name)?.defaultBranch ?? "main"}`];
      await importCommits(directory, commitStream(ref, { from: base, message, changes: fileChanges(files) }));
      return git(["-C", directory, "rev-parse", ref]);
    },

    fetches: (name) => requests.filter(({ isFetch, path }) => isFetch && repositoryOf(path) === name).length,

    holdRequests() {
      gate ??= Promise.withResolvers();
    },
    async held() {
      const [already] = waiting;
      if (already) return already;
      const { promise, resolve, reject } = Promise.withResolvers<LoggedRequest>();
      const timer = setTimeout(() => reject(new Error(`no request was held within ${HELD_MS} ms`)), HELD_MS);
      watchers.add(resolve);
      try {
        return await promise;
      } finally {
        clearTimeout(timer);
        watchers.delete(resolve);
      }
    },
    release() {
      gate?.resolve();
      gate = undefined;
    },

    answer: (prefix, answer) => void answers.set(prefix, answer),

    async close() {
      server.release();
      const closed = once(http, "close");
      http.close();
      http.closeAllConnections();
      for (const child of children) child.kill("SIGKILL");
      await closed;
      await rm(root, { recursive: true, force: true, maxRetries: 3 });
    },
  };
  return server;
}
