-- How long the environments of a project ran on each day (UTC), of runs that have ended: what sums over long ranges read
-- instead of every run. Kept in step with the runs in the transaction that ends them.
create table project_days (
  organization_id uuid not null,
  day timestamptz not null,
  project_id uuid not null references projects on delete cascade,
  microseconds bigint not null,
  primary key (organization_id, day, project_id)
);
create index project_days_project on project_days (project_id);

-- A day has 24 hours here, whatever the time zone of the session says.
create function project_days_of(run environment_runs) returns setof project_days language sql stable as $$
  select run.organization_id, d.day, run.project_id,
    (extract(epoch from least(run.ended_at, d.day + interval '24 hours') - greatest(run.started_at, d.day)) * 1000000)::bigint
  from generate_series(date_trunc('day', run.started_at, 'UTC'), run.ended_at, interval '24 hours') d (day)
  where d.day < run.ended_at
$$;

create function add_project_days() returns trigger language plpgsql as $$
begin
  insert into project_days select * from project_days_of(new)
  on conflict (organization_id, day, project_id) do update set microseconds = project_days.microseconds + excluded.microseconds;
  return null;
end $$;
create trigger environment_run_ended after insert or update of ended_at on environment_runs
  for each row when (new.ended_at <> 'infinity') execute function add_project_days();

insert into project_days
select days.organization_id, days.day, days.project_id, sum(days.microseconds)
from environment_runs run cross join lateral project_days_of(run) days where run.ended_at <> 'infinity'
group by days.organization_id, days.day, days.project_id;

-- Runs are read as such only where they go on, or lie in a part of a day.
drop index environment_runs_range;
create index environment_runs_open on environment_runs (organization_id) where ended_at = 'infinity';
create index environment_runs_ended on environment_runs using gist (tstzrange(started_at, ended_at)) where ended_at <> 'infinity';
