"""Where the jobs run: a private Ray on this machine, and what larger clusters need."""
