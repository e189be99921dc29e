"""What tests start and talk to: servers, clients, PostgreSQL, a browser."""
