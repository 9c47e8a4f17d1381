"""The page on which a person shows objects, looks, and mends: its server and its session."""
