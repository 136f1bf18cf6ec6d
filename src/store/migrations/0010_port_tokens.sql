-- The nonce of the port when the token was made: a port that was closed or narrowed since has another one.
alter table tokens add column auth_nonce bigint;
