import { create } from "@bufbuild/protobuf";
import { type Editor, EditorSchema } from "../../gen/gitpod/v1/editor_pb.js";
import type { OrganizationPolicies } from "../../gen/gitpod/v1/organization_pb.js";
import { invalid } from "./errors.ts";
import { policyRefusal } from "./policies.ts";

/** Port of an environment that `vscode-browser` opens, by its name in the spec. */
export const BROWSER_PORT_NAME = "vscode-browser";

// Newest first. Toolbox knows the builds of each.
const JETBRAINS_VERSIONS = ["2026.2", "2026.1", "2025.3", "2025.2", "2025.1"];

/** A monogram as a data URL, so that clients without the internet have icons too. */
function icon(letters: string, colour: string): string {
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="6" fill="${colour}"/><text x="16" y="21" font-family="sans-serif" font-size="13" font-weight="700" text-anchor="middle" fill="#fff">${letters}</text></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

interface Entry {
  id: string;
  alias: string;
  name: string;
  icon: [letters: string, colour: string];
  about: string;
  install: string;
  url: string;
  versions?: readonly string[];
}

/** An editor of the VS Code family, which opens folders over SSH by its own URL scheme. */
const remoteSsh = (entry: Omit<Entry, "about" | "install" | "url">): Entry => ({
  ...entry,
  about: `${entry.name} on your machine, connected over SSH`,
  install: `Install ${entry.name} and its Remote - SSH extension, and add your SSH key to the environment.`,
  url: `${entry.alias}://vscode-remote/ssh-remote+{user}@{host}:{port}{folder}`,
});

/** An IDE that JetBrains Toolbox runs on the environment and shows on the user's machine. */
const jetbrains = (entry: Omit<Entry, "about" | "install" | "url">, product: string): Entry => ({
  ...entry,
  about: `${entry.name} in the environment, shown by JetBrains Toolbox over SSH`,
  install: "Install the JetBrains Toolbox App 2.6 or newer, and add your SSH key to the environment.",
  url: `jetbrains://gateway/ssh/environment?h={host}&p={port}&u={user}&launchIde=true&ideHint=${product}-{version}&projectHint={folder}`,
  versions: JETBRAINS_VERSIONS,
});

// Ids are part of the API: organizations name them in policies. They never change.
const ENTRIES: readonly Entry[] = [
  remoteSsh({
    id: "d2c94c27-3b76-4a42-b88c-95a85e392c68",
    ...{ alias: "vscode", name: "VS Code", icon: ["VS", "#0a7aca"] },
  }),
  {
    id: "abcf1150-81d1-44cf-9152-e8b77f04edce",
    ...{ alias: "vscode-browser", name: "VS Code Browser", icon: ["VS", "#3b9ddd"] },
    about: "VS Code in the browser, served by the environment",
    install: `Run a VS Code server in the environment (for example \`code serve-web\`) and share its port under the name \`${BROWSER_PORT_NAME}\`.`,
    url: "{browser_url}/?folder={folder}",
  },
  remoteSsh({
    id: "2681cec1-6abc-44d0-afc9-f160292cb742",
    ...{ alias: "cursor", name: "Cursor", icon: ["Cu", "#1f1f1f"] },
  }),
  remoteSsh({
    id: "45635da5-5b15-4e6d-b2c1-1956be5650f1",
    ...{ alias: "windsurf", name: "Windsurf", icon: ["Wi", "#0d9488"] },
  }),
  {
    id: "6e60ecd0-bfea-43bd-b068-9996324c0376",
    ...{ alias: "zed", name: "Zed", icon: ["Ze", "#2563eb"] },
    about: "Zed on your machine, connected over SSH",
    install: "Install Zed, and add your SSH key to the environment.",
    url: "zed://ssh/{user}@{host}:{port}{folder}",
  },
  jetbrains(
    {
      id: "86d2dcd4-d036-4bfb-bae6-641125c48f78",
      ...{ alias: "intellij", name: "IntelliJ IDEA", icon: ["IJ", "#c2185b"] },
    },
    "IU",
  ),
  jetbrains(
    { id: "cb7c5edf-4245-461b-81d7-c5c31395a849", ...{ alias: "goland", name: "GoLand", icon: ["GO", "#00838f"] } },
    "GO",
  ),
  jetbrains(
    { id: "dd9e15dd-6750-4c8d-8cd9-c9edf8392bd8", ...{ alias: "pycharm", name: "PyCharm", icon: ["PC", "#2e7d32"] } },
    "PY",
  ),
  jetbrains(
    { id: "3d2aed86-dc31-4f39-9e2d-8d258870a983", ...{ alias: "webstorm", name: "WebStorm", icon: ["WS", "#0277bd"] } },
    "WS",
  ),
  jetbrains(
    { id: "d359b644-0e66-435e-b76c-ab0ad0f565a6", ...{ alias: "phpstorm", name: "PhpStorm", icon: ["PS", "#7b1fa2"] } },
    "PS",
  ),
  jetbrains(
    { id: "d01251a9-402b-4b2c-b94e-3b440238e69f", ...{ alias: "rubymine", name: "RubyMine", icon: ["RM", "#c62828"] } },
    "RM",
  ),
  jetbrains(
    { id: "865a66eb-b18d-4879-8f1c-4971041c43ca", ...{ alias: "clion", name: "CLion", icon: ["CL", "#00796b"] } },
    "CL",
  ),
  jetbrains(
    { id: "63367024-7e75-4627-ab0b-5320dea61f1f", ...{ alias: "rider", name: "Rider", icon: ["RD", "#ad1457"] } },
    "RD",
  ),
  jetbrains(
    {
      id: "bccd1994-0de3-4587-a0b7-b8d76689f750",
      ...{ alias: "rustrover", name: "RustRover", icon: ["RR", "#e65100"] },
    },
    "RR",
  ),
  {
    id: "d1d2b7df-891d-42d6-9d31-7d9bb5fe8ce5",
    ...{ alias: "ssh", name: "SSH", icon: ["&gt;_", "#37474f"] },
    about: "A shell over SSH",
    install: "Add your SSH key to the environment, and open the link with an SSH client or use its parts.",
    url: "ssh://{user}@{host}:{port}",
  },
];

/** The built-in catalogue, in the order in which it is listed. */
export const EDITORS: readonly Editor[] = ENTRIES.map((entry) =>
  create(EditorSchema, {
    id: entry.id,
    name: entry.name,
    alias: entry.alias,
    shortDescription: entry.about,
    installationInstructions: entry.install,
    iconUrl: icon(...entry.icon),
    urlTemplate: entry.url,
    versions: (entry.versions ?? []).map((version) => ({ version })),
  }),
);

const BY_NAME = new Map(EDITORS.flatMap((editor) => [editor.id, editor.alias].map((name) => [name, editor])));

/** An editor by its id or alias, in any case; undefined if there is none. */
export const editorByIdOrAlias = (text: string): Editor | undefined => BY_NAME.get(text.toLowerCase());

/** Whether `allowed_editor_ids` lets an editor be used; an empty list allows all. */
export function isEditorAllowed({ allowedEditorIds }: OrganizationPolicies, editor: Editor): boolean {
  return allowedEditorIds.length === 0 || allowedEditorIds.some((name) => editorByIdOrAlias(name) === editor);
}

/** Versions that `editor_version_restrictions` lets be used, newest first. */
function allowedVersions({ editorVersionRestrictions }: OrganizationPolicies, editor: Editor): string[] {
  const versions = editor.versions.map(({ version }) => version);
  const restriction = Object.entries(editorVersionRestrictions).find(([name]) => editorByIdOrAlias(name) === editor);
  if (!restriction) return versions;
  const [, policy] = restriction;
  if (policy.allowedVersions.length === 0) return versions.slice(0, 1);
  return versions.filter((version) => policy.allowedVersions.includes(version));
}

/**
 * The version of an editor to open: the wanted one, or the newest allowed one if none is wanted or policy bars it.
 * Empty for editors without versions. INVALID_ARGUMENT for a version that does not exist, FAILED_PRECONDITION if policy
 * bars all.
 */
export function editorVersion(policies: OrganizationPolicies, editor: Editor, wanted: string): string {
  if (wanted && !editor.versions.some(({ version }) => version === wanted)) {
    throw invalid({ field: "version", message: `is none of ${editor.name}` });
  }
  if (editor.versions.length === 0) return "";
  const allowed = allowedVersions(policies, editor);
  const version = allowed.includes(wanted) ? wanted : allowed[0];
  if (version !== undefined) return version;
  const message = `the organization allows no version of ${editor.name} that exists`;
  throw policyRefusal("failed_precondition", "editor_version_restrictions", message);
}

/** What placeholders of a template stand for. */
export interface EditorTarget {
  environment_id: string;
  organization_id: string;
  host?: string;
  port?: string;
  user?: string;
  /** Base URL of a VS Code server in the environment. */
  browser_url?: string;
  /** Absolute path of the checkout. */
  folder: string;
  version: string;
}

const PLACEHOLDER = /\{(\w+)\}/g;
// Addresses are URLs or parts of URLs already.
const VERBATIM: ReadonlySet<string> = new Set(["host", "port", "user", "browser_url"]);

function encoded(name: string, value: string): string {
  if (VERBATIM.has(name)) return value;
  return value.split("/").map(encodeURIComponent).join("/");
}

/** Fills the template of an editor; undefined if the target lacks something that it needs. */
export function editorUrl(editor: Editor, target: EditorTarget): string | undefined {
  const values: Record<string, string | undefined> = { ...target };
  const names = [...editor.urlTemplate.matchAll(PLACEHOLDER)].map(([, name = ""]) => name);
  if (names.some((name) => values[name] === undefined)) return undefined;
  return editor.urlTemplate.replace(PLACEHOLDER, (_, name: string) => encoded(name, values[name] ?? ""));
}
