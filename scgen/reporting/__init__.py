"""The pictures and the report of an integration. The pictures of users are in `scgen.plots`."""
