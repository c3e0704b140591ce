"""One call to a store: checked, planned, run, audited. Nothing here knows which indexes there are."""
