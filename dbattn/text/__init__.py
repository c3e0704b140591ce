"""Long texts: what to hide in them, how they are asked about, how they are cut."""
