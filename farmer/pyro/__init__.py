"""The link to a farm over Pyro4. Nothing of Pyro4 stands elsewhere on the host's side."""
