-- What the creation of an environment looks at while it holds others back. A statement sees what was there when it
-- began, so what has to be read under a lock takes one more: functions make one call of them. Rules that are asked
-- elsewhere, too, are here once.

-- Whether a credential can be used at a moment, or renewed.
create function is_usable(token host_tokens, at timestamptz) returns boolean language sql immutable as $$
  select token.invalid_reason is null and (coalesce(token.expires_at > at, true) or token.sealed_refresh_token is not null)
$$;

-- What counts towards the quotas of a person: all environments that are neither archived nor going (roles DEFAULT and
-- WORKFLOW, desired phase other than DELETED), and those of them that want to run.
create function quota_use(organization uuid, creator uuid, out total integer, out running integer)
language sql stable as $$
  select count(*)::integer, count(*) filter (where desired_phase = 40)::integer from environments
  where organization_id = organization and creator_id = creator and archived_at is null and role in (1, 3)
    and desired_phase <> 80 and deleted_at is null
$$;

-- Environments that want to run on a runner.
create function running_on(runner uuid) returns integer language sql stable as $$
  select count(*)::integer from environments where runner_id = runner and desired_phase = 40 and deleted_at is null
$$;

-- The integrations that hold for a runner: its own, and for local runners (kind 1) those that all of them share (those
-- of kind 3), where it has none of its own for the host.
create function effective_integrations(runner uuid) returns setof scm_integrations language sql stable as $$
  select distinct on (i.host) i.* from runners r join scm_integrations i on i.runner_id = r.id or (r.kind = 1
    and i.runner_id in (select l.id from runners l where l.organization_id = r.organization_id and l.kind = 3))
  where r.id = runner order by i.host, i.runner_id = r.id desc
$$;

-- What an environment is made with that others may change: secrets of its owners, and for each of these hosts whether it
-- offers to sign in and the credential that its creator holds for it on the runner. As one text, so that what was read
-- can be compared with what is there.
create function creation_inputs(
  organization uuid, owners uuid[], runner uuid, subject uuid, hosts text[], at timestamptz
) returns text language plpgsql stable set plan_cache_mode = force_generic_plan as $$
declare
  secrets json;
  sign_ins json;
  tokens json;
begin
  select json_agg(json_build_array(s.scope, s.scope_id, s.session, encode(s.message, 'base64')) order by s.id) into secrets
  from secrets s where s.scope_id = any(owners) and s.organization_id = organization;
  if hosts <> '{}' then
    select json_agg(json_build_array(i.host, i.pat or i.oauth)) into sign_ins
    from effective_integrations(runner) i where i.host = any(hosts);
    select json_agg(json_build_array(t.host, t.id, t.version)) into tokens from (
      select distinct on (h.host) h.host, h.id, h.version from host_tokens h
      where h.runner_id = runner and h.host = any(hosts) and h.subject_id = subject and is_usable(h, at)
      order by h.host, h.id desc
    ) t;
  end if;
  return json_build_object('secrets', secrets, 'signIns', sign_ins, 'tokens', tokens);
end $$;

-- Holds what a creation depends on until its transaction ends, in the order in which everybody does, and tells how it is
-- now: the project, if there is one, and is not going; the creator's quotas, if they are limited; the runner, and how
-- many run on it, if that is limited; secrets.
create function hold_for_creation(
  organization uuid, project uuid, creator uuid, is_limited boolean, runner uuid, hosts text[], at timestamptz,
  out has_project boolean, out total integer, out running integer, out runner_phase smallint, out max_environments integer,
  out on_runner integer, out inputs text
) language plpgsql volatile set plan_cache_mode = force_generic_plan as $$
begin
  has_project := true;
  if project is not null then
    perform from projects p where p.id = project and p.deleting_at is null for share;
    has_project := found;
  end if;
  if is_limited then
    perform pg_advisory_xact_lock(hashtextextended('quota ' || organization || ' ' || creator, 0));
    select q.total, q.running into hold_for_creation.total, hold_for_creation.running
    from quota_use(organization, creator) q;
  end if;
  select r.phase, r.max_environments into runner_phase, hold_for_creation.max_environments
  from runners r where r.id = runner for no key update;
  if max_environments is not null then
    on_runner := running_on(runner);
  end if;
  perform pg_advisory_xact_lock_shared(hashtextextended('secrets ' || organization, 0));
  inputs := creation_inputs(organization, array[organization, project, creator], runner, creator, hosts, at);
end $$;
