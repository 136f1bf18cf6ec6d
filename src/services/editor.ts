import type { ServiceImpl } from "@connectrpc/connect";
import type {
  Editor,
  EditorService,
  ListEditorsRequest,
  ResolveEditorURLRequest,
} from "../../gen/gitpod/v1/editor_pb.js";
import { EnvironmentPhase } from "../../gen/gitpod/v1/environment_pb.js";
import type { App } from "../app.ts";
import {
  BROWSER_PORT_NAME,
  EDITORS,
  type EditorTarget,
  editorByIdOrAlias,
  editorUrl,
  editorVersion,
  isEditorAllowed,
} from "../domain/editors.ts";
import { denied, notFound, precondition } from "../domain/errors.ts";
import { closePage, openPage } from "../domain/pages.ts";
import { policyRefusal } from "../domain/policies.ts";
import type { Caller } from "../domain/principal.ts";
import { principal } from "../rpc/authenticate.ts";
import { getEnvironment, type StoredEnvironment } from "../store/environments.ts";
import { readPolicies } from "../store/organizations.ts";

function findEditor(id: string): Editor {
  const editor = editorByIdOrAlias(id);
  if (!editor) throw notFound("editor", id);
  return editor;
}

async function listEditors(app: App, caller: Caller, { pagination, filter }: ListEditorsRequest) {
  const page = openPage(pagination, ["editors", caller.id, filter]);
  const policies = filter?.allowedByPolicy && (await readPolicies(app.db.point, caller.organizationId)).policies;
  const editors = policies ? EDITORS.filter((editor) => isEditorAllowed(policies, editor)) : EDITORS;
  // Policy may have changed since the page before: the position is one in the whole catalogue.
  const after = EDITORS.findIndex(({ id }) => id === page.after);
  const rest = editors.filter((editor) => EDITORS.indexOf(editor) > after);
  const { items, nextToken } = closePage(page, rest, ({ id }) => id);
  return { editors: items, pagination: { nextToken } };
}

/** Where an environment can be reached, as far as it says. */
function targetOf({ id, organizationId, spec, status }: StoredEnvironment, version: string): EditorTarget {
  const urls = status.environmentUrls;
  const ssh = URL.parse(urls?.ssh?.url ?? "");
  const { port: browserPort } = spec.ports.find(({ name }) => name === BROWSER_PORT_NAME) ?? {};
  const browserUrl = urls?.ports.find(({ port }) => port === browserPort)?.url;
  return {
    ...{ environment_id: id, organization_id: organizationId, version },
    ...(ssh?.hostname && ssh.port ? { host: ssh.hostname, port: ssh.port, user: ssh.username } : {}),
    ...(browserUrl ? { browser_url: browserUrl.replace(/\/+$/, "") } : {}),
    folder: status.devcontainer?.remoteWorkspaceFolder ?? "",
  };
}

async function resolveUrl(app: App, caller: Caller, request: ResolveEditorURLRequest): Promise<string> {
  if (request.organizationId.toLowerCase() !== caller.organizationId) {
    throw notFound("organization", request.organizationId);
  }
  const editor = findEditor(request.editorId);
  const [environment, { policies }] = await Promise.all([
    getEnvironment(app.db.point, caller, request.environmentId),
    readPolicies(app.db.point, caller.organizationId),
  ]);
  const { relation, status } = environment;
  if (!relation.owner && !relation.user) throw denied("you may see this environment, but not enter it");
  if (!isEditorAllowed(policies, editor)) {
    const message = `the organization does not allow ${editor.name}`;
    throw policyRefusal("failed_precondition", "allowed_editor_ids", message);
  }
  const version = editorVersion(policies, editor, request.version);
  if (status.phase !== EnvironmentPhase.RUNNING) throw precondition("the environment is not running");
  const url = editorUrl(editor, targetOf(environment, version));
  if (url !== undefined) return url;
  throw precondition(
    editor.alias === BROWSER_PORT_NAME
      ? `the environment shares no port named ${BROWSER_PORT_NAME}`
      : "the environment has no SSH address: its runner lacks that capability",
  );
}

/** EditorService. */
export function editorService(app: App): ServiceImpl<typeof EditorService> {
  return {
    listEditors: (request, context) => listEditors(app, principal(context), request),
    getEditor: async ({ id }) => ({ editor: findEditor(id) }),
    resolveEditorURL: async (request, context) => ({ url: await resolveUrl(app, principal(context), request) }),
  };
}
