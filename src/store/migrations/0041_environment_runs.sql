-- When environments of projects ran: RUNNING or UPDATING without a break. Outlives the environments; one that runs now
-- ends at infinity.
create table environment_runs (
  environment_id uuid not null,
  organization_id uuid not null,
  project_id uuid not null references projects on delete cascade,
  started_at timestamptz not null,
  ended_at timestamptz not null default 'infinity',
  primary key (environment_id, started_at)
);
create index environment_runs_range on environment_runs (organization_id, ended_at) include (project_id, started_at);
create index environment_runs_project on environment_runs (project_id);
