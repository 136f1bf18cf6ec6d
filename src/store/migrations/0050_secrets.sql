create table secrets (
  id uuid primary key,
  organization_id uuid not null references organizations,
  -- Whom it belongs to: 1 project, 2 user, 3 organization, 4 service account.
  scope smallint not null,
  scope_id uuid not null,
  name text not null,
  -- Changes with the value.
  session uuid not null,
  -- Null where the value is kept elsewhere.
  sealed_value bytea,
  -- The secret as clients see it, never with its value.
  message bytea not null
);
create unique index secrets_name on secrets (scope, scope_id, name);
create index secrets_list on secrets (organization_id, scope, id);
create index secrets_scope on secrets (scope_id, id);

-- Scopes in which secrets have changed since the environments were told: a change is never lost, and told at least once.
create table secret_changes (
  scope smallint not null,
  scope_id uuid not null,
  organization_id uuid not null references organizations,
  -- Grows with each change; the row goes once the environments know this one.
  revision bigint not null default 1,
  -- When to look at it; in the future while somebody is at it.
  due_at timestamptz not null,
  primary key (scope, scope_id)
);
create index secret_changes_due on secret_changes (due_at);

-- Who has read which value, so that the audit log tells it once.
create table secret_reads (
  reader_id uuid not null,
  secret_id uuid not null references secrets on delete cascade,
  session uuid not null,
  primary key (reader_id, secret_id)
);
create index secret_reads_secret on secret_reads (secret_id);

create index environments_project on environments (project_id, id) where project_id is not null;

-- Secrets of the owners of one environment. A change of secrets waits until environments that are being made or started
-- have committed, and they wait for it. The rows have to be read when the lock is held, and a statement sees what was
-- there when it began: so it takes two, which are one call.
create function secrets_of(organization uuid, owners uuid[]) returns setof secrets language plpgsql volatile as $$
begin
  perform pg_advisory_xact_lock_shared(hashtextextended('secrets ' || organization, 0));
  return query select * from secrets s where s.scope_id = any(owners) and s.organization_id = organization;
end $$;
