import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { Code, type ConnectError } from "@connectrpc/connect";
import { v7 as uuidv7 } from "uuid";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { ActionableErrorDetailsSchema } from "../gen/gitpod/v1/actionable_error_pb.js";
import { CodexOpenAIModel, CodexReasoningEffort, CodexServiceTier } from "../gen/gitpod/v1/agent_pb.js";
import {
  AdmissionLevel,
  type Environment,
  EnvironmentPhase,
  KernelControlsAction,
} from "../gen/gitpod/v1/environment_pb.js";
import { ResourceOperation, ResourceType } from "../gen/gitpod/v1/event_pb.js";
import {
  CodexModelPolicyState,
  ConversationSharingPolicy,
  type OrganizationPolicies,
  OrganizationPoliciesSchema,
  OrganizationRole,
  PolicyEnforcedFailedPreconditionDetailsSchema,
  type UpdateOrganizationPoliciesRequestSchema,
} from "../gen/gitpod/v1/organization_pb.js";
import { RunnerPhase } from "../gen/gitpod/v1/runner_pb.js";
import { transact } from "../src/app.ts";
import { requestStart } from "../src/domain/lifecycle.ts";
import { SYSTEM } from "../src/domain/principal.ts";
import { advanceEnvironment } from "../src/store/environment-steps.ts";
import { lockEnvironment } from "../src/store/environments.ts";
import { auditActions, traces } from "./harness/audit.ts";
import { eventText, watchEvents } from "./harness/event-stream.ts";
import type { FakeRunner } from "./harness/fake-runner.ts";
import { startTestPlane, type TestPlane, type TestUser } from "./harness/plane.ts";
import { codeOf, refusal, violatedFields } from "./harness/refusal.ts";
import { addOrganization, addServiceAccount, connectRunner } from "./harness/tenants.ts";
import { eventually } from "./harness/wait.ts";

const DAY_MS = 24 * 60 * 60_000;
const NEVER = durationFromMs(0);
type Changes = Omit<MessageInitShape<typeof UpdateOrganizationPoliciesRequestSchema>, "organizationId" | "$typeName">;

let plane: TestPlane;
let member: TestUser;
let foreign: TestUser;

beforeAll(async () => {
  plane = await startTestPlane();
  member = await plane.addUser();
  foreign = await plane.addUser({ organizationId: await addOrganization(plane), role: OrganizationRole.ADMIN });
});

afterAll(async () => {
  expect(plane.logged()).not.toContain('"code":"internal"');
  await plane[Symbol.asyncDispose]();
});

const update = (changes: Changes, client = plane.admin) =>
  client.organizations.updateOrganizationPolicies({ organizationId: plane.organizationId, ...changes });

async function read(client = plane.admin): Promise<OrganizationPolicies> {
  const { policies } = await client.organizations.getOrganizationPolicies({ organizationId: plane.organizationId });
  if (!policies) throw new Error("an answer without policies");
  return policies;
}

/** Name of the policy that a refusal is about. */
const policyOf = (error: ConnectError) => error.findDetails(ActionableErrorDetailsSchema)[0]?.errorCode;

describe("reading", () => {
  test("ORG-1 a new organization restricts nothing, archives after three days, and runs at most ten of fifty", async () => {
    const defaults = create(OrganizationPoliciesSchema, {
      organizationId: plane.organizationId,
      maximumEnvironmentTimeout: NEVER,
      membersCreateProjects: true,
      allowLocalRunners: true,
      maximumRunningEnvironmentsPerUser: 10n,
      maximumEnvironmentsPerUser: 50n,
      deleteArchivedEnvironmentsAfter: NEVER,
      agentPolicy: { conversationSharingPolicy: ConversationSharingPolicy.DISABLED },
      maximumEnvironmentLifetime: NEVER,
      securityAgentPolicy: {},
      archiveEnvironmentsAfter: durationFromMs(3 * DAY_MS),
    });
    expect(await read()).toEqual(defaults);
  });

  test("every member and their environments read them, security agents are for admins", async () => {
    const customAgents = [{ name: "sensor", startCommand: "run", enabled: true }];
    await update({ securityAgentPolicy: { customAgents } });
    expect((await read()).securityAgentPolicy?.customAgents).toMatchObject(customAgents);
    for (const { client } of [member, await addServiceAccount(plane)])
      expect((await read(client)).securityAgentPolicy).toBeUndefined();
    await update({ securityAgentPolicy: {} });
  });

  test("ORG-48 an environment reads them and its organization, without security agents; a runner does not", async () => {
    const { runner, classId } = await connectRunner(plane);
    const { environment } = await member.client.environments.createEnvironment({
      spec: { machine: { class: classId } },
    });
    const { id: environmentId = "", spec } = environment ?? {};
    const machineSession = spec?.machine?.session ?? "";
    const { token } = await runner.control.createEnvironmentToken({ environmentId, machineSession });
    const own = plane.client(token);
    expect((await read(own)).securityAgentPolicy).toBeUndefined();
    const { organizationId } = plane;
    expect((await own.organizations.getOrganization({ organizationId })).organization?.id).toBe(organizationId);
    const { organizations } = plane.client(runner.token);
    expect(await codeOf(organizations.getOrganizationPolicies({ organizationId }))).toBe("PermissionDenied");
    expect(await codeOf(organizations.getOrganization({ organizationId }))).toBe("PermissionDenied");
    await plane.admin.environments.deleteEnvironment({ environmentId, force: true });
  });

  test("ORG-18 for others the organization does not exist; members may not change it", async () => {
    const organizationId = plane.organizationId.toUpperCase();
    for (const id of [organizationId, uuidv7()]) {
      const { organizations } = foreign.client;
      expect(await codeOf(organizations.getOrganization({ organizationId: id }))).toBe("NotFound");
      expect(await codeOf(organizations.getOrganizationPolicies({ organizationId: id }))).toBe("NotFound");
      expect(await codeOf(organizations.updateOrganizationPolicies({ organizationId: id }))).toBe("NotFound");
    }
    for (const { client } of [member, await addServiceAccount(plane)]) {
      expect((await client.organizations.getOrganization({ organizationId })).organization).toMatchObject({
        ...{ id: plane.organizationId, name: "Default", tier: 2, inviteDomains: { domains: [] } },
      });
      expect(await codeOf(client.organizations.updateOrganizationPolicies({ organizationId }))).toBe(
        "PermissionDenied",
      );
    }
  });
});

describe("updating", () => {
  test("ORG-26 what is absent or empty stays, a list of one empty text clears", async () => {
    const before = await read();
    await update({ membersCreateProjects: false });
    expect(await read()).toEqual({ ...before, membersCreateProjects: false });
    await update({ membersCreateProjects: true, allowedEditorIds: ["vscode", "zed", "vscode"] });
    expect((await read()).allowedEditorIds).toEqual(["vscode", "zed"]);
    await update({ allowedEditorIds: [] });
    expect((await read()).allowedEditorIds).toEqual(["vscode", "zed"]);
    await update({ allowedEditorIds: [""] });
    expect(await read()).toEqual(before);
  });

  test("a map is kept when empty, replaced otherwise, and cleared by one empty key", async () => {
    const versions = async () => (await read()).editorVersionRestrictions;
    await update({ editorVersionRestrictions: { goland: { allowedVersions: ["1", "1"] }, rider: {} } });
    await update({ editorVersionRestrictions: {} });
    expect(await versions()).toMatchObject({ goland: { allowedVersions: ["1"] }, rider: { allowedVersions: [] } });
    await update({ editorVersionRestrictions: { clion: {} } });
    expect(Object.keys(await versions())).toEqual(["clion"]);
    await update({ editorVersionRestrictions: { "": {} } });
    expect(await versions()).toEqual({});
  });

  test("ORG-28 all of them changed, then what was read first sent back: everything is as before", async () => {
    const before = await read();
    const efforts = [CodexReasoningEffort.HIGH, CodexReasoningEffort.LOW, CodexReasoningEffort.HIGH];
    await update({
      maximumEnvironmentTimeout: durationFromMs(1_800_000),
      ...{
        membersRequireProjects: true,
        membersCreateProjects: false,
        defaultEditorId: "zed",
        allowLocalRunners: false,
      },
      ...{ maximumRunningEnvironmentsPerUser: 0n, maximumEnvironmentsPerUser: 10_000n, portSharingDisabled: true },
      ...{ defaultEnvironmentImage: "registry.example.org/base:1", requireCustomDomainAccess: true },
      deleteArchivedEnvironmentsAfter: durationFromMs(28 * DAY_MS),
      maximumEnvironmentLifetime: durationFromMs(180 * DAY_MS),
      ...{ restrictAccountCreationToScim: true, maximumEnvironmentLifetimeStrict: true, webBrowserDisabled: true },
      ...{ maxPortAdmissionLevel: AdmissionLevel.ORGANIZATION, disableFromScratch: true, securityPolicyId: "" },
      archiveEnvironmentsAfter: durationFromMs(30 * DAY_MS),
      agentPolicy: {
        ...{ mcpDisabled: true, scmToolsDisabled: true, goalModeDisabled: true, maxSubagentsPerEnvironment: 10 },
        conversationSharingPolicy: ConversationSharingPolicy.ORGANIZATION,
        ...{ allowedAgentIds: ["a", "b", "a"], allowedCodexReasoningEfforts: efforts },
        allowedCodexServiceTiers: [CodexServiceTier.FAST],
      },
      securityAgentPolicy: { customAgents: [{ name: "sensor", startCommand: "run" }] },
    });
    const between = await read();
    expect(between).toMatchObject({
      ...{ membersRequireProjects: true, defaultEditorId: "zed", maximumEnvironmentsPerUser: 10_000n },
      agentPolicy: { allowedAgentIds: ["a", "b"], allowedCodexReasoningEfforts: efforts.slice(0, 2) },
    });
    const unchanged = Object.entries(between).filter(([name, value]) =>
      Object.is(value, before[name as keyof typeof before]),
    );
    const kept = ["allowedEditorIds", "editorVersionRestrictions", "organizationId", "securityPolicyId"];
    expect(unchanged.map(([name]) => name).filter((name) => !kept.includes(name) && !name.startsWith("$"))).toEqual([]);
    const { organizationId: _id, $typeName: _type, ...first } = before;
    await update(first as Changes);
    expect(await read()).toEqual(before);
    for (const off of ["maximumEnvironmentTimeout", "deleteArchivedEnvironmentsAfter", "maximumEnvironmentLifetime"])
      expect(before[off as keyof OrganizationPolicies]).toEqual(NEVER);
  });

  test("ORG-29 the policy of agents: scalars stay, lists without a way to say empty stay, the others are replaced", async () => {
    const states = { "gpt-5.4-mini": CodexModelPolicyState.DISABLED, "gpt-5.5": CodexModelPolicyState.ALLOWED };
    await update({
      agentPolicy: {
        ...{ commandDenyList: ["rm", "dd", "rm"], allowedAgentIds: ["a"], codexModelPolicy: { modelStates: states } },
        allowedCodexModels: [CodexOpenAIModel.CODEX_OPEN_AI_MODEL_GPT_5_2],
      },
    });
    // The newer field counts alone, and keeps only what is switched off.
    const modelStates = { "gpt-5.4-mini": CodexModelPolicyState.DISABLED };
    expect((await read()).agentPolicy).toMatchObject({ codexModelPolicy: { modelStates }, allowedCodexModels: [] });
    await update({ agentPolicy: { mcpDisabled: true } });
    expect((await read()).agentPolicy).toMatchObject({
      ...{ mcpDisabled: true, commandDenyList: ["rm", "dd"], allowedAgentIds: [], codexModelPolicy: { modelStates } },
    });
    await update({ agentPolicy: { codexModelPolicy: {}, commandDenyList: [""], mcpDisabled: false } });
    const cleared = (await read()).agentPolicy;
    expect(cleared).toMatchObject({ commandDenyList: [], mcpDisabled: false });
    expect(cleared?.codexModelPolicy).toBeUndefined();
    await update({ agentPolicy: { allowedCodexModels: [CodexOpenAIModel.CODEX_OPEN_AI_MODEL_GPT_5_2] } });
    await update({ agentPolicy: { conversationSharingPolicy: ConversationSharingPolicy.ORGANIZATION } });
    await update({ agentPolicy: { conversationSharingPolicy: ConversationSharingPolicy.UNSPECIFIED } });
    expect((await read()).agentPolicy).toMatchObject({
      allowedCodexModels: [CodexOpenAIModel.CODEX_OPEN_AI_MODEL_GPT_5_2],
      conversationSharingPolicy: ConversationSharingPolicy.DISABLED,
    });
    await update({ agentPolicy: { allowedCodexModels: [CodexOpenAIModel.CODEX_OPEN_AI_MODEL_UNSPECIFIED] } });
    expect((await read()).agentPolicy?.allowedCodexModels).toEqual([]);
  });

  test("rules for programs and files are replaced as a whole; safe programs are not for the caller to name", async () => {
    await update({ vetoExecPolicy: { enabled: true, executables: ["nc", "nc"], safelist: ["sh"] } });
    await update({ membersCreateProjects: true });
    expect((await read()).vetoExecPolicy).toMatchObject({
      ...{ enabled: true, executables: ["nc"], safelist: [], action: KernelControlsAction.BLOCK },
    });
    await update({ vetoExecPolicy: {}, vetoFilePolicy: { paths: { entries: [{ path: "/etc" }] } } });
    const { vetoExecPolicy, vetoFilePolicy } = await read();
    expect([vetoExecPolicy?.enabled, vetoExecPolicy?.executables]).toEqual([false, []]);
    expect(vetoFilePolicy?.paths?.entries).toMatchObject([{ path: "/etc" }]);
    await update({ vetoFilePolicy: {} });
  });

  test("security agents keep their ids over updates that do not name them", async () => {
    const agents = async () => (await read()).securityAgentPolicy?.customAgents ?? [];
    const [first, second] = [
      { name: "one", startCommand: "a" },
      { name: "two", startCommand: "b" },
    ];
    await update({ securityAgentPolicy: { customAgents: [first, second] } });
    const before = await agents();
    expect(new Set(before.map(({ id }) => id)).size).toBe(2);
    const trace = await traces(plane, ResourceType.ORGANIZATION_POLICY);
    await update({ securityAgentPolicy: { customAgents: [first, second] } });
    expect([await agents(), await traces(plane, ResourceType.ORGANIZATION_POLICY)]).toEqual([before, trace]);
    await update({ securityAgentPolicy: { customAgents: [{ ...second, description: "kept" }] } });
    expect(await agents()).toMatchObject([{ id: before[1]!.id, description: "kept" }]);
    await update({ securityAgentPolicy: {} });
    expect(await agents()).toEqual([]);
  });

  test("secrets of the organization may be named; a sensor that is switched off needs its secret no longer", async () => {
    const secret = async (name: string, client = plane.admin, scope = plane.organizationId) => {
      const isOwn = client !== plane.admin;
      const created = await client.secrets.createSecret({
        ...{ name, value: "x", mount: { case: "environmentVariable", value: true } },
        scope: { scope: isOwn ? { case: "userId", value: scope } : { case: "organizationId", value: scope } },
      });
      return created.secret?.id ?? "";
    };
    const cidSecretId = await secret("SENSOR_ID");
    await secret("SENSOR_KEY");
    await secret("OWN_KEY", member.client, member.id);
    const agent = (secretName: string) => ({
      customAgents: [{ name: "sensor", startCommand: "run", envMappings: [{ name: "KEY", secretName }] }],
    });
    await update({ securityAgentPolicy: agent("SENSOR_KEY") });
    expect(await codeOf(update({ securityAgentPolicy: agent("OWN_KEY") }))).toBe("InvalidArgument");
    const sensor = { enabled: true, image: "registry.example.org/falcon:7", cidSecretId: cidSecretId.toUpperCase() };
    const additionalOptions = { TRACE: "debug" };
    await update({ securityAgentPolicy: { crowdstrike: { ...sensor, additionalOptions } } });
    await update({ securityAgentPolicy: { crowdstrike: { tags: "a,b" } } });
    expect((await read()).securityAgentPolicy).toMatchObject({
      ...{ crowdstrike: { ...sensor, cidSecretId, tags: "a,b", additionalOptions }, customAgents: [] },
    });
    expect(await codeOf(plane.admin.secrets.deleteSecret({ secretId: cidSecretId }))).toBe("FailedPrecondition");
    await update({ securityAgentPolicy: { crowdstrike: { enabled: false, additionalOptions: { "": "" } } } });
    expect((await read()).securityAgentPolicy?.crowdstrike?.additionalOptions).toEqual({});
    await plane.admin.secrets.deleteSecret({ secretId: cidSecretId });
    const error = await refusal(update({ securityAgentPolicy: { crowdstrike: { enabled: true } } }));
    expect(violatedFields(error)).toEqual(["security_agent_policy.crowdstrike.cid_secret_id"]);
  });

  test("a group of the organization may be named, of whatever kind; it is compared without case", async () => {
    const [group] = await plane.plane.app.db.point<{ id: string }[]>`
      select id from groups where organization_id = ${plane.organizationId} limit 1`;
    await update({ agentPolicy: { scmToolsAllowedGroupId: group!.id.toUpperCase() } });
    expect((await read()).agentPolicy?.scmToolsAllowedGroupId).toBe(group!.id);
    await update({ agentPolicy: { scmToolsAllowedGroupId: "" } });
    expect((await read()).agentPolicy?.scmToolsAllowedGroupId).toBe("");
  });

  test("what changed is told by name, once; what changes nothing is not told", async () => {
    const { organizationId } = plane;
    const stream = await watchEvents(member.client);
    const before = await auditActions(plane, organizationId);
    const trace = await traces(plane, ResourceType.ORGANIZATION_POLICY);
    await update({});
    await update({ membersCreateProjects: true, allowedEditorIds: [""], agentPolicy: {} });
    expect(await traces(plane, ResourceType.ORGANIZATION_POLICY)).toEqual(trace);
    await update({ webBrowserDisabled: true, defaultEditorId: "zed" });
    await stream.next(eventText(ResourceType.ORGANIZATION_POLICY, ResourceOperation.UPDATE, organizationId));
    stream.stop();
    const told = "Organization policies changed: default_editor_id, web_browser_disabled";
    expect((await auditActions(plane, organizationId)).slice(before.length)).toEqual([told]);
    await update({ webBrowserDisabled: false, defaultEditorId: "" });
  });

  test("changes of different policies at once all survive", async () => {
    await Promise.all([
      update({ membersRequireProjects: true }),
      update({ disableFromScratch: true }),
      update({ portSharingDisabled: true }),
      update({ webBrowserDisabled: true }),
    ]);
    expect(await read()).toMatchObject({
      ...{
        membersRequireProjects: true,
        disableFromScratch: true,
        portSharingDisabled: true,
        webBrowserDisabled: true,
      },
    });
    await update({
      ...{
        membersRequireProjects: false,
        disableFromScratch: false,
        portSharingDisabled: false,
        webBrowserDisabled: false,
      },
    });
  });
});

describe("ORG-27 what is no policy is refused by the name of its field, and nothing is changed", () => {
  const many = (count: number) => Array.from({ length: count }, (_, index) => `entry ${index}`);
  const agent = { name: "sensor", startCommand: "run" };
  const crowdstrike = { enabled: true, image: "falcon", cidSecretId: uuidv7() };
  const refused: [field: string, changes: Changes][] = [
    ["maximum_environment_timeout", { maximumEnvironmentTimeout: durationFromMs(1_799_000) }],
    ["maximum_environment_timeout", { maximumEnvironmentTimeout: durationFromMs(-1_000) }],
    ["archive_environments_after", { archiveEnvironmentsAfter: durationFromMs(1.5 * DAY_MS) }],
    ["archive_environments_after", { archiveEnvironmentsAfter: NEVER }],
    ["archive_environments_after", { archiveEnvironmentsAfter: durationFromMs(31 * DAY_MS) }],
    ["delete_archived_environments_after", { deleteArchivedEnvironmentsAfter: durationFromMs(28 * DAY_MS + 1_000) }],
    ["delete_archived_environments_after", { deleteArchivedEnvironmentsAfter: durationFromMs(-1_000) }],
    ["maximum_environment_lifetime", { maximumEnvironmentLifetime: durationFromMs(180 * DAY_MS + 1_000) }],
    ["maximum_running_environments_per_user", { maximumRunningEnvironmentsPerUser: -1n }],
    ["maximum_running_environments_per_user", { maximumRunningEnvironmentsPerUser: 10_001n }],
    ["maximum_environments_per_user", { maximumEnvironmentsPerUser: -1n }],
    ["default_environment_image", { defaultEnvironmentImage: "an image" }],
    ["default_environment_image", { defaultEnvironmentImage: "x".repeat(1025) }],
    ["max_port_admission_level", { maxPortAdmissionLevel: 99 as AdmissionLevel }],
    ["security_policy_id", { securityPolicyId: uuidv7() }],
    ["allowed_editor_ids[1]", { allowedEditorIds: ["vscode", "x".repeat(129)] }],
    ["allowed_editor_ids[0]", { allowedEditorIds: ["", "vscode"] }],
    ["allowed_editor_ids", { allowedEditorIds: many(101) }],
    ["default_editor_id", { allowedEditorIds: ["vscode"], defaultEditorId: "zed" }],
    ["default_editor_id", { defaultEditorId: "x".repeat(129) }],
    ["editor_version_restrictions[0]", { editorVersionRestrictions: { "": {}, zed: {} } }],
    ["editor_version_restrictions", { editorVersionRestrictions: { zed: { allowedVersions: [""] } } }],
    ["agent_policy.max_subagents_per_environment", { agentPolicy: { maxSubagentsPerEnvironment: 11 } }],
    ["agent_policy.command_deny_list", { agentPolicy: { commandDenyList: many(1001) } }],
    ["agent_policy.command_deny_list[0]", { agentPolicy: { commandDenyList: ["x".repeat(1025)] } }],
    ["agent_policy.allowed_agent_ids[0]", { agentPolicy: { allowedAgentIds: [""] } }],
    ["agent_policy.scm_tools_allowed_group_id", { agentPolicy: { scmToolsAllowedGroupId: uuidv7() } }],
    ["agent_policy.scm_tools_allowed_group_id", { agentPolicy: { scmToolsAllowedGroupId: "everybody" } }],
    ["agent_policy.conversation_sharing_policy", { agentPolicy: { conversationSharingPolicy: 9 as never } }],
    [
      "agent_policy.allowed_codex_reasoning_efforts[0]",
      { agentPolicy: { allowedCodexReasoningEfforts: [99 as never] } },
    ],
    ["agent_policy.allowed_codex_service_tiers[0]", { agentPolicy: { allowedCodexServiceTiers: [0 as never] } }],
    ["agent_policy.allowed_codex_models[0]", { agentPolicy: { allowedCodexModels: [99 as never] } }],
    [
      "agent_policy.codex_model_policy.model_states",
      { agentPolicy: { codexModelPolicy: { modelStates: { "gpt-1": 2 } } } },
    ],
    ["security_agent_policy.crowdstrike.image", { securityAgentPolicy: { crowdstrike: { enabled: true, image: "" } } }],
    ["security_agent_policy.crowdstrike.cid_secret_id", { securityAgentPolicy: { crowdstrike } }],
    [
      "security_agent_policy.crowdstrike.additional_options",
      { securityAgentPolicy: { crowdstrike: { additionalOptions: { FALCONCTL_OPT_TRACE: "1" } } } },
    ],
    [
      "security_agent_policy.crowdstrike.additional_options",
      { securityAgentPolicy: { crowdstrike: { additionalOptions: { trace: "1" } } } },
    ],
    ["security_agent_policy.custom_agents[0].name", { securityAgentPolicy: { customAgents: [{ startCommand: "x" }] } }],
    ["security_agent_policy.custom_agents[1].name", { securityAgentPolicy: { customAgents: [agent, agent] } }],
    [
      "security_agent_policy.custom_agents[0].start_command",
      { securityAgentPolicy: { customAgents: [{ name: "x" }] } },
    ],
    [
      "security_agent_policy.custom_agents[0].env_mappings",
      { securityAgentPolicy: { customAgents: [{ ...agent, envMappings: [{ name: "1", secretName: "x" }] }] } },
    ],
    [
      "security_agent_policy.custom_agents[0].env_mappings[0].secret_name",
      { securityAgentPolicy: { customAgents: [{ ...agent, envMappings: [{ name: "A", secretName: "unknown" }] }] } },
    ],
    ["veto_exec_policy.executables", { vetoExecPolicy: { executables: many(1001) } }],
    ["veto_exec_policy.action", { vetoExecPolicy: { action: 9 as never } }],
    ["veto_file_policy.paths.entries[0]", { vetoFilePolicy: { paths: { entries: [{ path: "" }] } } }],
    ["veto_file_policy.block_devices.action", { vetoFilePolicy: { blockDevices: { action: 9 as never } } }],
  ];

  test.each(refused.map(([field, changes], index) => ({ field, changes, index })))(
    "$index $field",
    async ({ field, changes }) => {
      const before = await read();
      const error = await refusal(update({ membersRequireProjects: true, ...changes }));
      expect(Code[error.code]).toBe("InvalidArgument");
      expect(violatedFields(error)).toContain(field);
      expect(await read()).toEqual(before);
    },
  );

  test("a default editor falls with the list that allowed it", async () => {
    await update({ defaultEditorId: "zed" });
    const error = await refusal(update({ allowedEditorIds: ["vscode"] }));
    expect(violatedFields(error)).toEqual(["allowed_editor_ids"]);
    // By its id or its alias, as it pleases.
    await update({ allowedEditorIds: ["6e60ecd0-bfea-43bd-b068-9996324c0376"] });
    await update({ allowedEditorIds: [""], defaultEditorId: "" });
  });
});

describe("policies take hold", () => {
  let runner: FakeRunner;
  let classId: string;

  beforeAll(async () => {
    ({ runner, classId } = await connectRunner(plane));
  });
  // Its lease is shorter than these tests may take on a busy machine.
  beforeEach(() => runner.heartbeat());
  afterAll(() => runner[Symbol.asyncDispose]());

  const make = async ({ client }: { client: TestUser["client"] } = member, spec = {}): Promise<Environment> => {
    const created = await client.environments.createEnvironment({ spec: { machine: { class: classId }, ...spec } });
    return created.environment as Environment;
  };
  const desired = async (environmentId: string) => {
    const { environment } = await plane.admin.environments.getEnvironment({ environmentId });
    return environment?.spec?.desiredPhase;
  };
  const discard = ({ id }: Environment) =>
    plane.admin.environments.deleteEnvironment({ environmentId: id, force: true });

  test("ORG-30 at the limit of running ones a start is RESOURCE_EXHAUSTED and names it, above it works", async () => {
    const [first, second] = [await make(), await make()];
    await member.client.environments.stopEnvironment({ environmentId: second.id });
    await runner.report(second.id, {});
    await update({ maximumRunningEnvironmentsPerUser: 1n });
    const start = () => member.client.environments.startEnvironment({ environmentId: second.id });
    const error = await refusal(start());
    expect([Code[error.code], policyOf(error)]).toEqual(["ResourceExhausted", "maximum_running_environments_per_user"]);
    await update({ maximumRunningEnvironmentsPerUser: 2n });
    await start();
    await update({ maximumRunningEnvironmentsPerUser: 10n });
    for (const each of [first, second]) await discard(each);
  });

  test("ORG-31 a strict lifetime ends environments made under it, and no older ones", async () => {
    const older = await make();
    await update({ maximumEnvironmentLifetime: durationFromMs(DAY_MS), maximumEnvironmentLifetimeStrict: true });
    const made = await make();
    for (const each of [older, made]) {
      await member.client.environments.stopEnvironment({ environmentId: each.id });
      await runner.report(each.id, {});
    }
    plane.advance(DAY_MS + 1_000);
    await member.client.environments.startEnvironment({ environmentId: older.id });
    const error = await refusal(member.client.environments.startEnvironment({ environmentId: made.id }));
    expect(Code[error.code]).toBe("FailedPrecondition");
    const [detail] = error.findDetails(PolicyEnforcedFailedPreconditionDetailsSchema);
    expect(detail).toMatchObject({ policyName: "maximum_environment_lifetime_strict" });
    expect(detail?.details).toMatchObject({
      case: "maxLifetimeExceeded",
      value: { expiredAt: made.metadata?.lockdownAt, policyValue: durationFromMs(DAY_MS) },
    });
    await update({ maximumEnvironmentLifetime: NEVER, maximumEnvironmentLifetimeStrict: false });
    for (const each of [older, made]) await discard(each);
  });

  test("ORG-47 a limit by role is PERMISSION_DENIED, a forbidden value FAILED_PRECONDITION, a count RESOURCE_EXHAUSTED", async () => {
    const refusedBy = async (changes: Changes, restored: Changes, spec = {}) => {
      await update(changes);
      const error = await refusal(make(member, spec));
      await update(restored);
      return [Code[error.code], policyOf(error)];
    };
    expect(await refusedBy({ membersRequireProjects: true }, { membersRequireProjects: false })).toEqual([
      ...["PermissionDenied", "members_require_projects"],
    ]);
    expect(await refusedBy({ disableFromScratch: true }, { disableFromScratch: false })).toEqual([
      ...["PermissionDenied", "disable_from_scratch"],
    ]);
    const timeout = { maximumEnvironmentTimeout: durationFromMs(1_800_000) };
    const long = { timeout: { disconnected: durationFromMs(1_801_000) } };
    expect(await refusedBy(timeout, { maximumEnvironmentTimeout: NEVER }, long)).toEqual([
      ...["FailedPrecondition", "maximum_environment_timeout"],
    ]);
    const own = await make();
    expect(await refusedBy({ maximumEnvironmentsPerUser: 1n }, { maximumEnvironmentsPerUser: 50n })).toEqual([
      ...["ResourceExhausted", "maximum_environments_per_user"],
    ]);
    await discard(own);
  });

  test("ORG-50 archived environments do not count, until they are unarchived", async () => {
    const old = await make();
    const { environments } = member.client;
    await environments.archiveEnvironment({ environmentId: old.id });
    await runner.report(old.id, {});
    await update({ maximumEnvironmentsPerUser: 1n });
    const fresh = await make();
    const error = await refusal(environments.unarchiveEnvironment({ environmentId: old.id }));
    expect([Code[error.code], policyOf(error)]).toEqual(["ResourceExhausted", "maximum_environments_per_user"]);
    await update({ maximumEnvironmentsPerUser: 50n });
    for (const each of [old, fresh]) await discard(each);
  });

  test("RUN-21 local runners switched off stop what runs on them, and take nothing more until they are on again", async () => {
    void runner.watch();
    const environment = await make();
    await runner.reportRunning(environment);
    await update({ allowLocalRunners: false });
    expect(await desired(environment.id)).toBe(EnvironmentPhase.STOPPED);
    await runner.desired(environment.id, ({ spec }) => spec?.desiredPhase === EnvironmentPhase.STOPPED);
    await runner.report(environment.id, {});
    const status = async () => (await plane.admin.runners.getRunner({ runnerId: runner.id })).runner?.status;
    expect(await status()).toMatchObject({ phase: RunnerPhase.INACTIVE, message: "local runners are disabled" });
    await runner.heartbeat();
    expect((await status())?.phase).toBe(RunnerPhase.INACTIVE);
    const start = () => member.client.environments.startEnvironment({ environmentId: environment.id });
    for (const call of [start, make]) {
      const error = await refusal(call());
      expect([Code[error.code], policyOf(error)]).toEqual(["FailedPrecondition", "allow_local_runners"]);
    }
    await update({ allowLocalRunners: true });
    await runner.heartbeat();
    expect((await status())?.phase).toBe(RunnerPhase.ACTIVE);
    expect(await desired(environment.id)).toBe(EnvironmentPhase.STOPPED);
    await start();
    await discard(environment);
  });

  test("RUN-21 more than one transaction stops, and one that was under way, are stopped all the same", async () => {
    await update({ maximumRunningEnvironmentsPerUser: 0n, maximumEnvironmentsPerUser: 0n });
    const made = await Promise.all(Array.from({ length: 25 }, () => make()));
    await update({ allowLocalRunners: false });
    const running = async () => {
      const phases = await Promise.all(made.map(({ id }) => desired(id)));
      return phases.filter((phase) => phase === EnvironmentPhase.RUNNING).length;
    };
    expect(await running()).toBeGreaterThan(0);
    await eventually(async () => (await running()) === 0, "all of them are asked to stop");

    // What a call does that had read the policies before they changed.
    const late = made[0]!.id;
    const { app } = plane.plane;
    await runner.report(late, {});
    await transact(app, async (tx) => {
      const stored = await lockEnvironment(tx, late);
      if (!stored) throw new Error("the environment is gone");
      const start = requestStart(stored, { machineSession: uuidv7(), secrets: [] }, app.now());
      if (start.kind !== "changed") throw new Error("it cannot be started");
      await advanceEnvironment(tx, stored, start.next, { actor: SYSTEM, newId: app.newId, at: app.now() });
    });
    expect(await desired(late)).toBe(EnvironmentPhase.RUNNING);
    plane.advance(60_000);
    await eventually(async () => (await desired(late)) === EnvironmentPhase.STOPPED, "the late one is stopped");

    plane.advance(15 * 60_000);
    await eventually(async () => !(await app.db.point`select from halts`).length, "the order is over");
    await update({ allowLocalRunners: true });
    await runner.heartbeat();
    for (const each of made) await discard(each);
  });
});
