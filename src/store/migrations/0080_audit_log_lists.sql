-- The audit log is listed by time, all of it or what has one actor, subject, type of subject or kind of actor.
drop index audit_log_list;
create index audit_log_time on audit_log (organization_id, created_at, id);
create index audit_log_actor on audit_log (organization_id, actor_id, created_at, id);
create index audit_log_actor_principal on audit_log (organization_id, actor_principal, created_at, id);
create index audit_log_subject on audit_log (organization_id, subject_id, created_at, id);
create index audit_log_subject_type on audit_log (organization_id, subject_type, created_at, id);
