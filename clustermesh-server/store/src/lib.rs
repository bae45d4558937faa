//! Durability: Raft log and vote on sled, snapshots as files, and an in-memory twin.
