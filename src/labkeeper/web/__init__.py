"""The dashboard: pages for people, over the services of the API and by its rules of access."""
