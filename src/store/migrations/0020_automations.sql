-- Services, tasks and executions of environments. The row of the environment is the lock of all of them. The runner is
-- repeated so that everything of one can be read in order; it never changes.

create table services (
  id uuid primary key,
  organization_id uuid not null references organizations,
  environment_id uuid not null references environments on delete cascade,
  runner_id uuid not null,
  reference text not null,
  role smallint not null,
  phase smallint not null,
  desired_phase smallint not null,
  metadata bytea not null,
  spec bytea not null,
  status bytea not null,
  -- Secrets that its variables name.
  secret_ids uuid[] not null,
  -- What asked for the session in the spec: `manual` or a trigger.
  started_by text not null default '',
  -- Order of the last accepted report.
  report_epoch bigint not null default 0,
  report_seq bigint not null default 0,
  unique (environment_id, reference)
) with (fillfactor = 80);
create index services_list on services (organization_id, id);
create index services_reference on services (organization_id, reference, id);
create index services_environment on services (environment_id, id);
create index services_runner on services (runner_id, id);

create table tasks (
  id uuid primary key,
  organization_id uuid not null references organizations,
  environment_id uuid not null references environments on delete cascade,
  reference text not null,
  -- Tasks and services of the same environment.
  depends_on uuid[] not null,
  metadata bytea not null,
  spec bytea not null,
  unique (environment_id, reference)
);
create index tasks_list on tasks (organization_id, id);
create index tasks_reference on tasks (organization_id, reference, id);
create index tasks_environment on tasks (environment_id, id);

create table task_executions (
  id uuid primary key,
  organization_id uuid not null references organizations,
  environment_id uuid not null references environments on delete cascade,
  runner_id uuid not null,
  -- The task may be gone; its reference is that of the start.
  task_id uuid not null,
  task_reference text not null,
  started_by text not null,
  -- Executions of one firing share the runs of their tasks; null for a manual start.
  firing_id uuid,
  phase smallint not null,
  desired_phase smallint not null,
  completed_at timestamptz,
  -- Secrets that the variables in its plan name.
  secret_ids uuid[] not null,
  metadata bytea not null,
  -- The plan, which is large and hardly ever changes.
  spec bytea not null,
  status bytea not null,
  report_epoch bigint not null default 0,
  report_seq bigint not null default 0
) with (fillfactor = 80);
create index task_executions_list on task_executions (organization_id, id);
create index task_executions_reference on task_executions (organization_id, task_reference, id);
create index task_executions_environment on task_executions (environment_id, id);
create index task_executions_task on task_executions (task_id, id);
create index task_executions_unfinished on task_executions (environment_id, id) where completed_at is null;
create index task_executions_runner on task_executions (runner_id, id) where completed_at is null;
create index task_executions_age on task_executions (completed_at) where completed_at is not null;

-- The newest occurrence of each trigger that has fired, so that none fires twice.
create table trigger_firings (
  environment_id uuid not null references environments on delete cascade,
  trigger text not null,
  occurrence text not null,
  fired_at timestamptz not null,
  primary key (environment_id, trigger)
);
