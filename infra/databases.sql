-- One role and its own databases for each server; nobody else may connect to them.
\set ON_ERROR_STOP on
\getenv prefect_password PREFECT_DATABASE_PASSWORD
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE prefect OWNER prefect TEMPLATE template0 ENCODING 'UTF8';
CREATE DATABASE mlflow OWNER mlflow TEMPLATE template0 ENCODING 'UTF8';
CREATE DATABASE mlflow_accounts OWNER mlflow TEMPLATE template0 ENCODING 'UTF8';
REVOKE ALL ON DATABASE prefect, mlflow, mlflow_accounts, postgres FROM PUBLIC;
