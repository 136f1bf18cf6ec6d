import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { chmod, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";

const digestOf = (content: string | Buffer) => `sha256:${createHash("sha256").update(content).digest("hex")}`;

/** A container registry of this process that has one feature of dev containers. */
export interface FeatureRegistry extends AsyncDisposable {
  /** Reference of the feature. */
  feature: string;
}

/** Packs a feature with this description and installation script, and serves it. */
export async function startFeatureRegistry(description: { id: string }, install: string): Promise<FeatureRegistry> {
  const folder = await mkdtemp(join(tmpdir(), "berth-feature-"));
  const files = { "devcontainer-feature.json": JSON.stringify(description), "install.sh": install };
  for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text);
  await chmod(join(folder, "install.sh"), 0o755);
  const archive = `${folder}.tar`;
  await promisify(execFile)("tar", ["-C", folder, "-cf", archive, "."]);
  const layer = await readFile(archive);
  for (const path of [folder, archive]) await rm(path, { recursive: true });
  const mediaType = "application/vnd.oci.image.manifest.v1+json";
  const manifest = JSON.stringify({
    ...{ schemaVersion: 2, mediaType },
    config: { mediaType: "application/vnd.devcontainers", digest: digestOf(""), size: 0 },
    layers: [{ mediaType: "application/vnd.devcontainers.layer.v1+tar", digest: digestOf(layer), size: layer.length }],
    annotations: {},
  });
  const server = createServer(({ url = "" }, response) => {
    if (url.includes("/blobs/")) return response.end(layer);
    if (!url.includes("/manifests/")) return response.writeHead(404).end();
    response.setHeader("content-type", mediaType);
    response.setHeader("docker-content-digest", digestOf(manifest));
    response.end(manifest);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    feature: `localhost:${(server.address() as AddressInfo).port}/test/features/${description.id}:1`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
