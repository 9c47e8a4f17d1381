"""The running process: several processes of one job, user errors, the version."""
