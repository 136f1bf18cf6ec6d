-- The token stands in an address: it is good for being exchanged for another one, once, and for nothing else.
alter table tokens add column to_redeem boolean not null default false;
