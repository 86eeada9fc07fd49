"""The web pages: server-rendered templates over the coordinator, kept fresh by htmx. `mount.install` adds them."""
