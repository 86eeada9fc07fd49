"""REST v1, a module a noun. Every route is an `api.routes.base.Api` route and names the role that it needs."""
