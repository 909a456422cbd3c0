"""PDS-DPO's preference data, stage by stage, with a JSONL file between each."""
