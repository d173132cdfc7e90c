"""What a farm and its hosts agree on: bytes (`codec`), commands (`protocol`), errors (`errors`)."""
