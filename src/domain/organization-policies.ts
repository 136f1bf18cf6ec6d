import { clone, create, equals, toJson } from "@bufbuild/protobuf";
import { type DeliveredPolicies, DeliveredPoliciesSchema } from "../../gen/berth/runner/v1/runner_control_pb.js";
import { CodexOpenAIModel, CodexReasoningEffort, CodexServiceTier } from "../../gen/gitpod/v1/agent_pb.js";
import { AdmissionLevel, KernelControlsAction, VetoFileSurface } from "../../gen/gitpod/v1/environment_pb.js";
import {
  type AgentPolicy,
  AgentPolicySchema,
  CodexModelPolicySchema,
  CodexModelPolicyState,
  ConversationSharingPolicy,
  type CrowdStrikeConfig,
  CrowdStrikeConfigSchema,
  type CustomSecurityAgent,
  CustomSecurityAgentSchema,
  type EditorVersionPolicy,
  EditorVersionPolicySchema,
  type OrganizationPolicies,
  OrganizationPoliciesSchema,
  type SecurityAgentPolicy,
  SecurityAgentPolicySchema,
  type UpdateOrganizationPoliciesRequest_UpdateAgentPolicy as UpdateAgentPolicy,
  type UpdateOrganizationPoliciesRequest_UpdateCrowdStrikeConfig as UpdateCrowdStrikeConfig,
  type UpdateOrganizationPoliciesRequest,
  type UpdateOrganizationPoliciesRequest_UpdateSecurityAgentPolicy as UpdateSecurityAgentPolicy,
  type VetoExecPolicy,
  VetoExecPolicySchema,
  type VetoFilePolicy,
} from "../../gen/gitpod/v1/organization_pb.js";
import { editorByIdOrAlias, isEditorAllowed } from "./editors.ts";
import type { FieldProblem } from "./errors.ts";
import { imageProblem } from "./images.ts";

// Absent scalars and messages keep what they are. Lists and maps have no presence: an empty one keeps too, and one that
// holds nothing but an empty text clears; except where it lies in a message that has presence, with which it is replaced.

const MAX_COUNT = 10_000n;
const NAME_LENGTH = 128;
const TEXT_LENGTH = 1024;
const COMMAND_LENGTH = 1024;
const PATH_LENGTH = 4096;
const EDITORS = 100;
const VERSIONS = 100;
const RULES = 1000;
const AGENTS = 100;
const OPTIONS = 100;
const OPTION = /^[A-Z0-9_]+$/;
const OPTION_PREFIX = "FALCONCTL_OPT_";

/** Everything that an update makes of policies, and everything that is wrong with it. */
export interface PolicyUpdate {
  next: OrganizationPolicies;
  problems: FieldProblem[];
}

/** Ids and names in policies that have to exist in the organization; `field` is where the request has them. */
export interface PolicyReferences {
  group?: { id: string; field: string };
  secretIds: { id: string; field: string }[];
  secretNames: { name: string; field: string }[];
}

type Problems = (field: string, message: string, wrong: boolean) => void;

const unique = <T>(items: readonly T[]): T[] => [...new Set(items)];
const length = (text: string) => [...text].length;

/** A list without presence. */
function replaced<T>(sent: readonly T[], kept: readonly T[], empty: T): T[] {
  if (sent.length === 0) return [...kept];
  return sent.length === 1 && sent[0] === empty ? [] : unique(sent);
}

/** A map without presence. */
function replacedMap<T>(sent: Readonly<Record<string, T>>, kept: Readonly<Record<string, T>>): Record<string, T> {
  const keys = Object.keys(sent);
  if (keys.length === 0) return { ...kept };
  return keys.length === 1 && keys[0] === "" ? {} : { ...sent };
}

function checkTexts(check: Problems, field: string, texts: readonly string[], most: number, longest: number): void {
  check(field, `must have at most ${most} entries`, texts.length > most);
  for (const [index, text] of texts.entries())
    check(`${field}[${index}]`, `must have 1 to ${longest} characters`, !text || length(text) > longest);
}

function checkKnown(check: Problems, field: string, values: readonly number[], known: object): void {
  for (const [index, value] of values.entries())
    check(`${field}[${index}]`, "is not a known value", value === 0 || !(value in known));
}

const MODEL_PREFIX = "CODEX_OPEN_AI_MODEL_";
/** Names of models as the contract spells them, and as their maker does: `gpt-5.4-mini`. */
const CODEX_MODELS: ReadonlySet<string> = new Set(
  Object.values(CodexOpenAIModel)
    .filter((name) => typeof name === "string" && name !== `${MODEL_PREFIX}UNSPECIFIED`)
    .flatMap((name) => {
      const plain = String(name).slice(MODEL_PREFIX.length).toLowerCase();
      return [String(name), plain.replace(/_(\d+)_(\d+)/, "-$1.$2").replaceAll("_", "-")];
    }),
);

function agentPolicy(before: AgentPolicy | undefined, sent: UpdateAgentPolicy, check: Problems): AgentPolicy {
  const next = before ? clone(AgentPolicySchema, before) : create(AgentPolicySchema);
  const field = (name: string) => `agent_policy.${name}`;
  next.mcpDisabled = sent.mcpDisabled ?? next.mcpDisabled;
  next.scmToolsDisabled = sent.scmToolsDisabled ?? next.scmToolsDisabled;
  next.goalModeDisabled = sent.goalModeDisabled ?? next.goalModeDisabled;
  next.scmToolsAllowedGroupId = sent.scmToolsAllowedGroupId?.toLowerCase() ?? next.scmToolsAllowedGroupId;
  next.maxSubagentsPerEnvironment = sent.maxSubagentsPerEnvironment ?? next.maxSubagentsPerEnvironment;
  next.commandDenyList = replaced(sent.commandDenyList, next.commandDenyList, "");
  checkTexts(check, field("command_deny_list"), next.commandDenyList, RULES, COMMAND_LENGTH);
  if (sent.conversationSharingPolicy !== undefined) {
    next.conversationSharingPolicy = sent.conversationSharingPolicy || ConversationSharingPolicy.DISABLED;
    const isKnown = next.conversationSharingPolicy in ConversationSharingPolicy;
    check(field("conversation_sharing_policy"), "is not a known policy", !isKnown);
  }
  next.allowedAgentIds = unique(sent.allowedAgentIds);
  checkTexts(check, field("allowed_agent_ids"), next.allowedAgentIds, RULES, NAME_LENGTH);
  next.allowedCodexReasoningEfforts = unique(sent.allowedCodexReasoningEfforts);
  checkKnown(check, field("allowed_codex_reasoning_efforts"), next.allowedCodexReasoningEfforts, CodexReasoningEffort);
  next.allowedCodexServiceTiers = unique(sent.allowedCodexServiceTiers);
  checkKnown(check, field("allowed_codex_service_tiers"), next.allowedCodexServiceTiers, CodexServiceTier);
  if (sent.codexModelPolicy) {
    const states = Object.entries(sent.codexModelPolicy.modelStates);
    for (const [name, state] of states) {
      check(field("codex_model_policy.model_states"), `${name} is not a known model`, !CODEX_MODELS.has(name));
      check(field("codex_model_policy.model_states"), "has an unknown state", !(state in CodexModelPolicyState));
    }
    const disabled = states.filter(([, state]) => state === CodexModelPolicyState.DISABLED);
    next.codexModelPolicy = disabled.length
      ? create(CodexModelPolicySchema, { modelStates: Object.fromEntries(disabled) })
      : undefined;
  } else if (sent.allowedCodexModels.length) {
    next.allowedCodexModels = replaced(sent.allowedCodexModels, [], CodexOpenAIModel.CODEX_OPEN_AI_MODEL_UNSPECIFIED);
    checkKnown(check, field("allowed_codex_models"), next.allowedCodexModels, CodexOpenAIModel);
  }
  return next;
}

function crowdstrike(before: CrowdStrikeConfig | undefined, sent: UpdateCrowdStrikeConfig, check: Problems) {
  const next = before ? clone(CrowdStrikeConfigSchema, before) : create(CrowdStrikeConfigSchema);
  const field = (name: string) => `security_agent_policy.crowdstrike.${name}`;
  next.enabled = sent.enabled ?? next.enabled;
  next.image = sent.image ?? next.image;
  next.cidSecretId = sent.cidSecretId?.toLowerCase() ?? next.cidSecretId;
  next.tags = sent.tags ?? next.tags;
  next.additionalOptions = replacedMap(sent.additionalOptions, next.additionalOptions);
  check(field("image"), "is required while the sensor is enabled", next.enabled && !next.image);
  check(field("image"), imageProblem(next.image) ?? "", imageProblem(next.image) !== undefined);
  check(field("cid_secret_id"), "is required while the sensor is enabled", next.enabled && !next.cidSecretId);
  check(field("tags"), `must have at most ${TEXT_LENGTH} characters`, length(next.tags) > TEXT_LENGTH);
  const options = Object.entries(next.additionalOptions);
  check(field("additional_options"), `must have at most ${OPTIONS} entries`, options.length > OPTIONS);
  for (const [name, value] of options) {
    const isName = OPTION.test(name) && name.length <= NAME_LENGTH && !name.startsWith(OPTION_PREFIX);
    const message = `names must be upper-case letters, digits and _, without ${OPTION_PREFIX}`;
    check(field("additional_options"), message, !isName);
    check(
      field("additional_options"),
      `values must have at most ${TEXT_LENGTH} characters`,
      length(value) > TEXT_LENGTH,
    );
  }
  return next;
}

function customAgents(
  before: readonly CustomSecurityAgent[],
  sent: readonly CustomSecurityAgent[],
  check: Problems,
  newId: () => string,
): CustomSecurityAgent[] {
  const field = (index: number, name: string) => `security_agent_policy.custom_agents[${index}].${name}`;
  const agents = sent.map((agent) => {
    // One that is sent again without its id stays the same.
    const id = agent.id || before.find(({ name }) => name === agent.name)?.id || newId();
    return { ...clone(CustomSecurityAgentSchema, agent), id };
  });
  check("security_agent_policy.custom_agents", `must have at most ${AGENTS} entries`, agents.length > AGENTS);
  for (const [index, agent] of agents.entries()) {
    const rest = agents.slice(0, index);
    check(
      field(index, "name"),
      `must have 1 to ${NAME_LENGTH} characters`,
      !agent.name || length(agent.name) > NAME_LENGTH,
    );
    check(
      field(index, "name"),
      "must be unique",
      rest.some(({ name }) => name === agent.name),
    );
    check(field(index, "id"), `must have at most ${NAME_LENGTH} characters`, length(agent.id) > NAME_LENGTH);
    check(
      field(index, "id"),
      "must be unique",
      rest.some(({ id }) => id === agent.id),
    );
    const isLong = length(agent.startCommand) > PATH_LENGTH;
    check(
      field(index, "start_command"),
      `must have 1 to ${PATH_LENGTH} characters`,
      !agent.startCommand.trim() || isLong,
    );
    check(
      field(index, "description"),
      `must have at most ${TEXT_LENGTH} characters`,
      length(agent.description) > TEXT_LENGTH,
    );
    const names = agent.envMappings.map(({ name }) => name);
    check(field(index, "env_mappings"), `must have at most ${OPTIONS} entries`, names.length > OPTIONS);
    check(field(index, "env_mappings"), "must have unique names", unique(names).length < names.length);
    const isBad = names.some((name) => !/^[A-Za-z_][A-Za-z0-9_]*$/.test(name) || name.length > NAME_LENGTH);
    check(field(index, "env_mappings"), "must have names of variables", isBad);
  }
  return agents;
}

function securityAgents(
  before: SecurityAgentPolicy | undefined,
  sent: UpdateSecurityAgentPolicy,
  check: Problems,
  newId: () => string,
): SecurityAgentPolicy {
  return create(SecurityAgentPolicySchema, {
    crowdstrike: sent.crowdstrike ? crowdstrike(before?.crowdstrike, sent.crowdstrike, check) : before?.crowdstrike,
    customAgents: customAgents(before?.customAgents ?? [], sent.customAgents, check, newId),
  });
}

function execRules(sent: VetoExecPolicy, check: Problems): VetoExecPolicy {
  const action = sent.action || KernelControlsAction.BLOCK;
  const executables = unique(sent.executables);
  checkTexts(check, "veto_exec_policy.executables", executables, RULES, PATH_LENGTH);
  check("veto_exec_policy.action", "is not a known action", !(action in KernelControlsAction));
  return create(VetoExecPolicySchema, { enabled: sent.enabled, executables, action });
}

function fileRules(sent: VetoFilePolicy, check: Problems): VetoFilePolicy {
  const { paths, blockDevices } = sent;
  const entries = paths?.entries ?? [];
  const isAction = (value: number) => value in KernelControlsAction;
  const isSurface = (value: number) => value in VetoFileSurface;
  const field = (name: string) => `veto_file_policy.paths.${name}`;
  checkTexts(
    check,
    field("entries"),
    entries.map(({ path }) => path),
    RULES,
    PATH_LENGTH,
  );
  for (const [index, { surface, effect }] of entries.entries())
    check(field(`entries[${index}]`), "has an unknown surface or effect", !isSurface(surface) || !isAction(effect));
  check(field("default_surface"), "is not a known surface", !isSurface(paths?.defaultSurface ?? 0));
  check(field("default_effect"), "is not a known effect", !isAction(paths?.defaultEffect ?? 0));
  check("veto_file_policy.block_devices.action", "is not a known action", !isAction(blockDevices?.action ?? 0));
  return sent;
}

function editorVersions(
  before: Readonly<Record<string, EditorVersionPolicy>>,
  sent: Readonly<Record<string, EditorVersionPolicy>>,
  check: Problems,
): Record<string, EditorVersionPolicy> {
  const field = "editor_version_restrictions";
  const next = replacedMap(sent, before);
  checkTexts(check, field, Object.keys(next), EDITORS, NAME_LENGTH);
  const entries = Object.entries(next).map(([editor, policy]) => {
    const allowedVersions = unique(policy.allowedVersions);
    const isBad = allowedVersions.some((version) => !version || length(version) > NAME_LENGTH);
    check(field, `versions must have 1 to ${NAME_LENGTH} characters`, isBad);
    check(field, `must have at most ${VERSIONS} versions of an editor`, allowedVersions.length > VERSIONS);
    return [editor, create(EditorVersionPolicySchema, { allowedVersions })] as const;
  });
  return Object.fromEntries(entries);
}

const KEPT = [
  "maximumEnvironmentTimeout",
  "membersRequireProjects",
  "membersCreateProjects",
  "defaultEditorId",
  "allowLocalRunners",
  "maximumRunningEnvironmentsPerUser",
  "maximumEnvironmentsPerUser",
  "defaultEnvironmentImage",
  "portSharingDisabled",
  "deleteArchivedEnvironmentsAfter",
  "maximumEnvironmentLifetime",
  "requireCustomDomainAccess",
  "restrictAccountCreationToScim",
  "maximumEnvironmentLifetimeStrict",
  "maxPortAdmissionLevel",
  "webBrowserDisabled",
  "disableFromScratch",
  "archiveEnvironmentsAfter",
] as const satisfies (keyof OrganizationPolicies & keyof UpdateOrganizationPoliciesRequest)[];

/** The scalars that were sent. */
function scalars(sent: UpdateOrganizationPoliciesRequest): Partial<OrganizationPolicies> {
  return Object.fromEntries(KEPT.flatMap((name) => (sent[name] === undefined ? [] : [[name, sent[name]]])));
}

function checkScalars(next: OrganizationPolicies, sent: UpdateOrganizationPoliciesRequest, check: Problems): void {
  const isCount = (count: bigint) => count >= 0n && count <= MAX_COUNT;
  const countMessage = `must be between 0 and ${MAX_COUNT}`;
  const { maximumRunningEnvironmentsPerUser: running, maximumEnvironmentsPerUser: total } = next;
  check("maximum_running_environments_per_user", countMessage, !isCount(running));
  check("maximum_environments_per_user", countMessage, !isCount(total));
  const image = imageProblem(next.defaultEnvironmentImage);
  check("default_environment_image", image ?? "", image !== undefined);
  check("max_port_admission_level", "is not a known level", !(next.maxPortAdmissionLevel in AdmissionLevel));
  check("security_policy_id", "must be empty: there are no security policies", Boolean(sent.securityPolicyId));
}

/** Editors that policies name need not exist, but the default must be one that they allow. */
function checkEditors(next: OrganizationPolicies, sent: UpdateOrganizationPoliciesRequest, check: Problems): void {
  const { allowedEditorIds: allowed, defaultEditorId } = next;
  checkTexts(check, "allowed_editor_ids", allowed, EDITORS, NAME_LENGTH);
  check("default_editor_id", `must have at most ${NAME_LENGTH} characters`, length(defaultEditorId) > NAME_LENGTH);
  if (!defaultEditorId || allowed.length === 0 || allowed.includes(defaultEditorId)) return;
  const editor = editorByIdOrAlias(defaultEditorId);
  const isAllowed = editor !== undefined && isEditorAllowed(next, editor);
  const field = sent.defaultEditorId === undefined ? "allowed_editor_ids" : "default_editor_id";
  check(field, "the default editor must be one of the allowed ones", !isAllowed);
}

/** What UpdateOrganizationPolicies makes of policies; rules across fields look at the result. `newId` names agents. */
export function updatedPolicies(
  before: OrganizationPolicies,
  sent: UpdateOrganizationPoliciesRequest,
  newId: () => string,
): PolicyUpdate {
  const problems: FieldProblem[] = [];
  const check: Problems = (field, message, wrong) => void (wrong && problems.push({ field, message }));
  const next: OrganizationPolicies = {
    ...clone(OrganizationPoliciesSchema, before),
    ...scalars(sent),
    allowedEditorIds: replaced(sent.allowedEditorIds, before.allowedEditorIds, ""),
    editorVersionRestrictions: editorVersions(before.editorVersionRestrictions, sent.editorVersionRestrictions, check),
  };
  if (sent.agentPolicy) next.agentPolicy = agentPolicy(before.agentPolicy, sent.agentPolicy, check);
  if (sent.securityAgentPolicy)
    next.securityAgentPolicy = securityAgents(before.securityAgentPolicy, sent.securityAgentPolicy, check, newId);
  if (sent.vetoExecPolicy) next.vetoExecPolicy = execRules(sent.vetoExecPolicy, check);
  if (sent.vetoFilePolicy) next.vetoFilePolicy = fileRules(sent.vetoFilePolicy, check);
  checkScalars(next, sent, check);
  checkEditors(next, sent, check);
  return { next, problems };
}

/** Names of the policies that differ. */
export function changedPolicies(before: OrganizationPolicies, next: OrganizationPolicies): string[] {
  const [old, fresh] = [before, next].map(
    (each) => toJson(OrganizationPoliciesSchema, each) as Record<string, unknown>,
  );
  return OrganizationPoliciesSchema.fields
    .filter(({ jsonName: key }) => JSON.stringify(old?.[key]) !== JSON.stringify(fresh?.[key]))
    .map(({ name }) => name);
}

/** What an update refers to. What it leaves alone need not exist any more. */
export function policyReferences(
  next: OrganizationPolicies,
  { agentPolicy, securityAgentPolicy }: UpdateOrganizationPoliciesRequest,
): PolicyReferences {
  const groupId = agentPolicy?.scmToolsAllowedGroupId && next.agentPolicy?.scmToolsAllowedGroupId;
  const cidSecretId = securityAgentPolicy?.crowdstrike && next.securityAgentPolicy?.crowdstrike?.cidSecretId;
  const agents = securityAgentPolicy ? (next.securityAgentPolicy?.customAgents ?? []) : [];
  return {
    ...(groupId && { group: { id: groupId, field: "agent_policy.scm_tools_allowed_group_id" } }),
    secretIds: cidSecretId ? [{ id: cidSecretId, field: "security_agent_policy.crowdstrike.cid_secret_id" }] : [],
    secretNames: agents.flatMap(({ envMappings }, index) =>
      envMappings.map(({ secretName }, mapping) => ({
        name: secretName,
        field: `security_agent_policy.custom_agents[${index}].env_mappings[${mapping}].secret_name`,
      })),
    ),
  };
}

/** What runners have to know of policies. */
export const deliveredPolicies = ({
  portSharingDisabled,
  webBrowserDisabled,
  agentPolicy,
  securityAgentPolicy,
}: OrganizationPolicies): DeliveredPolicies =>
  create(DeliveredPoliciesSchema, { portSharingDisabled, webBrowserDisabled, agentPolicy, securityAgentPolicy });

/** Whether a change of policies is one for runners to hear of. */
export const concernsRunners = (before: OrganizationPolicies, next: OrganizationPolicies): boolean =>
  !equals(DeliveredPoliciesSchema, deliveredPolicies(before), deliveredPolicies(next));

/** Policies as a caller may read them: security agents are for admins, who always get a whole message to change. */
export function visiblePolicies(policies: OrganizationPolicies, isAdmin: boolean): OrganizationPolicies {
  const securityAgentPolicy = isAdmin ? (policies.securityAgentPolicy ?? create(SecurityAgentPolicySchema)) : undefined;
  return { ...policies, securityAgentPolicy };
}
