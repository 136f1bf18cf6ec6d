-- Since when a stopped environment has been waiting for its archival; null if it never archives by itself as it is.
alter table environments add column archivable_since timestamptz;
update environments set archivable_since =
    greatest((facts::json ->> 'stoppedAt')::timestamptz, (facts::json ->> 'unarchivedAt')::timestamptz)
  where phase = 60 and role = 1 and archived_at is null and facts::json ->> 'stoppedAt' is not null
    and not coalesce((facts::json ->> 'archiveRequested')::boolean, false);
create index environments_archivable on environments (organization_id, archivable_since) where archivable_since is not null;
create index environments_deletable on environments (organization_id, archived_at)
  where archived_at is not null and desired_phase <> 80;
