create table projects (
  id uuid primary key,
  organization_id uuid not null references organizations,
  creator_id uuid not null,
  creator_principal smallint not null,
  name text not null,
  -- Lower-case text that ListProjects searches: name, id, names of the repositories.
  search text not null,
  -- Addresses of the repositories as given, and in the one spelling that all addresses of a repository share.
  remote_uris text[] not null,
  repositories text[] not null,
  -- Without classes, users and description.
  message bytea not null,
  technical_description text not null,
  -- Environments of the last 30 days, recent ones count more; see domain/project.ts.
  popularity double precision not null default 0,
  popularity_due_at timestamptz not null,
  created_at timestamptz not null,
  deleting_at timestamptz
);
create index projects_list on projects (organization_id, id) where deleting_at is null;
create index projects_popularity on projects (organization_id, popularity, id) where deleting_at is null;
create index projects_popularity_due on projects (popularity_due_at) where deleting_at is null;
create index projects_deleting on projects (deleting_at) where deleting_at is not null;
create index projects_remote_uris on projects using gin (remote_uris);
create index projects_repositories on projects using gin (repositories);

create table project_environment_classes (
  project_id uuid not null references projects on delete cascade,
  position integer not null,
  -- Null stands for every class of a local runner that the user may use.
  class_id uuid references environment_classes on delete cascade,
  primary key (project_id, position)
);
create index project_environment_classes_class on project_environment_classes (class_id, project_id) where class_id is not null;

-- Who made environments from a project. Outlives the environments.
create table project_users (
  project_id uuid not null references projects on delete cascade,
  subject_id uuid not null,
  subject_principal smallint not null,
  used_at timestamptz not null,
  primary key (project_id, subject_id)
);
create index project_users_recent on project_users (project_id, used_at);

-- Environments made from a project, as long as they count for its popularity.
create table project_uses (
  project_id uuid not null references projects on delete cascade,
  environment_id uuid not null,
  created_at timestamptz not null,
  primary key (project_id, environment_id)
);
create index project_uses_age on project_uses (created_at);
