-- Ids are UUIDv7 made by the program. Messages are kept whole as protobuf (bytea) beside the columns that are filtered,
-- sorted or joined on. Enum columns hold the wire numbers.

create table installation (
  singleton boolean primary key default true check (singleton),
  control_plane_id uuid not null,
  -- HMAC of a fixed text under the master key: a process with another key must not start.
  master_key_check bytea not null,
  created_at timestamptz not null
);

create table organizations (
  id uuid primary key,
  name text not null,
  policies bytea not null,
  created_at timestamptz not null
);

create table accounts (
  id uuid primary key,
  owner_organization_id uuid references organizations,
  email text not null check (email = lower(email)),
  email_verified boolean not null,
  name text not null,
  avatar_url text not null default '',
  login_provider text not null,
  created_at timestamptz not null
);
create unique index accounts_email on accounts (coalesce(owner_organization_id, '00000000-0000-0000-0000-000000000000'), email);

create table users (
  id uuid primary key,
  organization_id uuid not null references organizations,
  account_id uuid not null references accounts,
  role smallint not null,
  status smallint not null,
  member_since timestamptz not null,
  unique (organization_id, account_id)
);

create table service_accounts (
  id uuid primary key,
  organization_id uuid not null references organizations,
  name text not null,
  suspended boolean not null default false,
  valid_until timestamptz,
  message bytea not null
);
create index service_accounts_list on service_accounts (organization_id, id);

create table groups (
  id uuid primary key,
  organization_id uuid not null references organizations,
  name text not null,
  description text not null default '',
  system_managed boolean not null default false,
  direct_share boolean not null default false,
  created_at timestamptz not null,
  updated_at timestamptz not null
);
create unique index groups_name on groups (organization_id, lower(name)) where not direct_share;

create table group_members (
  id uuid primary key,
  group_id uuid not null references groups on delete cascade,
  organization_id uuid not null,
  member_id uuid not null,
  member_principal smallint not null,
  created_at timestamptz not null,
  unique (group_id, member_id)
);
create index group_members_member on group_members (member_id, group_id);

create table role_assignments (
  id uuid primary key,
  organization_id uuid not null references organizations,
  group_id uuid not null references groups on delete cascade,
  resource_type smallint not null,
  resource_id uuid not null,
  resource_role smallint not null,
  created_at timestamptz not null,
  unique (group_id, resource_id, resource_role)
);
create index role_assignments_resource on role_assignments (resource_id, group_id, resource_role);

create table runners (
  id uuid primary key,
  organization_id uuid not null references organizations,
  creator_id uuid not null,
  creator_principal smallint not null,
  name text not null,
  kind smallint not null,
  provider smallint not null,
  runner_manager_id text not null default '',
  variant smallint not null,
  desired_phase smallint not null,
  phase smallint not null,
  spec bytea not null,
  status bytea not null,
  -- Latest published configuration schema; null until the first registration.
  configuration_schema bytea,
  max_environments integer,
  public_key bytea,
  -- Write-only value of the spec, under a data key.
  sealed_metrics_password bytea,
  created_at timestamptz not null,
  updated_at timestamptz not null,
  -- Link: one at a time, the newest registration wins.
  link_id uuid,
  epoch bigint not null default 0,
  lease_expires_at timestamptz,
  last_contact_at timestamptz,
  -- Last contact before the lease ran out; null again once no environment says any more that the runner is unreachable.
  lost_at timestamptz,
  -- What the runner said at its registration that it still holds.
  local_environment_ids uuid[] not null default '{}',
  deleting_at timestamptz,
  deleted_at timestamptz,
  -- Bumped in the transaction of every change the runner must know; its row lock orders the log below.
  head_revision bigint not null default 0
) with (fillfactor = 80);
create index runners_list on runners (organization_id, id) where deleted_at is null;
create index runners_lease on runners (lease_expires_at) where lease_expires_at is not null;
create index runners_lost on runners (id) where lost_at is not null and lease_expires_at is not null;
create index runners_deleting on runners (deleting_at) where deleting_at is not null and deleted_at is null;

create table runner_revisions (
  runner_id uuid not null references runners on delete cascade,
  revision bigint not null,
  object_kind smallint not null,
  object_id uuid not null,
  removed boolean not null default false,
  created_at timestamptz not null,
  primary key (runner_id, revision)
);
create index runner_revisions_age on runner_revisions (created_at);

create table runner_calls (
  id uuid primary key,
  runner_id uuid not null references runners on delete cascade,
  call bytea not null,
  deadline timestamptz not null,
  completion bytea,
  completed_at timestamptz,
  created_at timestamptz not null
);
create index runner_calls_open on runner_calls (runner_id, created_at) where completed_at is null;
create index runner_calls_age on runner_calls (created_at);

create table environment_classes (
  id uuid primary key,
  organization_id uuid not null references organizations,
  runner_id uuid not null references runners,
  enabled boolean not null,
  -- Whether the configuration satisfies the runner's current schema.
  fits boolean not null,
  message bytea not null
);
create index environment_classes_list on environment_classes (organization_id, id);
create index environment_classes_runner on environment_classes (runner_id, id);

create table environment_sessions (
  id uuid primary key,
  organization_id uuid not null references organizations,
  creator_id uuid not null,
  creator_principal smallint not null
);

create table environments (
  id uuid primary key,
  organization_id uuid not null references organizations,
  creator_id uuid not null,
  creator_principal smallint not null,
  runner_id uuid not null references runners,
  class_id uuid not null,
  project_id uuid,
  session_id uuid not null,
  role smallint not null,
  phase smallint not null,
  desired_phase smallint not null,
  admission smallint not null,
  created_at timestamptz not null,
  archived_at timestamptz,
  lockdown_at timestamptz,
  -- Lower-case text that ListEnvironments searches: id, name, repository URLs, branch.
  search text not null,
  metadata bytea not null,
  spec bytea not null,
  status bytea not null,
  -- Facts that are not on the wire, as JSON of domain/lifecycle.ts.
  facts text not null,
  -- Order of the last accepted report.
  report_epoch bigint not null default 0,
  report_seq bigint not null default 0,
  -- When a sweep must look at this row next; null when nothing can fall due.
  due_at timestamptz,
  deleted_at timestamptz
) with (fillfactor = 80);
create index environments_list on environments (organization_id, id);
create index environments_creator on environments (organization_id, creator_id, id);
create index environments_runner on environments (runner_id, id);
create index environments_archived on environments (organization_id, archived_at, id) where archived_at is not null;
create index environments_due on environments (due_at) where due_at is not null;

create table tokens (
  id uuid primary key,
  hash bytea not null unique,
  kind smallint not null,
  organization_id uuid not null references organizations,
  -- Whom the token acts for; for access, port and logs tokens the principal that asked for it.
  subject_id uuid not null,
  subject_principal smallint not null,
  environment_id uuid references environments on delete cascade,
  runner_id uuid references runners on delete cascade,
  port integer,
  read_only boolean not null default false,
  description text not null default '',
  created_at timestamptz not null,
  expires_at timestamptz,
  used_at timestamptz,
  last_used_at timestamptz
);
create index tokens_subject on tokens (subject_id, id);
create index tokens_environment on tokens (environment_id) where environment_id is not null;
create index tokens_expiry on tokens (expires_at) where expires_at is not null;

-- Events leave through one dispatcher per process. `xid` orders them by commit: a reader takes only rows below the
-- oldest transaction still running, or it would skip the rows of a slow one.
create table events (
  seq bigint generated always as identity primary key,
  xid xid8 not null default pg_current_xact_id(),
  organization_id uuid not null,
  environment_id uuid,
  runner_id uuid,
  resource_type smallint not null,
  resource_id uuid not null,
  operation smallint not null,
  creator_id uuid,
  -- Who could read the resource, written when it is gone and can no longer be asked.
  readers uuid[],
  created_at timestamptz not null
);
create index events_xid on events (xid, seq);
create index events_resource on events (resource_id, seq) where operation = 3;
create index events_age on events (created_at);

create table audit_log (
  id uuid primary key,
  organization_id uuid not null,
  actor_id uuid,
  actor_principal smallint not null,
  credential_id uuid,
  subject_id uuid,
  subject_type smallint not null,
  kind smallint not null,
  action text not null,
  created_at timestamptz not null
);
create index audit_log_list on audit_log (organization_id, id);

-- Only the retention job deletes, and says so in its own transaction.
create function refuse_audit_change() returns trigger language plpgsql as $$
begin
  if tg_op = 'DELETE' and current_setting('berth.audit_retention', true) = 'on' then
    return old;
  end if;
  raise exception 'the audit log is immutable';
end $$;
create trigger audit_log_immutable before update or delete on audit_log
  for each row execute function refuse_audit_change();
