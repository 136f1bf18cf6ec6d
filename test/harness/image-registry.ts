import { createHash } from "node:crypto";
import { readFile, rm } from "node:fs/promises";
import { createServer, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { arch, tmpdir } from "node:os";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import type { TestEngine } from "./container-engine.ts";

// A registry for container images that knows one image and lets nobody in without a password.

const MANIFEST = "application/vnd.docker.distribution.manifest.v2+json";
const digestOf = (bytes: Buffer) => `sha256:${createHash("sha256").update(bytes).digest("hex")}`;

export interface TestRegistry extends AsyncDisposable {
  /** Host and port. */
  host: string;
  /** Reference of the image. */
  image: string;
  /** As `user:password`. */
  credentials: string;
}

/** Serves the engine's own image, under another name, over plain HTTP on loopback. */
export async function startImageRegistry({ docker, image }: TestEngine): Promise<TestRegistry> {
  const credentials = "somebody:registry-pass";
  const file = join(tmpdir(), `berth-image-${process.pid}-${Date.now()}.tar`);
  const container = await docker("create", image, "sh");
  await docker("export", "--output", file, container);
  await docker("rm", container);
  const tree = await readFile(file);
  await rm(file);
  const layer = gzipSync(tree, { level: 1 });
  const config = Buffer.from(
    JSON.stringify({
      ...{ architecture: arch() === "x64" ? "amd64" : arch(), os: "linux", config: {} },
      rootfs: { type: "layers", diff_ids: [digestOf(tree)] },
    }),
  );
  const manifest = Buffer.from(
    JSON.stringify({
      ...{ schemaVersion: 2, mediaType: MANIFEST },
      config: {
        ...{ mediaType: "application/vnd.docker.container.image.v1+json", size: config.length },
        digest: digestOf(config),
      },
      layers: [
        {
          ...{ mediaType: "application/vnd.docker.image.rootfs.diff.tar.gzip", size: layer.length },
          digest: digestOf(layer),
        },
      ],
    }),
  );
  const contents = new Map([config, layer].map((bytes) => [digestOf(bytes), bytes]));
  const send = (response: ServerResponse, type: string, bytes: Buffer) =>
    response
      .writeHead(200, {
        ...{ "content-type": type, "content-length": bytes.length, "docker-content-digest": digestOf(bytes) },
      })
      .end(bytes);
  const expected = `Basic ${Buffer.from(credentials).toString("base64")}`;
  const server = createServer(({ url = "", headers }, response) => {
    response.setHeader("docker-distribution-api-version", "registry/2.0");
    const [, kind, name = ""] = /^\/v2\/private\/tools\/(manifests|blobs)\/(.*)$/.exec(url) ?? [];
    const content = contents.get(name);
    if (headers.authorization !== expected) {
      response.writeHead(401, { "www-authenticate": 'Basic realm="test"' }).end();
    } else if (kind === "manifests") send(response, MANIFEST, manifest);
    else if (content) send(response, "application/octet-stream", content);
    else response.writeHead(url === "/v2/" ? 200 : 404).end();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  return {
    ...{ host, credentials, image: `${host}/private/tools:1` },
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
