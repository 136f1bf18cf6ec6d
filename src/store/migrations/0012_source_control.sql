-- How a runner reaches and signs in to a host, and the credentials that people hold for hosts on runners.

create table scm_integrations (
  id uuid primary key,
  organization_id uuid not null references organizations,
  runner_id uuid not null references runners,
  host text not null,
  scm_id text not null,
  pat boolean not null,
  oauth boolean not null,
  -- Whole message; the client secret in it is sealed to the runner's key.
  message bytea not null,
  unique (runner_id, host)
);
create index scm_integrations_list on scm_integrations (organization_id, id);

create table host_tokens (
  id uuid primary key,
  organization_id uuid not null references organizations,
  runner_id uuid not null references runners,
  host text not null,
  subject_id uuid not null,
  subject_principal smallint not null,
  source smallint not null,
  integration_id uuid references scm_integrations on delete set null,
  scopes text[] not null,
  expires_at timestamptz,
  sealed_token bytea not null,
  sealed_refresh_token bytea,
  -- Orders the secrets that this token has had; a renewal names the one that it renews.
  version bigint not null default 1,
  -- Why the host no longer takes it; null while it is good.
  invalid_reason text,
  -- Until when one caller alone renews it.
  refresh_lease_until timestamptz,
  created_at timestamptz not null
);
create index host_tokens_list on host_tokens (organization_id, id);
create index host_tokens_subject on host_tokens (subject_id, id);
create index host_tokens_host on host_tokens (runner_id, host, subject_id, id);
create index host_tokens_expiry on host_tokens (expires_at) where expires_at is not null and sealed_refresh_token is null;

-- The local configuration runner has no process: the control plane keeps its key for it, under a data key.
alter table runners add column sealed_private_key bytea;
