-- One statement a line, as PostgreSQL wants it when it reads this without a client. The tests make databases, and are no superuser.
CREATE ROLE onlyonce LOGIN CREATEDB PASSWORD 'onlyonce';
CREATE DATABASE onlyonce OWNER onlyonce;
